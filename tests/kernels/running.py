"""The implementations that a test runs through: the torch reference, and every native instruction set found here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rac_kernels.backends import native

CPU = ["reference", *native.info().get("isas", [])]
#: Without those that differ from another one only for products of two bytes.
CPU_FP32 = [name for name in CPU if name not in ("avx512bf16", "amx")]


@contextmanager
def running(name: str) -> Iterator[str]:
    """Choose one of ``CPU``; gives what to pass as ``backend=``."""
    if name == "reference":
        yield name
    else:
        with native.use_isa(name):
            yield "native"
