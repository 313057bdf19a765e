"""Which of an operation's implementations runs."""

from __future__ import annotations

import torch

from rac_kernels import native

BACKENDS = ("auto", "reference", "native")


def choose(backend: str, device: torch.device) -> str:
    """``"auto"`` → the fastest one there is for tensors on this device: "native" on the CPU, else "reference".

    A backend named is taken or refused, never replaced. Raises ValueError for an unknown name or a device it does not
    serve, NativeMissing (with the reason) for "native" without the extension.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "native" if device.type == "cpu" and native.available() else "reference"
    if backend == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native' needs tensors on the CPU, not on {device}")
        native.library()
    return backend
