"""The place where only one process works."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rac_engine.base.errors import BadInput


@contextmanager
def held(path: Path, out: Path) -> Iterator[None]:
    """A file or folder for this process alone; `BadInput` at once if another one has it, or has just made `out` of it.

    The lock is the system's (flock): it ends with the process, however that ends.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another process is working there; wait for it, or choose another output") from None
        if not path.exists() or not os.path.samestat(os.fstat(fd), path.stat()):
            done = "has just finished it" if os.path.lexists(out) else "has just given it up; run this again"
            raise BadInput(f"{out}: another process {done}")
        yield
    finally:
        os.close(fd)
