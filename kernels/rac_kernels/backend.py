"""Which of an operation's implementations runs."""

from __future__ import annotations

import torch

from rac_kernels import gpu, native

BACKENDS = ("auto", "reference", "native", "triton")


def choose(backend: str, device: torch.device, triton: bool = False) -> str:
    """``"auto"`` → the fastest one there is for tensors on this device.

    That is "native" on the CPU and "triton" on a GPU if the operation has a Triton kernel (`triton`), else "reference".
    A backend named is taken or refused, never replaced. Raises ValueError for an unknown name, a device it does not
    serve or a kernel that is not there, NativeMissing (with the reason) for "native" without the extension.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cpu":
            return "native" if native.available() else "reference"
        return "triton" if device.type == "cuda" and triton and gpu.INSTALLED else "reference"
    if backend == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native' needs tensors on the CPU, not on {device}")
        native.library()
    if backend == "triton":
        if not triton:
            raise ValueError("this operation has no Triton kernel")
        if not gpu.INSTALLED:
            raise ValueError("backend 'triton' needs Triton: pip install triton")
        if device.type != "cuda" and not gpu.INTERPRETED:
            raise ValueError(f"backend 'triton' needs tensors on a GPU, not on {device}")
    return backend
