"""The memory of this process."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil

_MMAP_THRESHOLD = -3  # of glibc's mallopt


def resident() -> int:
    """Bytes of memory that this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def give_back_freed() -> None:
    """Let glibc give freed memory back at once: it keeps pieces of up to 32 MiB for later, more or less of them as
    threads happen to meet, which a limit has no room for. Elsewhere nothing is done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)


def peak_memory(reset: bool = False) -> int:
    """Bytes of memory that this process had resident at most, since the last `reset` if there was one."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
