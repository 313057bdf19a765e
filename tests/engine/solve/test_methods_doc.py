"""The method that docs/methods.md shows is a method once its file lies beside the others, with nothing else touched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rac_engine.engine.card import model_card
from rac_engine.plan.phases import Machine
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.files import load_recipe
from rac_engine.recipe.settings import PruneSettings
from rac_engine.solve import methods
from rac_engine.solve.allocation import zeros_at
from rac_engine.solve.matrices import prune_matrix
from rac_engine.solve.methods import find_method, method_names
from tests.engine.outputs import metrics_lines

DOC = Path(__file__).parents[3] / "docs" / "methods.md"


@pytest.fixture
def chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the method, whose file is found as if it lay in the folder of methods."""
    found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "chance.py").write_text(found[1])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "rac_engine.solve.methods.chance", raising=False)
    assert method_names()[:3] == ["admm", "alps", "chance"]
    return "chance"


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_example_is_a_method(pattern: str | None, chance: str) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(300, 32) @ torch.randn(32, 32), torch.randn(16, 32)
    result = prune_matrix(W, x.T @ x, chance, 0.5, pattern)
    assert result.zeros == W.numel() // 2
    assert result.relative_error is not None and 0 < result.relative_error < 1
    assert result.iterations
    assert zeros_at(chance, 0.3, 7, 9, 4) == 18


def test_recipes_know_the_example(chance: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nprune: {method: chance, pattern: 1:4, allocation: uniform}\n")
    settings = load_recipe(tmp_path / "r.yaml").prune
    assert (settings.method, settings.reconstructs, settings.epochs, settings.reorders) == (chance, "layer", 0, False)
    assert PruneSettings(method=chance, reconstruct="dense", tune=2).epochs == 2  # it has a Hessian
    with pytest.raises(ValueError, match="did you mean 'chance'"):
        PruneSettings(method="chence")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_plan_counts_the_example(chance: str, checkpoint: Callable[..., Path], on_gpu: bool) -> None:
    folder = checkpoint(hidden_size=512, intermediate_size=2048, num_hidden_layers=1)
    plan = make_plan(folder, PruneSettings(method=chance), tokens=1000, machine=Machine(on_gpu))
    names = [work.name for work in plan.work]
    assert names == ["forward", "attention", "Hessian", "factor", "mask and weights"]
    sizes = [(512, 1024), (512, 512), (512, 4096), (2048, 512)]  # columns and rows of qkv, o, gate and up, down
    assert plan.work[-1].flops == sum(22 * 2 * rows * n * n for n, rows in sizes)
    assert plan.work[-1].rule == "22 · 2 · rows · n² at most"
    others = make_plan(folder, PruneSettings(method="sparsegpt"), tokens=1000, machine=Machine(on_gpu))
    solving, usual = (
        next(phase for phase in made.memory.phases if phase.name == "solve mlp.gate_proj, mlp.up_proj")
        for made in (plan, others)
    )
    part = "fp32 working copies"
    taken = (solving.device if on_gpu else solving.host)[part]
    assert taken > (usual.device if on_gpu else usual.host)[part] > 0


@pytest.mark.parametrize("method", [*method_names(), "chance"])
def test_a_card_names_the_knobs_that_the_method_has(method: str, chance: str) -> None:
    run, *matrices, _ = metrics_lines()
    run["settings"] = PruneSettings(method=method, sparsity=0.5).model_dump(mode="json")
    card = model_card({**run, "matrices": matrices})
    found = find_method(method)
    assert f"set to zero by {found.title}" in card and f"| Method | {found.title}, " in card
    (line,) = (line for line in card.splitlines() if line.startswith("| Method"))
    assert ("damping 0.01" in line) == ("damping" in found.knobs) == (found.needs == "hessian")
    assert ("block size 128" in line) == ("block_size" in found.knobs) == (method == "sparsegpt")


def test_a_card_says_what_the_example_does(chance: str) -> None:
    run, *matrices, _ = metrics_lines()
    run["settings"] = PruneSettings(method=chance).model_dump(mode="json")
    said = "set to zero by random masks, the weights that stay fitted by least squares, calibrated on"
    assert said in model_card({**run, "matrices": matrices})


def test_a_card_of_a_method_that_is_not_here_has_its_name() -> None:
    run, *matrices, _ = metrics_lines()
    run["settings"]["method"] = "rac"
    assert "set to zero by rac, calibrated" in model_card({**run, "matrices": matrices})


def test_every_method_is_called_as_its_file_is() -> None:
    for name in method_names():
        assert find_method(name).name == name
