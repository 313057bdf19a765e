"""Sparsities that differ from matrix to matrix: the rules, the total, and the first pass that they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.engine import survey
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.jobs.layout import ALLOCATION
from rac_engine.plan.plan import make_plan
from rac_engine.plan.text import render
from rac_engine.recipe.files import build
from rac_engine.recipe.settings import PruneSettings
from rac_engine.solve.allocation import levelled, settled, within, zeros_at
from rac_kernels import score_profile
from tests import tiny
from tests.engine.engine.test_engine import contents

Make = Callable[..., Path]


def settings(**changes: Any) -> PruneSettings:
    return build(PruneSettings, {"method": "sparsegpt", "chunk_tokens": 64, "block_size": 16, **changes})


def test_levelled_costs_are_equal_and_add_up() -> None:
    torch.manual_seed(0)
    peaked = torch.randn(200, 64) * torch.logspace(0, -0.5, 64)  # some inputs cost less
    matrices = [torch.randn(200, 64), peaked, 1000 * peaked]
    profiles = [score_profile(matrix, torch.ones(64)) for matrix in matrices]
    flat, first, second = levelled(profiles, 0.5, 0.25)
    assert first == pytest.approx(second, abs=0.01)  # scale does not matter
    assert 0.25 < flat < 0.47 < 0.5 < first < 0.75
    assert (flat + first + second) / 3 == pytest.approx(0.5, abs=1e-6)
    costs = [
        (m.square() / m.square().sum()).flatten().quantile(s) for m, s in zip(matrices, (flat, first), strict=False)
    ]
    assert float(costs[0] / costs[1]) == pytest.approx(1, abs=0.1)
    narrow = levelled(profiles, 0.5, 0.02)
    assert min(narrow) == pytest.approx(0.48) and max(narrow) <= 0.52 + 1e-12


def test_an_input_that_saw_nothing_gets_the_models_sparsity() -> None:
    torch.manual_seed(0)
    profiles = [score_profile(torch.randn(8, 8), torch.full((8,), h)) for h in (0.0, 1.0)]
    assert levelled(profiles, 0.5, 0.1) == pytest.approx([0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.1), (0.03, 0.1), (0.95, 0.08), (0.0, 0.1)])
def test_no_matrix_is_dense_below_nothing_or_all_gone(sparsity: float, most: float) -> None:
    low, high = within(sparsity, most)
    assert 0 <= low <= sparsity <= high < 1
    assert high - sparsity <= most + 1e-12


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda", "alps"])
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_zeros_add_up_to_the_models_sparsity(method: str, sparsity: float) -> None:
    """Within 0.01% of the weights, though every method rounds down by matrix, block or row."""
    draw = torch.rand(24, generator=torch.Generator().manual_seed(1)).tolist()
    shapes = [[(192, 192), (96, 192)], [(192, 512)], [(512, 192), (512, 192)]] * 8
    rough = [sparsity - 0.05 + 0.1 * each for each in draw]
    shares = settled(rough, shapes, method, 128, sparsity, 0.08)
    weights = sum(rows * columns for group in shapes for rows, columns in group)
    zeros = sum(
        zeros_at(method, share, rows, columns, 128)
        for share, group in zip(shares, shapes, strict=True)
        for rows, columns in group
    )
    assert abs(zeros - sparsity * weights) <= 1e-4 * weights
    low, high = within(sparsity, 0.08)
    assert all(low - 1e-9 <= share <= high + 1e-9 for share in shares)


def larger(checkpoint: Make) -> Path:
    return checkpoint("qwen2", hidden_size=96, intermediate_size=192, num_hidden_layers=4, shard_size="10MB")


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda"])
def test_an_allocated_model_is_as_sparse_as_asked_for_and_verifies(
    checkpoint: Make, tmp_path: Path, method: str
) -> None:
    source, out = larger(checkpoint), tmp_path / "out"
    overrides = [{"modules": r".*layers\.1\.mlp\.up_proj", "sparsity": 0.2}]
    wanted = settings(method=method, sparsity=0.6, allocation="error", overrides=overrides, dense=[".*0.*o_proj"])
    report = prune(source, out, wanted, tiny.calibration())
    rows = [row for row in report.matrices if "skipped" not in row and row["target"]["sparsity"] != 0.2]
    assert len(rows) == 26
    weights = sum(row["rows"] * row["columns"] for row in rows)
    zeros = sum(row["zeros"] for row in rows)
    assert abs(zeros - 0.6 * weights) <= 1e-4 * weights
    reach = wanted.allocation_reach
    targets = [row["target"]["sparsity"] for row in rows]
    assert all(0.6 - reach - 1e-9 <= target <= 0.6 + reach + 1e-9 for target in targets)
    assert max(targets) - min(targets) > 0.02
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["target"]["sparsity"], abs=0.011)
    assert verify(out, source).problems == []
    assert any(note.startswith("allocation error: sparsities from") for note in report.end["notes"])
    assert "60% unstructured, allocated by error, 1 override" in (out / "README.md").read_text()


def test_a_mixture_is_allocated_too(checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prune(checkpoint("mixtral"), out, settings(allocation="error"), tiny.calibration())
    targets = {row["target"]["sparsity"] for row in report.matrices if "expert" in row}
    assert len(targets) > 2
    assert verify(out, checkpoint("mixtral")).problems == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_job_stopped_behind_the_first_pass_goes_on_without_another(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    source, calibration, wanted = larger(checkpoint), tiny.calibration(), settings(allocation="error")
    expected = prune(source, tmp_path / "whole", wanted, calibration)
    passes = []
    original = survey._survey

    def counted(*args: Any) -> Any:
        passes.append(1)
        return original(*args)

    monkeypatch.setattr(survey, "_survey", counted)

    def stopped(_: object) -> None:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises((Interrupted, RuntimeError)):
        patch.setattr("rac_engine.engine.loop.prune_layer", stopped)
        prune(source, out, wanted, calibration)
    file = tmp_path / "out.partial" / ALLOCATION
    assert file.exists()
    prune(source, out, wanted, calibration)
    assert len(passes) == 1
    assert contents(out) == contents(expected.out)


def test_a_damaged_allocation_is_made_again(checkpoint: Make, tmp_path: Path) -> None:
    file = tmp_path / "allocation.json"
    content = {"identity": "i", "sparsities": {"a": 0.5}, "zeros": 1, "weights": 2}
    file.write_text(json.dumps({**content, "sha256": survey._digest(content)}))
    found = survey._read(file, "i")
    assert found is not None and found.sparsities == {"a": 0.5}
    assert survey._read(file, "of another job") is None
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert survey._read(file, "i") is None
    file.write_text("[]")
    assert survey._read(file, "i") is None
    assert survey._read(tmp_path / "none", "i") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"allocation": "error", "pattern": "2:4"}, "not for a pattern"),
        ({"allocation": "error", "method": "magnitude"}, "needs a method with calibration"),
        ({"allocation": "best"}, "should be 'uniform' or 'error'"),
    ],
)
def test_what_cannot_be_allocated_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        settings(**changes)


def test_the_plan_has_the_first_pass(checkpoint: Make) -> None:
    plain = make_plan(larger(checkpoint), settings(), tokens=1000)
    plan = make_plan(larger(checkpoint), settings(allocation="error"), tokens=1000)
    assert plan.memory.phases[1].name == "first pass"
    assert "first pass" in render(plan)
    first = next(work.flops for work in plan.work if work.name == "first pass")
    own = {work.name: work.flops for work in plain.work}
    assert first == pytest.approx(own["forward"] + own["attention"], rel=0.05)
    assert math.isclose(sum(w.flops for w in plan.work) - first, sum(own.values()))
