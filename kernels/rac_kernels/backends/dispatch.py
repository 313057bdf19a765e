"""The choice among an operation's implementations."""

from __future__ import annotations

import torch

from rac_kernels.backends import cuda as cuda_kernels
from rac_kernels.backends import gpu, native

BACKENDS = ("auto", "reference", "native", "triton", "cuda")


def choose(backend: str, device: torch.device, triton: bool = False, cuda: bool = False) -> str:
    """Name the implementation that runs on this device, of an operation with Triton kernels (`triton`) and CUDA ones
    (`cuda`) or without.

    - "reference": plain torch, anywhere
    - "native": csrc/cpu, on a CPU
    - "triton": Triton's kernels, and no others, on a GPU
    - "cuda": those of csrc/cuda, where the operation has any, and Triton's for the rest of it, on a GPU
    - "auto": the fastest there is, the first of "cuda" and "triton" or "native" that can run here, else "reference"

    A backend named is taken or refused, never replaced. Raises ValueError for an unknown name, a device it does not
    serve or a kernel that is not there, NativeMissing (with the reason) for what the extension lacks.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cpu":
            return "native" if native.available() else "reference"
        if device.type != "cuda" or not triton or not gpu.LOADED or gpu.why_unusable(device):
            return "reference"
        return "cuda" if cuda and cuda_kernels.usable(device) else "triton"
    if backend == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native' needs tensors on the CPU, not on {device}")
        native.library()
    if backend == "cuda" and not cuda:
        raise ValueError("backend 'cuda': this operation has no CUDA kernel; 'triton' is its backend on a GPU")
    if backend in ("triton", "cuda"):
        if not triton:
            raise ValueError("this operation has no Triton kernel")
        if device.type != "cuda" and not (gpu.INTERPRETED and backend == "triton"):
            raise ValueError(f"backend {backend!r} needs tensors on a GPU, not on {device}")
        if not gpu.LOADED:
            raise ValueError(f"backend {backend!r} needs Triton: pip install triton")
        if device.type == "cuda" and (why := gpu.why_unusable(device)):
            raise ValueError(f"backend {backend!r} does not run on {device}: {why}")
    if backend == "cuda" and (why := cuda_kernels.why_unusable(device)):
        raise native.NativeMissing(f"backend 'cuda' on {device}: {why}")
    return backend
