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
from rac_engine.base.names import is_utf8
from rac_engine.jobs.layout import EVAL, RAC, partial_of

# Of a file system without locks, or with locks for files that are open for writing alone, which a folder never is.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Unlockable(BadInput):
    """A place where a lock cannot be asked for, for no reason that one could work without it."""


def refuse_place(out: Path, model: Path | None) -> None:
    """`BadInput` for an output that cannot become what it should, whatever is done for it.

    Its place, and the folder of the `model` that the job reads, have to be text. It may not lie in that folder, where
    it would be taken for a part of the model, links followed; but for results of `rac eval` in the place for them. Nor
    may the model lie where the job works.
    """
    for path in filter(None, (out, model)):
        if not is_utf8(path.absolute()):
            raise BadInput(f"{str(path.absolute())!r} has bytes that are not UTF-8; rename it, or choose another place")
    if model is None or not os.path.isdir(model):
        return
    home, place = Path(os.path.realpath(model)), Path(os.path.realpath(out.absolute().parent)) / out.name
    if _same(out, home):
        raise BadInput(f"{out}: is the model's own folder; choose another output")
    within = any(_same(folder, home) for folder in place.parents)
    if within and not place.is_relative_to(home / RAC / EVAL):
        raise BadInput(f"{out}: lies in the model's folder {model}; choose an output outside of it")
    if any(_same(folder, partial_of(place)) for folder in (home, *home.parents)):
        raise BadInput(f"{model}: lies in {partial_of(out)}, where this job would work; choose another output")


def _same(one: Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


@contextmanager
def made(path: Path) -> Iterator[None]:
    """Within this a job's place is made; `BadInput` where the system does not let it: nothing is done yet."""
    try:
        with disk_errors(path):
            yield
    except FileExistsError as error:
        found = error.filename or path
        raise BadInput(f"{found}: is in the way, and no folder; remove it or choose another output") from None
    except OSError as error:
        raise BadInput(f"{path}: nothing can be made there ({error.strerror}); choose another output") from None


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
