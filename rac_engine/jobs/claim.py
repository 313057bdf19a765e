"""The place where only one process works."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors

# Of a file system without locks, or with locks for files that are open for writing alone, which a folder never is.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Unlockable(BadInput):
    """A place where a lock cannot be asked for, for no reason that one could work without it."""


@contextmanager
def held(path: Path, out: Path) -> Iterator[str]:
    """A file or folder for this process alone; `BadInput` at once if another one has it, or has just made `out` of it.

    The lock is the system's (flock): it ends with the process, however that ends. Gives a note where the file system
    has no locks, and "" where the lock is held.
    """
    note = ""
    with disk_errors(path):
        # NFS takes flock for a lock on bytes, which needs a file that is open for writing.
        fd = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another process is working there; wait for it, or choose another output") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise Unlockable(f"{path}: cannot be locked ({error.strerror}); choose another output") from None
            note = (
                f"{path}: no lock on this file system ({error.strerror}), so nothing keeps another process from "
                "working there too"
            )
        if not path.exists() or not os.path.samestat(os.fstat(fd), path.stat()):
            done = "has just finished it" if os.path.lexists(out) else "has just given it up; run this again"
            raise BadInput(f"{out}: another process {done}")
        yield note
    finally:
        os.close(fd)
