"""This process: its memory, and settings that only a program of its own may make."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from rac_engine.base.lean import import_lean

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


GPU_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The variable of torch's settings for the memory of a GPU."""

SPINS = "GOMP_SPINCOUNT"
"""The variable of libgomp's for how often a waiting thread looks before it sleeps."""

_ENVIRONMENT = {
    # oneDNN, torch's arithmetic on a CPU, keeps what it has compiled for each of up to a thousand shapes: as an expert
    # has another number of tokens in every chunk, memory would grow by a hundred megabytes. A layer's own are some 50,
    # and to compile one anew takes a tenth of its product.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # Where freed memory is given back at once, what is asked for anew comes in pages of 2 MiB: a fifth less time for
    # the whole job than with those of 4 KiB.
    "THP_MEM_ALLOC_ENABLE": "1",
    # numpy brings threads of its own for linear algebra, which is torch's work here.
    "OPENBLAS_NUM_THREADS": "1",
}


def prepare_process() -> None:
    """Set the environment so that memory goes as it is planned, but for what the user has set; and see `import_lean`.

    For the start of a program, before torch is imported: libraries read these variables once. The `rac` command calls
    it; the functions of the package do not, since the process is not theirs.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # By default threads that wait for one another look for milliseconds, which on a machine with other work to do takes
    # the time from the thread that is waited for: sampling from SmolLM2-135M with two threads on two busy cores took
    # 200 ms of processor time a token, and takes 17. Where they sleep at once, waking them costs pruning a tenth.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPINS, "1000")
    set_gpu_allocator()
    import_lean()


def set_gpu_allocator() -> None:
    """Let torch take a GPU's memory in segments that grow and shrink, unless the user has chosen.

    A limit bounds what torch has reserved, so the pieces of it have to fit together: such segments leave next to
    nothing lying idle. It is heeded if CUDA has not started yet.
    """
    if not {GPU_ALLOCATOR, "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ[GPU_ALLOCATOR] = "expandable_segments:True"


def resident() -> int:
    """Bytes of memory that this process has resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Let glibc give freed memory back at once, for the rest of the process; elsewhere nothing is done.

    It keeps pieces of up to 32 MiB for later, more or less of them as threads happen to meet, which a limit has no room
    for. For programs, as `prepare_process`: it cannot be taken back.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)


def give_back_large() -> None:
    """Let glibc give back what is freed in pieces of 8 MiB and more, for the rest of the process.

    By itself it keeps pieces of up to 32 MiB, which are a chunk's activations: without them a job of SmolLM2-135M has
    100 MiB less at its peak. Of the smaller ones it goes on to keep those at the heap's end, up to 32 MiB: told of the
    one, glibc would otherwise give back every 128 KiB of the other, and be handed them anew a million times. For
    programs, as `give_back_freed`.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 8 << 20)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 32 << 20)


def trim_memory() -> None:
    """Let glibc give back, once, what it has kept of freed memory so far; elsewhere nothing is done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(reset: bool = False) -> int:
    """Bytes of memory that this process had resident at most, since the last `reset` if there was one."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
