"""The protocol of every long job: claim OUT.partial, keep a journal there, go on after a stop, publish OUT whole."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rac_engine.base import faults
from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.base.files import disk_errors, replace_file
from rac_engine.jobs.claim import Unlockable, held, made, refuse_place
from rac_engine.jobs.journal import Journal, open_journal, open_journal_file
from rac_engine.jobs.layout import UNDER_WAY, partial_of
from rac_engine.jobs.publish import is_published, publish

_published: set[str] = set()
"""Absolute paths of what jobs of this process have published."""


def has_published(out: Path) -> bool:
    """Whether a job of this process has published `out`: from then on it is done, whatever comes."""
    return os.path.abspath(out) in _published


class LongJob(ABC):
    """A job that works in OUT.partial until OUT can appear whole; used as a context manager.

    What it does, in this order:

    1. *Claim.* Entering refuses an OUT that exists or lies in the model's folder, makes OUT.partial, and locks it for
       this process. That comes before the job reads anything, so a second process is refused at once. The lock is the
       system's and ends with the process, however that ends.
    2. *Journal.* `open_journal` opens or begins the journal, which lies in OUT.partial (a folder) or is OUT.partial (a
       file). Its first record is the job's identity: whatever decides the bytes of the result. A job that was stopped
       goes on only with the same identity; `restart` drops what is there. The job appends a record for each piece of
       work once that is on the disk, and skips the pieces that it finds recorded.
    3. *Work.* The job writes below `partial` and nowhere else.
    4. *Publish.* `publish` puts everything on the disk and lets OUT appear by one rename. OUT is absent or whole.

    Leaving by an exception:

    - SIGINT (KeyboardInterrupt) becomes `Interrupted` with the job's own words; if OUT was published already, it came
      too late and the job ends as done.
    - OUT.partial is removed if there is nothing in it to go on with: if the journal was not opened and the claim left
      nothing but an empty folder or file, or if the job's `worthwhile` says so. Everything else stays for the next
      call.

    Several processes of one job (ranks) share one claim: the first enters, the others work in its `partial`.
    """

    def __init__(self, out: Path, kind: str, model: Path | None) -> None:
        """Prepare a job for `out`; `kind` is the word for it in the message that refuses one that exists.

        `model` is the folder that the job reads, if it reads one; `out` may not lie in it.
        """
        self.out, self.kind, self.model = out, kind, model
        self.partial = partial_of(out)
        self.notes: list[str] = []
        """What is not as it should be with the place of the job."""
        self._publishing = False
        self._journal: Journal | None = None
        self._stopped: Callable[[], str] = lambda: "stopped"
        self._worthwhile: Callable[[], bool] = lambda: bool(self.done) or self.under_way.exists()
        self._claim = ExitStack()

    @property
    @abstractmethod
    def under_way(self) -> Path:
        """The file for what a job has begun and not yet entered in its journal; never part of the result."""

    @property
    def journal(self) -> Journal:
        """The journal, once it is open."""
        assert self._journal is not None, "the journal is not open"
        return self._journal

    @property
    def done(self) -> int:
        """Pieces of work that the journal says are done: its records behind the identity."""
        return len(self.journal.records) - 1

    def __enter__(self) -> Self:
        _published.discard(os.path.abspath(self.out))
        refuse_place(self.out, self.model)
        if os.path.lexists(self.out):
            raise BadInput(f"{self.out}: exists; choose another {self.kind}, or remove it")
        self._make()
        with ExitStack() as claim:
            try:
                note = claim.enter_context(held(self.partial, self.out))
            except Unlockable:
                self._remove_if_empty()
                raise
            self.notes += [note] if note else []
            if os.path.lexists(self.out):  # since it was looked for above
                self._remove_if_empty()
                raise BadInput(f"{self.out}: another process has just finished it")
            self._claim = claim.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        with self._claim:
            stopped = isinstance(error, KeyboardInterrupt)
            if stopped and self._publishing and self._published():
                self._note_published()
                return True
            if error is not None:
                self._give_up()
            if stopped:
                raise Interrupted(self._stopped()) from None
        return False

    def _open(
        self,
        opened: Journal,
        stopped: Callable[[], str],
        worthwhile: Callable[[], bool] | None,
    ) -> Journal:
        self._journal, self._stopped = opened, stopped
        if worthwhile is not None:
            self._worthwhile = worthwhile
        return opened

    def _note_published(self) -> None:
        _published.add(os.path.abspath(self.out))

    def _give_up(self) -> None:
        """Remove what is not worth going on with."""
        if self._journal is not None and not self._worthwhile():
            self._remove()
        self._remove_if_empty()

    @abstractmethod
    def _make(self) -> None:
        """Make OUT.partial if it is not there."""

    @abstractmethod
    def _published(self) -> bool:
        """Whether OUT has appeared, by this job."""

    @abstractmethod
    def _remove(self) -> None:
        """Remove OUT.partial with all that is in it."""

    @abstractmethod
    def _remove_if_empty(self) -> None:
        """Remove OUT.partial, and what was made for it, if nothing is in it."""


class FolderJob(LongJob):
    """A long job whose OUT is a folder. OUT.partial is a folder too, with the journal in it."""

    def __init__(self, out: Path, kind: str = "output folder", model: Path | None = None) -> None:
        super().__init__(out, kind, model)

    def open_journal(
        self,
        name: str,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        beside: Mapping[str, Any] | None = None,
        stopped: Callable[[], str],
        worthwhile: Callable[[], bool] | None = None,
    ) -> Journal:
        """Open the journal OUT.partial/`name`, or begin it, with everything else in OUT.partial removed.

        `identity` holds what must be the same for the job to go on, `beside` what is entered with it but never
        compared. `stopped` gives the words of `Interrupted` on SIGINT. `worthwhile` says, when the job ends by an
        exception, whether OUT.partial is kept; by default, whether the journal has a record beyond its first.

        Raises `BadInput` as `rac_engine.jobs.journal.open_journal` does.
        """
        return self._open(open_journal(self.partial, name, identity, restart, beside), stopped, worthwhile)

    @property
    def under_way(self) -> Path:
        return self.partial / UNDER_WAY

    def publish(self) -> None:
        """Let the finished folder appear as OUT, by one rename, once all its bytes are on the disk."""
        self._publishing = True
        publish(self.partial, self.out)
        self._note_published()

    def _make(self) -> None:
        if not self.partial.parent.is_dir():
            raise BadInput(f"{self.partial.parent}: no such folder; make it first")
        with made(self.partial):
            self.partial.mkdir(exist_ok=True)

    def _published(self) -> bool:
        return is_published(self.partial, self.out)

    def _remove(self) -> None:
        shutil.rmtree(self.partial)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.partial.rmdir()


class FileJob(LongJob):
    """A long job whose OUT is one file. OUT.partial is its journal, and folders above OUT are made as needed."""

    def __init__(self, out: Path, model: Path | None = None) -> None:
        super().__init__(out, "file", model)
        self._new = [folder for folder in out.parents if not folder.exists()]

    def open_journal(
        self,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        beside: Mapping[str, Any] | None = None,
        stopped: Callable[[], str],
    ) -> Journal:
        """Open the journal OUT.partial, or begin it; the arguments are as in `FolderJob.open_journal`."""
        journal = self._open(open_journal_file(self.partial, identity, restart, beside), stopped, None)
        if restart:
            self.under_way.unlink(missing_ok=True)
        return journal

    @property
    def under_way(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.{UNDER_WAY}")

    def publish(self, data: bytes) -> None:
        """Let OUT appear with these bytes, by one rename once they are on the disk, and remove the journal."""
        self._publishing = True
        try:
            with disk_errors(self.out):
                replace_file(self.out, data)
                faults.unlink(self.partial)
        except KeyboardInterrupt:
            if not self._published():
                raise
            self.partial.unlink(missing_ok=True)
        self._note_published()

    def _make(self) -> None:
        if self.partial.exists() and not self.partial.is_file():
            raise BadInput(f"{self.partial}: is in the way, and no file; remove it or choose another output")
        with made(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()

    def _published(self) -> bool:
        return self.out.exists()

    def _remove(self) -> None:
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)
            self.under_way.unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            if self.partial.exists():
                if self.partial.stat().st_size:
                    return
                self.partial.unlink()
            for folder in self._new:
                folder.rmdir()
