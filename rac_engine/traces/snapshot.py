"""A batch that is being decoded, on disk: an interruption costs no more than what was sampled since the last snapshot.

It holds all that decides the tokens to come, keys and values of the sequences in flight included: to compute these anew
from the tokens would give other last bits, and in the end other tokens.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, opened, pieces, read_at, require_space, sync, write_at
from rac_engine.base.sizes import format_seconds
from rac_engine.checkpoint import bytes_of

EVERY = 30.0
"""Seconds between two snapshots, at least."""

SHARE = 0.05
"""Share of the time that they may take; where they are large, or the disk is slow, there are fewer."""

_RATE = 100e6  # bytes a second that a disk is taken to write as long as none was measured

_LENGTH, _CHECK = 8, 4  # bytes of the header's length, and of the checksum at the end


@dataclass
class Snapshots:
    """The snapshots of the batch at which a job is, in the file `path`; `job` is its identity."""

    path: Path
    job: Mapping[str, Any]
    seconds: float = 0.0
    """Time that had gone into the batch when the snapshot was written that it went on from."""
    _last: float = field(default_factory=time.monotonic)
    _took: float | None = None

    def due(self, nbytes: Callable[[], int]) -> bool:
        """Whether it is time to write one, which would have so many bytes."""
        since = time.monotonic() - self._last
        return since >= EVERY and since * SHARE >= (nbytes() / _RATE if self._took is None else self._took)

    def write(self, state: dict[str, Any], tensors: Iterable[Tensor], nbytes: int) -> None:
        """Write the state of a batch and its tensors, of `nbytes` in all; nothing where the disk has no room for it."""
        began = time.monotonic()
        header = json.dumps({"job": dict(self.job), "state": state}).encode()
        head = len(header).to_bytes(_LENGTH, "little") + header
        staged = self.path.with_name(f"{self.path.name}.tmp")
        try:
            require_space(self.path.parent, len(head) + nbytes)
            with opened(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
                write_at(fd, head, 0)
                at, check = len(head), zlib.crc32(head)
                for tensor in tensors:
                    data = bytes_of(tensor.cpu().contiguous())
                    write_at(fd, data, at)
                    at, check = at + len(data), zlib.crc32(data, check)
                write_at(fd, check.to_bytes(_CHECK, "little"), at)
                faults.fsync(fd)
            faults.rename(staged, self.path)
            sync(self.path.absolute().parent)
        except (BadInput, OSError):  # the batch goes on without, to its end
            with suppress(OSError):
                staged.unlink(missing_ok=True)
        self._last = time.monotonic()
        self._took = self._last - began

    def read(self) -> Snapshot | None:
        """The snapshot that is there, if it is whole and of this job."""
        if not self.path.exists() or not _is_whole(self.path):
            return None
        with opened(self.path) as fd:
            length = int.from_bytes(read_at(fd, self.path, 0, _LENGTH), "little")
            header = json.loads(bytes(read_at(fd, self.path, _LENGTH, length)))
        return (
            Snapshot(self.path, header["state"], _LENGTH + length)
            if header["job"] == json.loads(json.dumps(dict(self.job)))
            else None
        )

    def describe(self) -> str:
        """What of the batch is kept, in words that go on with a sentence; empty if nothing is."""
        if not self.path.exists():
            return ""
        return f" and a batch as it was {format_seconds(max(time.time() - self.path.stat().st_mtime, 0))} ago"

    def remove(self) -> None:
        """Forget the batch: it is in the journal, or a new one begins."""
        with disk_errors(self.path):
            if self.path.exists():
                faults.unlink(self.path)
        self.seconds, self._last = 0.0, time.monotonic()


@dataclass
class Snapshot:
    """A snapshot that was found: the `state` of the batch, and tensors to be read in the order they were written."""

    path: Path
    state: dict[str, Any]
    offset: int

    def fill(self, tensor: Tensor) -> None:
        """Read the next tensor into this one, of the same shape and dtype."""
        read = tensor.new_empty(tensor.shape, device="cpu")
        data = bytes_of(read)
        with opened(self.path) as fd:
            data[:] = read_at(fd, self.path, self.offset, len(data))
        tensor.copy_(read)
        self.offset += len(data)


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the checksum of what is before."""
    size = path.stat().st_size - _CHECK
    if size < _LENGTH:
        return False
    check = 0
    for piece in pieces(path, 0, size):
        check = zlib.crc32(piece, check)
    with opened(path) as fd:
        return bytes(read_at(fd, path, size, _CHECK)) == check.to_bytes(_CHECK, "little")
