"""Jobs whose kept weights are to be on a grid: what is written, noted, verified and planned, and that tuning stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import PruneSettings
from rac_kernels import pack, unpack
from tests import tiny


def pruned(folder: Path, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[str]]:
    """Tensors, rows of the matrices and notes of a job on a tiny model."""
    source = tiny.save(folder / "source")
    asked = {"chunk_tokens": 64, "values": "int4", **changes}
    report = prune(source, folder / "out", PruneSettings(**asked), tiny.calibration())
    assert verify(folder / "out").problems == []
    files = (folder / "out").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return tensors, report.matrices, report.end["notes"]


def on_grid(weight: Tensor, row: dict[str, Any]) -> bool:
    group = row["values"]["group"]
    return torch.equal(unpack(pack(weight, row["values"]["kind"], group=group)), weight)


@pytest.mark.parametrize(
    "changes", [{}, {"tune": 2}, {"values": "int8", "pattern": "1:4", "tune": 1}, {"sparsity": 0.0}]
)
def test_weights_are_written_on_their_grid(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, rows, notes = pruned(tmp_path, **changes)
    assert all(on_grid(tensors[row["name"]], row) for row in rows) and rows
    assert all(row["zeros"] == int((tensors[row["name"]] == 0).sum()) for row in rows)
    assert all(row["lost"] >= 0 and row["values"]["added_error"] < 0.1 for row in rows)
    assert sum("tuned" in row for row in rows) == (len(rows) if "tune" in changes or "pattern" in changes else 0)
    assert any("became zero" in note and "off by rounding" in note for note in notes)
    assert "kept values int" in (tmp_path / "out/README.md").read_text()


def test_a_matrix_that_is_named_stays_as_it_is(tmp_path: Path) -> None:
    tensors, rows, _ = pruned(tmp_path, dense=["down_proj"])
    for row in rows:
        assert ("values" in row) != ("down_proj" in row["module"])
    source = {n: t for file in (tmp_path / "source").glob("*.safetensors") for n, t in load_file(file).items()}
    name = next(row["name"] for row in rows if "values" not in row)
    assert torch.equal(tensors[name], source[name])


def test_other_values_are_refused() -> None:
    with pytest.raises((BadInput, ValueError), match="values"):
        PruneSettings.model_validate({"values": "int3"})


def test_a_plan_shows_what_rounding_takes(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source")
    plans = [make_plan(source, PruneSettings(values=kind), tokens=1000) for kind in ("same", "int4")]
    names = [[work.name for work in each.work] for each in plans]
    assert names[1] == [*names[0], "rounding"]
