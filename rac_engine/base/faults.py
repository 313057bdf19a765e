"""System calls on files, by names that tests can make fail.

Everything a job writes, publishes or reads back goes through the calls below. They are the system's own, so they cost
nothing, unless RAC_FAULTS is in the environment when this module is first imported (or a test calls `arm`). It holds
plans, separated by commas:

    log:FILE                     append a line "OPERATION NAME" for every call
    kill:OPERATION:N:PHASE       SIGKILL at the N-th call (from 1), PHASE before, during (half of a write done) or after
    fail:OPERATION:N:ERRNO       the N-th call fails, as with EIO; ENOSPC lasts from there on
    short:write:N                from the N-th on, a write takes one byte, or half of what it is given
    flip:read:N                  the N-th read returns with one bit flipped

OPERATION is write, reserve, truncate, sync, rename, remove or read, or any for all but read.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rac_engine.base.linux import require_linux

require_linux()

OPERATIONS = ("write", "reserve", "truncate", "sync", "rename", "remove", "read")

pwrite = os.pwrite

preadv = os.preadv

reserve = os.posix_fallocate

truncate = os.ftruncate

fsync = os.fsync

rename = os.rename

unlink = os.unlink

_REAL: dict[str, Callable[..., Any]] = {
    "write": os.pwrite,
    "reserve": os.posix_fallocate,
    "truncate": os.ftruncate,
    "sync": os.fsync,
    "rename": os.rename,
    "remove": os.unlink,
    "read": os.preadv,
}

_NAMES = {"write": "pwrite", "sync": "fsync", "remove": "unlink", "read": "preadv"}


def arm(plans: str) -> None:
    """Put calls that follow `plans` (see above) in the place of the system's; no plan puts those back."""
    wanted = [plan.split(":") for plan in plans.split(",") if plan]
    for operation, real in _REAL.items():
        globals()[_NAMES.get(operation, operation)] = _Call(operation, real, wanted) if wanted else real


class _Counter:
    """The number of a call among those a plan counts."""

    def __init__(self) -> None:
        self._next = itertools.count(1).__next__  # one step of the interpreter, so threads do not get the same number

    def __call__(self) -> int:
        return self._next()


_any = _Counter()


class _Call:
    """A system call of one kind, followed by plans."""

    def __init__(self, operation: str, real: Callable[..., Any], plans: Sequence[Sequence[str]]) -> None:
        global _any
        if operation == OPERATIONS[0]:
            _any = _Counter()
        self.operation, self.real, self.own = operation, real, _Counter()
        self.plans = [plan for plan in plans if plan[0] == "log" or plan[1] in (operation, "any")]

    def __call__(self, *args: Any) -> Any:
        own = self.own()
        every = _any() if self.operation != "read" else 0
        after = False
        for kind, *words in self.plans:
            if kind == "log":
                self._log(words[0], args)
                continue
            number = every if words[0] == "any" else own
            at = int(words[1])
            if kind == "kill" and number == at:
                if words[2] == "after":
                    after = True
                else:
                    if words[2] == "during" and self.operation == "write":
                        self.real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "fail" and number and (number == at or (words[2] == "ENOSPC" and number > at)):
                code = getattr(errno, words[2])
                raise OSError(code, os.strerror(code), args[0] if isinstance(args[0], str | Path) else None)
            elif kind == "short" and number >= at:
                data = memoryview(args[1])
                args = (args[0], data[: max(1, len(data) // 2)], args[2])
        result = self.real(*args)
        for kind, *words in self.plans:
            if kind == "flip" and own == int(words[1]) and result:
                args[1][0][result // 2] ^= 4
        if after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _log(self, file: str, args: Sequence[Any]) -> None:
        name = args[-1] if self.operation == "rename" else args[0]
        if isinstance(name, int):
            name = os.readlink(f"/proc/self/fd/{name}")
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, f"{self.operation} {name}\n".encode())
        finally:
            os.close(fd)


arm(os.environ.get("RAC_FAULTS", ""))
