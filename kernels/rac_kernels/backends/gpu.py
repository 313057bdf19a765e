"""Triton where it is installed, and what the launchers want to know of a device.

CUDA builds of torch bring Triton; elsewhere the kernels are left undecorated and `rac_kernels.backends.choose` refuses
them. With TRITON_INTERPRET=1 set before triton is imported they run on the CPU, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INSTALLED", "INTERPRETED", "capturing", "jit", "kept", "processors", "tl"]

INSTALLED = triton is not None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

P = ParamSpec("P")

T = TypeVar("T")


def jit(*not_specialized: str) -> Callable[[Any], Any]:
    """``triton.jit`` that compiles no variants for values of the named arguments."""

    def decorate(function: Any) -> Any:
        return triton.jit(function, do_not_specialize=list(not_specialized)) if INSTALLED else function

    return decorate


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few for the interpreter, so that it goes all the ways."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then or be copied to it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def kept(build: Callable[P, T]) -> Callable[P, T]:
    """Decorates what copies tables to a device that kernels read: each is built once and kept while the process lives.

    A CUDA graph that was captured with one holds its address, and nobody says when it will be replayed for the last
    time. So none is ever given up; they are as many as there are shapes, and small. Raises RuntimeError for a new one
    while a graph is captured.
    """

    @wraps(build)
    def first(*args: P.args, **kwargs: P.kwargs) -> T:
        if capturing():
            raise RuntimeError("before capturing this in a CUDA graph run it once with the same shapes and settings")
        return build(*args, **kwargs)

    return cast(Callable[P, T], cache(first))
