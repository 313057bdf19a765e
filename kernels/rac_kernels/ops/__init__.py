"""The operations, a file each: schema, torch reference, native, Triton and CUDA ways, launcher."""
