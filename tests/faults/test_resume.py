"""Going on is for the same job alone, and for one process at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rac_engine.jobs.claim import held
from tests.faults.conftest import Bench
from tests.faults.world import Job

JOBS = ("prune", "trace", "eval", "run")


def stop_half_way(bench: Bench, job: Job) -> None:
    last = len(bench.points[job.name]) - 4
    assert bench.run(job, f"kill:any:{last}:before") == -signal.SIGKILL


@contextmanager
def changed(file: Path, old: bytes, new: bytes) -> Iterator[None]:
    before = file.read_bytes()
    assert old in before
    file.write_bytes(before.replace(old, new))
    try:
        yield
    finally:
        file.write_bytes(before)


def refused(bench: Bench, job: Job, said: str, threads: int = 1) -> None:
    assert bench.run(job, threads=threads) == 2
    (line,) = [line for line in bench.said.splitlines() if line.startswith("rac: ")]
    assert f"holds an unfinished job with another {said}" in line and "--restart" in line


@pytest.mark.parametrize("name", JOBS)
def test_another_number_of_threads_is_refused(bench: Bench, name: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    refused(bench, job, "machine.threads: 1, now 2", threads=2)
    assert bench.mended(job) == ""


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("prune", "--sparsity 0.25", "settings.sparsity: 0.5, now 0.25"),
        ("trace", "--seed 5", "settings.seed: 0, now 5"),
        ("eval", "--seed 5", "seed: 0, now 5"),
    ],
)
def test_other_settings_are_refused_and_restart_starts_afresh(bench: Bench, name: str, words: str, said: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    assert bench.run(job, "", *words.split()) == 2
    assert f"holds an unfinished job with another {said}; " in bench.said
    assert bench.run(job, "", *words.split(), "--restart") == 0
    assert bench.problem(job) != ""


@pytest.mark.parametrize("name", JOBS)
def test_another_source_is_refused(bench: Bench, name: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    shard = sorted((bench.folder / "model").glob("*.safetensors"))[0]
    data = shard.read_bytes()
    with changed(shard, data[-40:], bytes(data[-40:-1]) + bytes([data[-1] ^ 1])):
        refused(bench, job, "model: ")
    assert bench.mended(job) == ""


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("prune", "text.txt", "calibration: "),
        ("trace", "problems.jsonl", "prompts: "),
        ("eval", "problems.jsonl", "problems: "),
        ("run", "text.txt", "calibration of text: "),
        ("run", "problems.jsonl", "prompts: "),
    ],
)
def test_other_inputs_are_refused(bench: Bench, name: str, file: str, said: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    text = bench.folder / file
    with changed(text, b"fox", b"dog") if file == "text.txt" else changed(text, b"Add 1 and 1", b"Add 1 and 2"):
        refused(bench, job, said)
    assert bench.mended(job) == ""


@pytest.mark.parametrize("name", JOBS)
def test_a_second_process_is_refused_at_once(bench: Bench, name: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    partial = bench.folder / f"{job.out}.partial"
    before = sorted(partial.rglob("*"))
    with held(partial, bench.folder / job.out):
        assert bench.run(job) == 2
        assert "another process is working there" in bench.said
        assert bench.run(job, "", "--restart") == 2
    assert sorted(partial.rglob("*")) == before
    assert bench.mended(job) == ""


@pytest.mark.parametrize("name", JOBS)
def test_the_newest_record_damaged_the_one_before_serves(bench: Bench, name: str) -> None:
    job = bench.jobs[name]
    stop_half_way(bench, job)
    partial = bench.folder / f"{job.out}.partial"
    journal = {
        "prune": partial / "rac/journal.jsonl",
        "trace": partial / "journal.jsonl",
        "eval": partial,
        "run": partial / "rac/steps.jsonl",
    }[name]
    size = os.path.getsize(journal)
    data = bytearray(journal.read_bytes())
    assert data.count(b"\n") >= 2
    data[size - 10] ^= 1
    journal.write_bytes(data)
    assert bench.mended(job) == ""


@pytest.mark.parametrize("name", JOBS)
def test_a_second_process_is_refused_before_anything_is_read(bench: Bench, name: str) -> None:
    """It would hash a model for minutes, and then be told so: one that has no model any more is told the same."""
    job = bench.jobs[name]
    stop_half_way(bench, job)
    partial, model = bench.folder / f"{job.out}.partial", bench.folder / "model"
    model.rename(bench.folder / "moved")
    try:
        with held(partial, bench.folder / job.out):
            assert bench.run(job) == 2
        assert "another process is working there" in bench.said
    finally:
        (bench.folder / "moved").rename(model)
    assert bench.mended(job) == ""


@pytest.mark.parametrize("name", JOBS)
def test_a_disk_too_small_is_known_before_the_work(bench: Bench, name: str) -> None:
    job = bench.jobs[name]
    assert bench.run(job, free=(4 << 20) + 10) == 2
    assert "more are needed on this disk" in bench.said
    assert not (bench.folder / job.out).exists()
    assert bench.mended(job) == ""
