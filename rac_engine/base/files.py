"""Files: read and written in pieces, synced, replaced whole, with disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes

PIECE = 8 << 20

_SPARE = 4 << 20  # bytes that journal, metrics and report may take


def read_small(file: Path, limit: int) -> bytes:
    """The bytes of a regular file; `BadInput` for one of more than `limit` bytes, a device or a pipe."""
    with opened(file) as fd:
        size = regular_status(fd, file).st_size
        if size > limit:
            raise BadInput(f"{file}: larger than {format_bytes(limit)}; that is no file of a checkpoint")
        return bytes(read_at(fd, file, 0, size))


def write_file(file: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_at(fd, data, 0)
        faults.fsync(fd)


def replace_file(file: Path, data: bytes) -> None:
    """Let a small file appear, or take the place of an earlier one, whole: by one rename, once it is on the disk."""
    staged = file.with_name(f"{file.name}.tmp")
    try:
        write_file(staged, data)
        faults.rename(staged, file)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync(file.absolute().parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file's bytes; a later `sync` puts them on the disk."""
    with opened(source) as fd:
        size = regular_status(fd, source).st_size
    with opened(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        at = 0
        for piece in pieces(source, 0, size):
            write_at(fd, piece, at)
            at += len(piece)


def sync(path: Path) -> None:
    """fsync a file or folder; a folder where its file system has that, which some network ones do not."""
    with opened(path) as fd:
        try:
            faults.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise


def reserve(fd: int, size: int) -> None:
    """Let a file have `size` bytes, reserved where its file system can do that; elsewhere the disk may fill later."""
    try:
        faults.reserve(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        faults.truncate(fd, size)


def require_space(folder: Path, count: int) -> None:
    """`BadInput` unless `count` bytes, and a little for what goes beside the weights, are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < count + _SPARE:
        raise BadInput(
            f"{folder}: {format_bytes(count + _SPARE)} more are needed on this disk and {format_bytes(free)} are free; "
            "free some space or choose another disk"
        )


def sha256_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files in `folder`, with all cores."""

    def one(name: str) -> str:
        file = folder / name
        return _sha256_range(file, 0, file.stat().st_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full, over quota, read-only or forbidden into one line of `BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BadInput(f"{path}: {error.strerror}; free some space or choose another disk") from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise BadInput(f"{error.filename or path}: {error.strerror}; choose another output folder") from None
        raise


@contextmanager
def opened(file: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor of `file`, closed at the end; waits for no writer of a pipe.

    Raises `BadInput` for a file that this user may not read.
    """
    try:
        # A pipe that nobody writes to would be waited for, without O_NONBLOCK; to regular files it means nothing.
        fd = os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except PermissionError as error:
        if flags != os.O_RDONLY:
            raise
        raise BadInput(f"{file}: {error.strerror}; let this user read it") from None
    try:
        yield fd
    finally:
        os.close(fd)


def regular_status(fd: int, file: Path) -> os.stat_result:
    """The status of a regular file; `BadInput` for anything else."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{file}: is no regular file; the checkpoint is not to be trusted")
    return status


def read_into(fd: int, file: Path, offset: int, target: memoryview) -> None:
    """Fill `target` from byte `offset` of the file on; `BadInput` where the file ends before."""
    done = 0
    while done < len(target):
        count = faults.preadv(fd, [target[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise BadInput(f"{file}: ends before byte {offset + len(target)}; it was cut short, fetch it again")
        done += count


def read_at(fd: int, file: Path, offset: int, count: int) -> bytearray:
    """`count` bytes from byte `offset` of the file on; `BadInput` where the file ends before."""
    data = bytearray(count)
    read_into(fd, file, offset, memoryview(data))
    return data


def pieces(file: Path, offset: int, count: int) -> Iterator[memoryview]:
    """Runs of a file's bytes, one after the other in the same memory."""
    memory = memoryview(pages(min(PIECE, count) or 1))
    with opened(file) as fd:
        for at in range(0, count, PIECE):
            piece = memory[: min(PIECE, count - at)]
            read_into(fd, file, offset + at, piece)
            yield piece


class _Locked(mmap.mmap):
    """Pages that call `unlock` before they are unmapped.

    A finalizer would come after that, when the next mapping may have their address already.
    """

    unlock: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unlock is not None:
            self.unlock()


def pages(count: int, pin: bool = False) -> mmap.mmap:
    """Memory outside of the heap: it goes back to the system when it is let go, in whatever thread that is.

    With `pin` it is page-locked, for copies beside a GPU's work: torch's own pinned memory comes in powers of two and
    is not given back, which no plan of memory can bear.
    """
    memory = _Locked(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # not every kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    if pin:
        import torch

        cudart: Any = torch.cuda.cudart()
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, count, 0)))
        memory.unlock = lambda: cudart.cudaHostUnregister(address)
    return memory


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """All of `data`, in as many writes as it takes."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += faults.pwrite(fd, view[done : done + (1 << 30)], offset + done)


def _sha256_range(file: Path, offset: int, count: int) -> str:
    digest = hashlib.sha256()
    for piece in pieces(file, offset, count):
        digest.update(piece)
    return digest.hexdigest()
