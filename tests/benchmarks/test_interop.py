"""The record of a pruned model in the tools of others: its table, what is skipped, and what it may hold."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "benchmarks/results").glob("interop-*.json"))


@pytest.fixture(scope="module")
def interop() -> Iterator[ModuleType]:
    """benchmarks/interop.py, as a script of its folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import interop

        yield interop
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_has_the_table_of_the_newest_record(interop: ModuleType) -> None:
    record = json.loads(RECORDS[-1].read_text())
    assert record["checks"].keys() == interop.CHECKS.keys()
    assert interop.table(record) in (ROOT / "docs/interop.md").read_text()


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_record_holds_versions_and_no_path_of_a_machine(record: Path) -> None:
    text = record.read_text()
    assert not re.search(r'"[^"]*(?<![\w.])/(tmp|work|home|root|usr|opt)/', text)
    assert all(found["versions"]["torch"] for found in json.loads(text)["checks"].values() if "versions" in found)


def test_a_check_ends_as_done_skipped_or_failed(interop: ModuleType) -> None:
    def skipped() -> dict[str, object]:
        raise interop.Skipped("not installed: no such file /tmp/somewhere/else/x.whl\nat all")

    def failed() -> dict[str, object]:
        raise RuntimeError("exit code 1")

    assert interop.outcome(lambda: {"files": 1})["outcome"] == "done"
    found = interop.outcome(skipped)
    assert found["outcome"] == "skipped" and found["reason"] == "not installed: no such file x.whl at all"
    assert interop.outcome(failed)["outcome"] == "failed"
    record = {"machine": {"date": "2026-11-30", "cpu": "a CPU"}, "checks": {"vllm": found}}
    assert "| vllm | – | skipped: not installed: no such file x.whl at all |" in interop.table(record)
