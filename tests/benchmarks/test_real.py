"""The benchmark on real weights: its prompts, what it measures, and its table."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    """benchmarks/real.py, as a script of its folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import real

        yield real
    finally:
        sys.path.remove(str(BENCHMARKS))


def prompts_of(split: str, count: int, *more: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(BENCHMARKS / "real_prompts.py"), "--split", split, "--count", str(count)]
    return subprocess.run([*script, *more], capture_output=True, text=True, timeout=60)


def test_prompts_are_the_same_each_time_and_splits_share_none(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, str]]] = {}
    for split in ("calibration", "held-out"):
        files = [tmp_path / f"{split}-{n}.jsonl" for n in range(2)]
        for file in files:
            assert prompts_of(split, 150, "--out", str(file)).returncode == 0
        assert files[0].read_bytes() == files[1].read_bytes()
        found[split] = [json.loads(line) for line in files[0].read_text().splitlines()]
        texts = [prompt["prompt"] for prompt in found[split]]
        assert len(set(texts)) == len(texts) == 150
        kinds = [prompt["kind"] for prompt in found[split]]
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
            ("arithmetic", "question", "instruction"), 50
        )
    assert not {p["prompt"] for p in found["calibration"]} & {p["prompt"] for p in found["held-out"]}


def test_more_prompts_than_there_are_end_in_an_error(tmp_path: Path) -> None:
    done = prompts_of("held-out", 5000, "--out", str(tmp_path / "p.jsonl"))
    assert done.returncode == 1 and "different prompts were found" in done.stderr


def test_a_process_is_measured_with_its_children(real: ModuleType, tmp_path: Path) -> None:
    child = "x = bytearray(60 << 20); import time; t = time.process_time()\nwhile time.process_time() < t + 0.4: pass"
    program = f"import subprocess, sys; x = bytearray(60 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "log").open("w") as log:
        usage = real.measured([sys.executable, "-c", program], dict(os.environ), log)
        assert usage.processor > 0.4 and usage.wall > 0.4
        assert 120 << 20 < usage.peak < 220 << 20  # of both, which no one process has; and not of this one
        with pytest.raises(subprocess.CalledProcessError):
            real.measured([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), log)


def test_divergence_and_perplexity(real, checkpoint):
    folder = checkpoint("llama")
    sequences = tiny.calibration(part="completion").sequences[:3]
    counted = [torch.as_tensor(s.weights)[1:] > 0 for s in sequences]
    states, head = real.states(folder, {"seen": sequences})
    same = real.compared(sequences, (states["seen"], head), (states["seen"], head))
    assert same["kl"] == 0 and same["tokens"] == sum(int(own.sum()) for own in counted)
    logits = [hidden.float() @ head.T for hidden in states["seen"]]
    losses = [
        -float(logits[n][t].log_softmax(-1)[sequence.token_ids[t + 1]])
        for n, sequence in enumerate(sequences)
        for t in range(len(sequence.token_ids) - 1)
        if counted[n][t]
    ]
    assert same["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    flat = real.compared(sequences, (states["seen"], head), (states["seen"], head * 0))
    assert flat["kl"] > 0 and flat["perplexity"] == pytest.approx(len(head), rel=1e-4)


def test_the_page_has_the_table_of_the_newest_record(real: ModuleType) -> None:
    records = sorted((BENCHMARKS / "results").glob("real-*.json"))
    assert real.table(json.loads(records[-1].read_text())) in (BENCHMARKS / "README.md").read_text()


def test_a_table_compares_runs_in_pairs(real: ModuleType) -> None:
    quality = {kind: {"tokens": 9, "kl": 0.25, "kl_error": 0.01, "perplexity": 7.0} for kind in real.MEASURED}
    job = {"method": "sparsegpt", "sparsity": "0.5", "sparsity_reached": 0.5, "quality": quality, "peak": 1 << 30}
    record = {
        "machine": {"threads": 2},
        "dense": quality,
        "limit": {"seconds": 5.0, "kinds": {"forward": {"seconds": 5.0}}},
        "jobs": [
            {**job, "tool": tool, "run": run, "wall": wall, "processor": 2 * wall}
            for run in (0, 1)
            for tool, wall in ((real.OURS, 10.0), (real.PEER, 40.0 + run))
        ],
    }
    text = real.table(record)
    assert "| sparsegpt, 0.5 | RAC Engine | 10.0, 10.0 | 20, 20 | 1024, 1024 | 50.00% | 0.250 ± 0.010 |" in text
    assert "processor 4.00, 4.10" in text and "took 2.0, 2.0 times that" in text
