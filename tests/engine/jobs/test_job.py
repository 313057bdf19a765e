"""The protocol of long jobs: OUT is absent or whole, and OUT.partial holds what is worth going on with, or is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rac_engine.base import faults
from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.base.files import opened, reserve
from rac_engine.jobs.claim import held
from rac_engine.jobs.job import FileJob, FolderJob

JOURNAL = "rac/journal.jsonl"
AnyJob = FolderJob | FileJob
Kind = type[FolderJob] | type[FileJob]


def begin(job: AnyJob, model: str = "a", restart: bool = False) -> None:
    if isinstance(job, FolderJob):
        job.open_journal(JOURNAL, {"model": model}, restart=restart, stopped=lambda: f"stopped with {job.done} done")
    elif isinstance(job, FileJob):
        job.open_journal({"model": model}, restart=restart, stopped=lambda: f"stopped with {job.done} done")


def finish(job: AnyJob) -> None:
    if isinstance(job, FolderJob):
        (job.partial / "result").write_text("whole")
        job.publish()
    elif isinstance(job, FileJob):
        job.publish(b"whole")


KINDS = pytest.mark.parametrize("kind", [FolderJob, FileJob])


@KINDS
def test_a_job_is_published_and_leaves_nothing_else(tmp_path: Path, kind: Kind) -> None:
    out = tmp_path / "out"
    with kind(out) as job:
        assert job.partial.exists() and not out.exists()
        begin(job)
        finish(job)
    assert [*tmp_path.iterdir()] == [out]
    assert (out / "result" if out.is_dir() else out).read_text() == "whole"
    word = "output folder" if kind is FolderJob else "file"
    with pytest.raises(BadInput, match=f"exists; choose another {word}, or remove it"), kind(out):
        pass


@KINDS
def test_a_claim_that_came_to_nothing_leaves_nothing(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(BadInput), kind(tmp_path / "out"):
        raise BadInput("no such model")
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    with pytest.raises(BadInput), FolderJob(tmp_path / "out") as job:
        (job.partial / "work").touch()
        raise BadInput("disk full")
    assert (tmp_path / "out.partial" / "work").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_folders_made_for_a_file_go_with_it(tmp_path: Path, begun: bool) -> None:
    with pytest.raises(BadInput), FileJob(tmp_path / "a/b/out.json") as job:
        if begun:
            begin(job)
        raise BadInput("no such model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(BadInput), FileJob(tmp_path / "a/b/out.json"):
        raise BadInput("no such model")
    assert [*tmp_path.rglob("*")] == [tmp_path / "a"]


@KINDS
@pytest.mark.parametrize("error", [KeyboardInterrupt, BadInput, OSError, RuntimeError])
def test_what_is_done_stays_and_is_gone_on_with(tmp_path: Path, kind: Kind, error: type[BaseException]) -> None:
    raised = Interrupted if error is KeyboardInterrupt else error
    with pytest.raises(raised), kind(tmp_path / "out") as job:
        begin(job)
        raise error
    assert list(tmp_path.iterdir()) == []  # an identity alone is nothing to go on with
    with pytest.raises(raised) as caught, kind(tmp_path / "out") as job:
        begin(job)
        job.journal.append({"piece": 1})
        raise error
    assert error is not KeyboardInterrupt or str(caught.value) == "stopped with 1 done"
    with pytest.raises(BadInput, match="another model: a, now b"), kind(tmp_path / "out") as job:
        begin(job, "b")
    with kind(tmp_path / "out") as job:
        begin(job)
        assert job.journal.records[1:] == [{"piece": 1}]
        finish(job)
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@KINDS
def test_restart_drops_what_was_done(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(RuntimeError), kind(tmp_path / "out") as job:
        begin(job)
        job.journal.append({"piece": 1})
        raise RuntimeError
    with kind(tmp_path / "out") as job:
        begin(job, "b", restart=True)
        assert job.done == 0
        finish(job)


@pytest.mark.parametrize("worthwhile", [True, False])
def test_a_job_says_itself_what_is_worth_going_on_with(tmp_path: Path, worthwhile: bool) -> None:
    with pytest.raises(Interrupted, match=r"^words$"), FolderJob(tmp_path / "out") as job:
        job.open_journal(JOURNAL, {}, stopped=lambda: "words", worthwhile=lambda: worthwhile)
        raise KeyboardInterrupt
    assert job.partial.exists() is worthwhile


@KINDS
def test_an_interruption_before_the_journal_is_open_is_a_stop_too(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(Interrupted, match=r"^stopped$"), kind(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@KINDS
@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_of_publishing_counts_until_out_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, late: bool
) -> None:
    def rename(source: Path, target: Path) -> None:
        if late:
            os.rename(source, target)
        raise KeyboardInterrupt

    def run() -> None:
        with kind(tmp_path / "out") as job:
            begin(job)
            job.journal.append({"piece": 1})
            finish(job)

    monkeypatch.setattr(faults, "rename", rename)
    if late:
        run()
    else:
        with pytest.raises(Interrupted, match="stopped with 1 done"):
            run()
        monkeypatch.undo()
        run()
    left = {path.name for path in tmp_path.iterdir()} - {"out.tmp"}
    assert left == {"out"}


@KINDS
def test_one_process_works_at_a_time(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(RuntimeError), kind(tmp_path / "out") as job:
        begin(job)
        job.journal.append({"piece": 1})
        raise RuntimeError
    with held(job.partial, job.out), pytest.raises(BadInput, match="another process is working there"):
        kind(tmp_path / "out").__enter__()
    assert job.partial.exists()


@KINDS
def test_what_another_process_finished_between_two_looks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    make: Callable[[Any], None] = kind._make

    def late(job: AnyJob) -> None:
        make(job)
        job.out.write_text(json.dumps({}))

    monkeypatch.setattr(kind, "_make", late)
    with pytest.raises(BadInput, match="another process has just finished it"), kind(tmp_path / "out"):
        pass
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_file_that_somebody_else_makes_meanwhile_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped with 1 done"), FileJob(tmp_path / "out") as job:
        begin(job)
        job.journal.append({"piece": 1})
        job.out.write_text("another's")
        raise KeyboardInterrupt
    assert job.partial.exists()


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int, only_unwritable: bool = False) -> None:
    """A file system whose locks fail with `code`: all of them, or those of files that are open for reading alone."""

    def flock(fd: int, operation: int) -> None:
        if not only_unwritable or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("rac_engine.jobs.claim.fcntl.flock", flock)


@KINDS
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_job_goes_on_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, code: int
) -> None:
    without_locks(monkeypatch, code)
    with kind(tmp_path / "out") as job:
        assert [os.strerror(code) in note and "no lock" in note for note in job.notes] == [True]
        begin(job)
        finish(job)
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_file_is_locked_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS wants it, which refuses others with EBADF."""
    without_locks(monkeypatch, errno.EBADF, only_unwritable=True)
    with FileJob(tmp_path / "out") as job:
        assert job.notes == []
        begin(job)
        finish(job)


@KINDS
def test_a_place_that_cannot_be_locked_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(BadInput, match="cannot be locked"), kind(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems know fsync for files alone, and some reserve no space."""

    def refuse(fd: int, *_: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    def unable(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(faults, "fsync", refuse)
    monkeypatch.setattr(faults, "reserve", unable)
    with FolderJob(tmp_path / "out") as job:
        begin(job)
        with opened(job.partial / "shard", os.O_WRONLY | os.O_CREAT) as fd:
            reserve(fd, 1000)
        finish(job)
    assert (tmp_path / "out/shard").stat().st_size == 1000
