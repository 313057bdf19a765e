"""The benchmark of decoding: the forms of a model, what is measured of each, and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def decode() -> Iterator[ModuleType]:
    """benchmarks/decode.py, as a script of its folder."""
    folders = [str(BENCHMARKS), str(BENCHMARKS / "peers")]
    sys.path[:0] = folders
    try:
        import decode

        yield decode
    finally:
        for folder in folders:
            sys.path.remove(folder)


@pytest.mark.parametrize("script", ["decode_peers", "interop_peers"])
def test_scripts_of_other_environments_start(script: str) -> None:
    """They run by themselves, where nothing of this project is on the path."""
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(BENCHMARKS / "peers" / f"{script}.py"), "--help"]
    assert "--given" in subprocess.run(command, env=around, check=True, capture_output=True, text=True).stdout


def test_every_form_is_made_once_and_measured(decode: ModuleType, tmp_path: Path) -> None:
    import decode_peers

    models = decode.Models(argparse.Namespace(work=tmp_path))
    folders = models.warm()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert models.warm() == folders and made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dense = load_file(folders["bf16"] / "model.safetensors")
    shares = [float((W == 0).float().mean()) for name, W in dense.items() if W.ndim == 2 and ".layers." in name]
    assert len(shares) == 7 and all(0.695 < share < 0.72 for share in shares)
    sizes = [decode.weight_bytes(folder) for folder in folders.values()]
    assert sizes == sorted(sizes, reverse=True) and list(folders) == ["bf16", "same", "int8", "int4"]
    given = {"batches": [1, 3], "prompt": 5, "tokens": 4, "threads": 1, "vocabulary": decode.TINY["vocab_size"]}
    for values in ("bf16", "int4"):
        told = given | {"packed": values != "bf16", "warm": str(folders[values])}
        found = decode_peers.transformers(folders[values], told)
        assert [row["batch"] for row in found["batches"]] == [1, 3] and found["used"] >= 0
        assert all(row["first"] > 0 and row["step"] > row["linear"] > 0 for row in found["batches"])


def test_the_table_says_what_is_slower(decode: ModuleType) -> None:
    def form(values: str, *steps: float) -> dict[str, object]:
        rows = [{"batch": batch, "first": 0.5, "step": step, "linear": step / 2} for batch, step in enumerate(steps)]
        late = [row | {"step": 99.0} for row in rows]
        runs = [{"loaded": 3 << 20, "batches": batches} for batches in (rows, late, rows)]
        return {"engine": "transformers", "values": values, "file": 2 << 20, "runs": runs}

    record = {
        "machine": {"date": "2026-11-30", "cpu": "a CPU", "threads": 2},
        **{"sparsity": 0.7, "batches": [1, 4], "prompt": 128, "tokens": 32, "repeats": 3},
        "skipped": {"vllm": "no --environments"},
        "models": [{"name": "m", "forms": [form("bf16", 0.02, 0.04), form("int4", 0.01, 0.05)]}],
    }
    text = decode.table(record)
    assert "| m | transformers, bf16 | 2.0 | 3.0 | 50, 100 |  | 500, 500 | 20.0, 40.0 | 10.00, 20.00 |" in text
    assert "| m | transformers, int4 | 2.0 | 3.0 | 100, 80 | 2.00, 0.80 |" in text
    assert "Without vllm: no --environments." in text
    assert "Slower than dense: m, transformers, int4 at batch 4 (0.80 times dense)." in text


def test_an_engine_without_environment_is_skipped(decode: ModuleType) -> None:
    assert decode.python_of("transformers", None) == Path(sys.executable)
    with pytest.raises(decode.Skipped, match="no --environments"):
        decode.python_of("llama.cpp", None)


def test_the_page_has_the_table_of_the_newest_record(decode: ModuleType) -> None:
    page = (BENCHMARKS / "README.md").read_text()
    assert page.index(decode.BEGIN) < page.index(decode.END)
    for record in sorted((BENCHMARKS / "results").glob("decode-*.json"))[-1:]:
        assert decode.table(json.loads(record.read_text())) in page
