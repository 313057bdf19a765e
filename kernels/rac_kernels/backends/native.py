"""The native extension: loading it, saying why it is missing, and choosing among its instruction sets.

The extension is compiled with OpenMP but linked to no OpenMP library: its calls resolve to the libgomp that torch's
wheel brought along, so that one process has one thread pool, governed by ``torch.set_num_threads``.

``RAC_NATIVE=0`` in the environment turns the extension off; ``RAC_NATIVE_ISA=baseline|avx2|avx512|avx512bf16|amx``
chooses an instruction set instead of the best one.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

#: Number by which the extension knows each element type; in step with csrc/cpu/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: How an operation ended; in step with csrc/cpu/types.h. Without memory it raises MemoryError instead.
DONE, NOT_FINITE, NOT_POSITIVE_DEFINITE = 0, 2, 3

_MEND = "install a C++ compiler (apt install g++) and run: pip install --no-build-isolation . in the source folder"


class NativeMissing(RuntimeError):
    """The extension was asked for by name and is not there; the message says why and what to do."""


def _openmp_runtimes() -> list[str]:
    """Paths of the libgomp libraries mapped into this process (Linux; elsewhere empty)."""
    try:
        with open("/proc/self/maps") as maps:
            mapped = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:
        return []
    return sorted(path for path in mapped if os.path.basename(path).startswith("libgomp"))


def _import() -> ModuleType:
    """Import the extension, its OpenMP calls resolved by the runtime that torch has loaded already."""
    if sys.platform == "linux":
        # torch loads its libgomp globally, yet not in every build: make its symbols visible, or load the system's only
        # if there is none at all.
        for path in _openmp_runtimes() or ["libgomp.so.1"]:
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
    return importlib.import_module("rac_kernels._native")


_module: ModuleType | None = None

_missing = ""

if os.environ.get("RAC_NATIVE") == "0":
    _missing = "turned off by RAC_NATIVE=0"
else:
    try:
        _module = _import()
    except ModuleNotFoundError:
        _missing = f"not built; {_MEND}"
    except ImportError as error:
        _missing = f"built but does not load ({error}); {_MEND}"

if _module is not None and (_isa := os.environ.get("RAC_NATIVE_ISA")):
    try:
        _module.choose_isa(_isa)
    except ValueError as error:
        raise ValueError(f"RAC_NATIVE_ISA={_isa}: {error}; usable here: {', '.join(_module.isas())}") from None


def available() -> bool:
    """Whether the extension is loaded."""
    return _module is not None


def has(name: str) -> bool:
    """Whether the extension is loaded and has that function, which one that was built from older sources may lack."""
    return hasattr(_module, name)


def library() -> ModuleType:
    """The extension module; raises `NativeMissing` with the reason when there is none."""
    if _module is None:
        raise NativeMissing(f"the native extension is missing: {_missing}")
    return _module


def threads() -> int:
    """Threads that an operation may use: torch's own setting."""
    return torch.get_num_threads()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another instruction set, for tests and benchmarks; ValueError when this machine cannot."""
    module = library()
    before = module.isa()
    module.choose_isa(name)
    try:
        yield
    finally:
        module.choose_isa(before)


def info() -> dict[str, Any]:
    """Facts about the extension, for `rac doctor` and benchmark records.

    Keys: available, why_missing, isa (in use), isas (usable here), build (compiler and flags), openmp (whether built
    with it), openmp_runtime (paths mapped into this process: one, or two pools compete), threads, cuda (compiler and
    flags of the CUDA sources) or, where these were left out, cuda_missing (why).
    """
    found: dict[str, Any] = {
        "available": available(),
        "why_missing": _missing,
        "openmp_runtime": _openmp_runtimes(),
        "threads": threads(),
    }
    if _module is not None:
        found |= {name: getattr(_module, name) for name in ("build", "openmp", "cuda", "cuda_missing")}
        found |= {"isa": _module.isa(), "isas": _module.isas()}
    return found
