"""A whole pruning job on a GPU: as good as on the CPU, the same bytes each time, and on from where it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tests.gpu.engine")  # skips where one of the engine's packages is missing

from safetensors.torch import load_file

from rac_engine.base.errors import Interrupted
from rac_engine.engine.closing import PruneReport
from rac_engine.engine.pruning import prune
from rac_engine.recipe.settings import PruneSettings
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = [("admm", None), ("sparsegpt", "2:4"), ("alps", None), ("wanda", None), ("magnitude", None)]


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    first, second = load(one), load(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run(source: Path, out: Path, device: str, method: str = "admm", pattern: str | None = None) -> PruneReport:
    chosen: dict[str, Any] = {"method": method, "pattern": pattern}
    settings = PruneSettings(**chosen, chunk_tokens=64, block_size=16)
    return prune(source, out, settings, tiny.calibration(), device=device)


@pytest.mark.parametrize(("method", "pattern"), METHODS)
def test_as_good_as_on_a_cpu(tmp_path: Path, method: str, pattern: str | None) -> None:
    source = tiny.save(tmp_path / "model", "qwen2", dtype=torch.float32)
    reports = [run(source, tmp_path / device, device, method, pattern) for device in ("cpu", "cuda")]
    before, after = load(source), load(tmp_path / "cuda")
    for mine, theirs in zip(*(report.matrices for report in reports), strict=True):
        assert mine["name"] == theirs["name"]
        count = after[mine["name"]].numel()
        assert int((after[mine["name"]] == 0).sum()) == count // 2
    sums = [sum(row["objective"] for row in report.matrices if row.get("objective")) for report in reports]
    assert sums[1] == pytest.approx(sums[0], rel=0.05)
    assert before.keys() == after.keys()


def test_the_same_bytes_again_and_after_a_stop(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model", "llama")
    for name in ("one", "two"):
        run(source, tmp_path / name, "cuda")
    assert same(tmp_path / "one", tmp_path / "two")
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith("layer 2"):
            raise Interrupted("stopped by the test")

    settings = PruneSettings(method="admm", chunk_tokens=64, block_size=16)
    with pytest.raises(Interrupted):
        prune(source, tmp_path / "three", settings, tiny.calibration(), device="cuda", progress=stop)
    run(source, tmp_path / "three", "cuda")
    assert same(tmp_path / "one", tmp_path / "three")
