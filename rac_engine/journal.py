"""The journal of a job: what is done, in a file that is only ever added to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rac_engine.checkpoint import disk_errors, sync


class Journal:
    """JSON records, a line each behind its own checksum.

    The first record that is damaged or unfinished ends the journal: it and what follows are dropped, the ones before
    serve. A record is on the disk when `append` returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._ends = [0]
        with disk_errors(path):
            path.touch()
            raw = path.read_bytes()
            for line in raw.splitlines(keepends=True):
                record = _parse(line)
                if record is None:
                    break
                self.records.append(record)
                self._ends.append(self._ends[-1] + len(line))
            self.cut(len(self.records))
            sync(path.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and wait until it is on the disk."""
        text = json.dumps(record, sort_keys=True).encode()
        line = _checksum(text) + b" " + text + b"\n"
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._ends.append(self._ends[-1] + len(line))

    def cut(self, count: int) -> None:
        """Drop all records but the first `count`."""
        del self.records[count:], self._ends[count + 1 :]
        with disk_errors(self.path):
            os.truncate(self.path, self._ends[-1])
            sync(self.path)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:32].encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, rest = line.partition(b" ")
    text = rest.removesuffix(b"\n")
    if text == rest or checksum != _checksum(text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None
