"""A batch that is stopped goes on from where its last snapshot was, to the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rac_engine.base import faults
from rac_engine.base.errors import Interrupted
from rac_engine.evaluation.job import evaluate
from rac_engine.recipe.settings import EvalSettings, TraceSettings
from rac_engine.traces import snapshot
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.generation import generate
from rac_engine.traces.sampling import Progress, Request, Sampling, request_key
from rac_engine.traces.snapshot import Snapshots
from tests.engine.traces.test_decode import requests, save

ABACUS = Path(__file__).parents[3] / "examples/abacus"
PROMPTS = ABACUS.parent / "problems/calibration.jsonl"
HOT = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9)


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "EVERY", 0.0)
    monkeypatch.setattr(snapshot, "SHARE", 1e9)
    monkeypatch.setattr(faults, "fsync", lambda _: None)  # behind every step, a disk would be waited for


class Steps:
    """Counts steps, by what is called for progress, and stops behind one of them by an exception."""

    def __init__(self, stop: int | None, error: type[BaseException]) -> None:
        self.taken, self._stop, self._error = 0, stop, error

    def __call__(self, _: object) -> None:
        self.taken += 1
        if self.taken == self._stop:
            raise self._error


def steps(decoder: Decoder, asked: list[Request], stop: int | None = None) -> tuple[list[Any], int]:
    """Completions, and the steps that were taken; stops behind a step by an exception."""
    count = Steps(stop, Stop)
    return decoder.decode(asked, HOT, 3, count), count.taken


# One with a sliding window, one with experts, and two with recurrent mixers.
@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_moe", "lfm2", "nemotron_h"])
@pytest.mark.parametrize("stop", [1, 12])
def test_a_stopped_batch_goes_on_to_the_same_tokens(tmp_path: Path, family: str, stop: int) -> None:
    decoder = Decoder(save(tmp_path / "m", family, end=[7, 9]))
    whole, every = steps(decoder, requests())
    decoder.snapshots = Snapshots(tmp_path / "s", {"job": 1})
    with pytest.raises(Stop):
        steps(decoder, requests(), stop)
    again, rest = steps(decoder, requests())
    assert again == whole and rest == every - stop
    assert decoder.snapshots.seconds > 0


def test_a_snapshot_of_something_else_or_a_damaged_one_is_none(tmp_path: Path) -> None:
    decoder = Decoder(save(tmp_path / "m"))
    asked = requests()
    decoder.snapshots = Snapshots(tmp_path / "s", {"job": 1})
    with pytest.raises(Stop):
        steps(decoder, asked, 10)
    kept = (tmp_path / "s").read_bytes()

    def begins_anew(job: int = 1, asked: list[Request] = asked) -> bool:
        (tmp_path / "t").write_bytes(kept)
        decoder.snapshots = Snapshots(tmp_path / "t", {"job": job})
        reached = 0

        def first(at: Progress) -> None:
            nonlocal reached
            reached = at.tokens
            raise Stop

        with pytest.raises(Stop):
            decoder.decode(asked, HOT, 3, first)
        return reached == 3

    assert not begins_anew()
    assert begins_anew(job=2)
    assert begins_anew(asked=[Request(each.prompt, request_key(9, str(n), 0)) for n, each in enumerate(asked)])
    whole, kept = kept, kept[:-100]
    assert begins_anew()
    middle = len(whole) // 2
    kept = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    assert begins_anew()


def test_a_disk_without_room_is_done_without_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(save(tmp_path / "m"))
    whole, _ = steps(decoder, requests())
    decoder.snapshots = Snapshots(tmp_path / "s", {})
    faults.arm("fail:write:2:ENOSPC")
    try:
        assert steps(decoder, requests())[0] == whole
    finally:
        faults.arm("")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_there_is_a_snapshot_at_times_that_its_size_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    now = 1000.0
    monkeypatch.setattr("rac_engine.traces.snapshot.time.monotonic", lambda: now)
    snapshots = Snapshots(tmp_path / "s", {}, _last=now)
    for seconds, nbytes, due in ((29, 1, False), (31, 1, True), (31, 10**9, False), (210, 10**9, True)):
        now = 1000.0 + seconds
        assert snapshots.due(lambda nbytes=nbytes: nbytes) is due  # type: ignore[misc]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def interrupt(after: int) -> Steps:
    return Steps(after, KeyboardInterrupt)


def test_traces_go_on_within_their_batch(tmp_path: Path) -> None:
    asked = TraceSettings(prompts=PROMPTS, tokens=600, samples=2, max_new_tokens=12)
    generate(ABACUS, asked, tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"stopped with 0 of 600 tokens and a batch as it was \d"):
        generate(ABACUS, asked, tmp_path / "t", progress=interrupt(11))
    assert (tmp_path / "t.partial/under-way").exists()
    taken: list[object] = []
    generate(ABACUS, asked, tmp_path / "t", progress=taken.append)
    assert rows(tmp_path / "t") == rows(tmp_path / "whole") and not list(tmp_path.rglob("*under-way*"))
    with pytest.raises(Interrupted):
        generate(ABACUS, asked, tmp_path / "u", progress=interrupt(11))
    more: list[object] = []
    generate(ABACUS, asked, tmp_path / "u", progress=more.append, restart=True)
    assert len(more) == len(taken) + 11


def test_answers_go_on_within_their_batch(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(5)))
    asked = EvalSettings(problems=file, max_new_tokens=20)
    whole = evaluate(ABACUS, asked, tmp_path / "whole.json")
    for restart in (False, True):
        out = tmp_path / f"{restart}.json"
        with pytest.raises(Interrupted, match="stopped with 0 of 5 answers and a batch as it was"):
            evaluate(ABACUS, asked, out, progress=interrupt(7))
        assert (tmp_path / f"{restart}.json.partial.under-way").exists()
        taken: list[object] = []
        assert evaluate(ABACUS, asked, out, progress=taken.append, restart=restart).rows == whole.rows
        assert (len(taken) == 20) is restart
        assert not list(tmp_path.glob("*partial*"))
