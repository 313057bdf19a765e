"""The journal: what was appended is there again, what is damaged ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_engine.journal import Journal


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
