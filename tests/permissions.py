"""Rights of files that hold for root too: the process lets go of its capabilities to read and write what it likes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSION = 0x20080522  # of the interface with 64 capabilities
_OVERRIDING = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextmanager
def forbidden(*files: Path) -> Iterator[None]:
    """Within this nobody, root included, may read or write the files.

    The test is skipped where root may all the same.
    """
    modes = [file.stat().st_mode for file in files]
    for file in files:
        file.chmod(0)
    try:
        with _without_override():
            if any(_readable(file) for file in files):
                pytest.skip("this process may read every file, and cannot let go of that right")
            yield
    finally:
        for file, mode in zip(files, modes, strict=True):
            file.chmod(mode)


def _readable(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY))
    except PermissionError:
        return False
    return True


@contextmanager
def _without_override() -> Iterator[None]:
    """Take the two capabilities out of those in effect in this thread and what it starts; they stay permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        yield
        return
    before = sets[0]
    sets[0] = before & ~_OVERRIDING
    libc.capset(header, sets)
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)
