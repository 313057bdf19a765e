"""Families that no file describes, found by tracing one forward pass of a small model of the config.

`small` makes the model, `tracing` finds its blocks, `names` what its tensors are called on disk, `discover` makes a
`Family` of it, `holding` holds that against transformers.
"""
