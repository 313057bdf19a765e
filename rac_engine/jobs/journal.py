"""The journal of a job: what is done, in a file that is only ever added to."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import reprlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, sync


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
        text = json.dumps(record).encode()
        line = _checksum(text) + b" " + text + b"\n"
        with disk_errors(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(line):
                    done += faults.pwrite(fd, line[done:], self._ends[-1] + done)
                faults.fsync(fd)
            except OSError:
                with suppress(OSError):  # half a line would be no record anyhow
                    os.ftruncate(fd, self._ends[-1])
                raise
            finally:
                os.close(fd)
        self.records.append(json.loads(text))
        self._ends.append(self._ends[-1] + len(line))

    def cut(self, count: int) -> None:
        """Drop all records but the first `count`."""
        del self.records[count:], self._ends[count + 1 :]
        with disk_errors(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size != self._ends[-1]:
                    faults.truncate(fd, self._ends[-1])
                    faults.fsync(fd)
            finally:
                os.close(fd)

    def identify(self, identity: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        """Enter what decides the result as the first record, or compare it with the one there.

        `beside` is entered with it and never compared: what the first start decided, or a later one wants to know.

        Raises `BadInput` that names all that is not the same.
        """
        if not self.records:
            self.append({"job": dict(identity), **beside})
        known = self.records[0].get("job")
        now = json.loads(json.dumps(dict(identity)))
        if not isinstance(known, dict):
            known = {}
        other = [
            f"another {name}: {_short(known.get(name))}, now {_short(now.get(name))}"
            for name in {**known, **now}
            if known.get(name) != now.get(name)
        ]
        if other:
            raise BadInput(
                f"{self.path.parent}: holds an unfinished job with {'; '.join(other)}; go on with the same, or start "
                "afresh with --restart"
            )


def open_journal(
    folder: Path,
    name: str,
    identity: Mapping[str, Any],
    restart: bool = False,
    beside: Mapping[str, Any] | None = None,
) -> Journal:
    """The journal `folder`/`name` of a new job, or of one that was interrupted and has the same identity.

    Where it says nothing (or is not to, by `restart`), everything else in the folder is removed. Raises `BadInput` for
    a folder with files in it but no journal, for a journal whose first record is damaged, since nobody knows whose it
    is, and for a job with another identity. A first record that was never written to its end is none: nothing is done
    before it is on the disk. `beside` is entered with the identity and never compared.
    """
    path = folder / name
    if not path.exists() and any(not entry.is_dir() for entry in folder.rglob("*")):
        raise BadInput(f"{folder}: not empty, and no unfinished job; remove it or choose another output folder")
    return _identified(path, folder, identity, restart, beside or {})


def open_journal_file(
    path: Path, identity: Mapping[str, Any], restart: bool = False, beside: Mapping[str, Any] | None = None
) -> Journal:
    """The journal at `path`, with nothing else to the job, as `open_journal` has it."""
    return _identified(path, path, identity, restart, beside or {})


def _identified(
    path: Path, folder: Path, identity: Mapping[str, Any], restart: bool, beside: Mapping[str, Any]
) -> Journal:
    """The journal at `path`, of a job that has all of `folder`, with its identity entered or compared."""
    if not restart:
        refuse_unknown(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            journal = Journal(path)
            if restart:
                journal.cut(0)
            if not journal.records and folder != path:
                _clear(folder, path)
        journal.identify(identity, beside)
    except BaseException:
        if not records_of(path):  # a disk may be full at the first record
            remove_empty(path, folder)
        raise
    return journal


def remove_empty(path: Path, folder: Path) -> None:
    """Remove a journal that says nothing, and the folders that it was made in, up to `folder`, that hold nothing."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        for above in path.parents:
            if not above.is_relative_to(folder):
                break
            above.rmdir()


def refuse_unknown(path: Path) -> None:
    """`BadInput` for a journal that has lines, but not a first one that can be believed."""
    raw = path.read_bytes() if path.exists() else b""
    if b"\n" in raw and _parse(raw.splitlines(keepends=True)[0]) is None:
        raise BadInput(
            f"{path}: its first record is damaged, so it cannot be told which job this is; start afresh with --restart"
        )


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a journal, up to the first that is damaged; none if there is no such file. Changes nothing."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    return list(itertools.takewhile(lambda record: record is not None, map(_parse, lines)))  # type: ignore[arg-type]


def first_record(path: Path) -> dict[str, Any]:
    """The record that a journal begins with; empty where there is none that is whole. Reads no more than that."""
    try:
        with path.open("rb") as file:
            return _parse(file.readline()) or {}
    except OSError:
        return {}


def _clear(folder: Path, keep: Path) -> None:
    """Remove everything in `folder` but the file `keep`."""
    for entry in folder.iterdir():
        if entry == keep:
            continue
        if entry.is_symlink() or not entry.is_dir():
            entry.unlink()
        elif keep.is_relative_to(entry):
            _clear(entry, keep)
        else:
            shutil.rmtree(entry)


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 64 else reprlib.repr(value)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:32].encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, rest = line.partition(b" ")
    text = rest.removesuffix(b"\n")
    if text == rest or checksum != _checksum(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
