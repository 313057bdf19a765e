"""The journal: what was appended is there again, what is damaged ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.jobs.journal import Journal, open_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(4):
        journal.append({"number": number, "text": "ä\n\r\x0b" * number})
    return journal.path


def numbers(path: Path) -> list[int]:
    return [record["number"] for record in Journal(path).records]


def test_records_come_back(path: Path) -> None:
    assert Journal(path).records == [{"number": n, "text": "ä\n\r\x0b" * n} for n in range(4)]


def test_every_way_of_cutting_it_short_leaves_the_whole_records(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert numbers(path) == list(range(whole[:size].count(b"\n")))
        assert path.stat().st_size == sum(len(line) for line in whole[:size].splitlines(True) if line.endswith(b"\n"))


def test_damage_drops_a_record_and_those_behind_it(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[-5] ^= 1
    path.write_bytes(b"".join([*lines[:2], bytes(damaged), lines[3]]))
    journal = Journal(path)
    assert [record["number"] for record in journal.records] == [0, 1]
    journal.append({"number": 7})
    assert numbers(path) == [0, 1, 7]


def test_cut_and_go_on(path: Path) -> None:
    journal = Journal(path)
    journal.cut(1)
    journal.append({"number": 9})
    assert numbers(path) == [0, 9]


def test_a_damaged_first_record_clears_nothing(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "rac/journal.jsonl", {"model": "a"})
    journal.append({"layer": 0})
    (tmp_path / "model.safetensors").write_bytes(b"hours of work")
    data = bytearray(journal.path.read_bytes())
    data[50] ^= 1
    journal.path.write_bytes(data)
    with pytest.raises(BadInput, match="first record is damaged"):
        open_journal(tmp_path, "rac/journal.jsonl", {"model": "a"})
    assert journal.path.read_bytes() == data and (tmp_path / "model.safetensors").exists()
    open_journal(tmp_path, "rac/journal.jsonl", {"model": "a"}, restart=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_first_record_cut_off_in_its_writing_is_none(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "journal.jsonl", {"model": "a"})
    journal.path.write_bytes(journal.path.read_bytes()[:30])
    assert open_journal(tmp_path, "journal.jsonl", {"model": "b"}).records == [{"job": {"model": "b"}}]


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    identity = {"model": "a", "settings.sparsity": 0.5, "code.native": "1"}
    assert open_journal(tmp_path, "journal.jsonl", identity, beside={"rule": "x"}).records == [
        {"job": identity, "rule": "x"}
    ]
    with pytest.raises(BadInput) as refused:
        open_journal(
            tmp_path, "journal.jsonl", {"model": "a", "settings.sparsity": 0.25, "extra": 7}, beside={"rule": "y"}
        )
    said = str(refused.value)
    for part in ("settings.sparsity: 0.5, now 0.25", "another code.native: 1, now None", "another extra: None, now 7"):
        assert part in said
    assert "model" not in said.partition("holds")[2] and "\n" not in said
