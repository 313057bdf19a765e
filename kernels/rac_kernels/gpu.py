"""Triton where it is installed, and what the launchers want to know of a device.

CUDA builds of torch bring Triton; elsewhere the kernels are left undecorated and `rac_kernels.backend.choose` refuses
them. With TRITON_INTERPRET=1 set before triton is imported they run on the CPU, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INSTALLED", "INTERPRETED", "jit", "processors", "tl"]

INSTALLED = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(*not_specialized: str) -> Callable[[Any], Any]:
    """``triton.jit`` that compiles no variants for values of the named arguments."""

    def decorate(function: Any) -> Any:
        return triton.jit(function, do_not_specialize=list(not_specialized)) if INSTALLED else function

    return decorate


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few for the interpreter, so that it goes all the ways."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
