"""The pruning methods, a file each."""
