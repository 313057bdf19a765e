"""The benchmark of packed products: its record on a tiny shape, and its table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed() -> Iterator[ModuleType]:
    """benchmarks/packed.py, as a script of its folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import packed

        yield packed
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_record_of_a_tiny_shape_and_its_place_in_a_page(
    packed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    page.write_text(f"before\n\n{packed.BEGIN}\n\nold\n\n{packed.END}\n\nafter\n")
    monkeypatch.setattr(packed, "COPIES", 2)
    monkeypatch.setattr(packed.written, "product", lambda: None)  # compiles for seconds
    sizes = ["--shapes", "24x64", "--sparsities", "0.7", "--tokens", "1", "5", "--repeats", "2"]
    for options in ([*sizes, "--out", str(record)], ["--table", str(record), "--into", str(page)]):
        monkeypatch.setattr(sys, "argv", ["packed.py", *options])
        packed.main()
    cells = json.loads(record.read_text())["cells"]
    assert [(cell["shape"], cell["sparsity"], cell["tokens"]) for cell in cells] == [([24, 64], 0.7, n) for n in (1, 5)]
    for cell in cells:
        assert {"same", "int8", "int4", packed.TORCH} <= cell["seconds"].keys() == cell["rounded"].keys()
        assert all(len(found) == 2 for found in cell["seconds"].values())
        assert all(float(error) < 1e-2 for error in cell["rounded"].values())
        assert cell["bytes"]["dense"] == 24 * 64 * 2
    shown = page.read_text()
    assert shown.startswith("before") and shown.endswith("after\n") and "old" not in shown
    assert "| 24 × 64 | 70% | 5 |" in shown and "- same, 70% zeros, a token: " in shown


def test_the_fastest_dense_product_is_the_rival(packed: ModuleType) -> None:
    seconds = {"same": [0.002, 0.001, 0.009], "int8": [0.004], "int4": [0.001]}
    seconds |= {packed.TORCH: [0.008, 0.009, 0.001], packed.ONEDNN: [0.004, 0.001, 0.005]}
    cell: dict[str, Any] = {"shape": [3, 4], "sparsity": 0.7, "tokens": 1, "seconds": seconds}
    assert packed.line(cell) == "| 3 × 4 | 70% | 1 | 4.00 | oneDNN | 2.00 (2.00) | 4.00 (1.00) | 1.00 (4.00) |"
    machine = {"date": "2026-12-01", "cpu": "a CPU", "native": {"isa": "avx2"}, "threads": 1}
    shown = packed.table({"machine": machine, "cells": [cell]})
    assert "- same, 70% zeros, a token: 2.00, target 1.8, met" in shown
    assert "- int4, 70% zeros, a token: 4.00, target 2.2, met" in shown
    assert "same, 50%" not in shown and "2026-12-01, a CPU, native kernels for avx2, threads: 1" in shown


def test_rounds_end_with_their_seconds(packed: ModuleType) -> None:
    calls = [0]

    def product() -> None:
        calls[0] += 1

    assert len(packed.timed({"same": product}, 5, 60)["same"]) == 5 and calls == [6]
    assert len(packed.timed({"same": product}, 5, 0)["same"]) == 1
