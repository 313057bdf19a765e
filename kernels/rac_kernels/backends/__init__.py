"""The choice of an operation's implementation, and the native extension, Triton and CUDA behind it."""

from __future__ import annotations

from rac_kernels.backends.dispatch import BACKENDS, choose

__all__ = ["BACKENDS", "choose"]
