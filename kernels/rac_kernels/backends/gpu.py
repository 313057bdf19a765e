"""Triton where there is a use for it, and what the launchers want to know of a device.

Triton takes 72 MiB of memory and half a second to load. So it is loaded where it is installed and can run: with a GPU,
or with TRITON_INTERPRET=1, set before triton is imported, on the CPU, for tests. A program that has imported triton
itself gets the kernels too, to compile them without a GPU. Elsewhere they are left undecorated, and
`rac_kernels.backends.choose` refuses them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton: Any = None
tl: Any = None
if INTERPRETED or "triton" in sys.modules or torch.cuda.device_count():
    with suppress(ImportError):
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")

__all__ = [
    "INTERPRETED",
    "LOADED",
    "OLDEST",
    "capability",
    "capturing",
    "compiler",
    "jit",
    "kept",
    "processors",
    "tl",
    "why_unusable",
]

LOADED = triton is not None

OLDEST = 80  # the first capability with tensor cores for bf16 and TF32, and with asynchronous copies

P = ParamSpec("P")

T = TypeVar("T")


def jit(*not_specialized: str) -> Callable[[Any], Any]:
    """``triton.jit`` that compiles no variants for values of the named arguments."""

    def decorate(function: Any) -> Any:
        return triton.jit(function, do_not_specialize=list(not_specialized)) if LOADED else function

    return decorate


def compiler() -> tuple[int, int]:
    """Triton's version, as (3, 9); (0, 0) where it is not loaded."""
    major, minor = (triton.__version__.split(".") if LOADED else ("0", "0"))[:2]
    return int(major), int(minor)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few for the interpreter, so that it goes all the ways."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def capability(device: torch.device) -> int:
    """80, 90, 100 …; of a CPU, where the interpreter runs, 80."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def why_unusable(device: torch.device) -> str:
    """Why the Triton kernels do not run on this GPU, or "" if they do. Whether Triton is there is `LOADED`."""
    return _refusal(-1 if device.index is None else device.index)


_refusals: dict[int, str] = {}


def _refusal(index: int) -> str:
    """`why_unusable` of the device of that number (-1: the current one), asked once of each."""
    if index not in _refusals:
        device = torch.device("cuda") if index < 0 else torch.device("cuda", index)
        _refusals[index] = refusal(capability(device), torch.version.hip)
    return _refusals[index]


# Not traced into, as that of backends/cuda.py.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal(capability: int, hip: str | None) -> str:
    """Why the Triton kernels do not run on a GPU of that capability, with that version of ROCm if it is an AMD GPU, or
    "" if they do."""
    if hip is not None:
        return f"Triton for ROCm (here {hip}) does not make fp32 products of three in TF32"
    if capability < OLDEST:
        return f"compute capability {capability / 10:.1f} is older than {OLDEST / 10:.1f}"
    return ""


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
