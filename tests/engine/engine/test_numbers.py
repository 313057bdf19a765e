"""Numbers that go wrong: what becomes of a matrix then, and that it is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.calibrate.statistics import Statistic
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.recipe.settings import PruneSettings
from rac_engine.solve import MatrixResult, Target, prune_matrices, prune_matrix
from rac_engine.solve.method import Solution
from rac_engine.solve.methods import find_method
from rac_engine.solve.outputs import Outputs
from rac_engine.traces.calibration import TokenSequence
from tests import tiny

COLUMNS = 32
METHODS = ("sparsegpt", "admm", "alps")


def solve(inputs: Tensor, method: str = "sparsegpt", weight: Tensor | None = None, **options: Any) -> MatrixResult:
    """Prune a random matrix to half, calibrated on the tokens `inputs` [tokens, columns]."""
    torch.manual_seed(1)
    weight = torch.randn(24, inputs.shape[1]) if weight is None else weight
    statistic = Statistic(inputs.shape[1], True, "cpu")
    statistic.add(inputs, None)
    (result,) = prune_matrices([weight], statistic.value, method, Target(block_size=16), **options)
    return result


def tokens(count: int = 200) -> Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(2))


def is_pruned(result: MatrixResult) -> bool:
    return bool(result.weight.isfinite().all()) and result.zeros == result.weight.numel() // 2 and not result.skipped


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "inputs",
    [
        tokens(1),
        tokens(COLUMNS // 2),
        tokens()[:, :1].expand(-1, COLUMNS).contiguous(),
        torch.cat([torch.ones(200, COLUMNS // 2), tokens()[:, COLUMNS // 2 :]], dim=1),
        tokens() * torch.logspace(-16, 16, COLUMNS),
        tokens() * torch.where(torch.arange(COLUMNS) == 5, 1e4, 1.0),
        tokens() * 1e-20,
    ],
    ids=["one token", "fewer tokens than columns", "rank one", "constant columns", "range", "outlier", "tiny"],
)
def test_hard_hessians_are_pruned_by_the_solver(inputs: Tensor, method: str) -> None:
    result = solve(inputs, method)
    assert is_pruned(result)
    assert result.damping is not None and result.damping <= 1
    assert result.relative_error is not None and result.magnitude_error is not None
    # Damping may have been raised or the solver have been worse: then that is said.
    assert (result.damping > 0.01) == any("damping raised from 0.01 to" in note for note in result.notes)
    assert (result.relative_error > result.magnitude_error) == any("worse than magn" in note for note in result.notes)


@pytest.mark.parametrize("method", METHODS)
def test_a_column_whose_squares_underflow_counts_as_dead(method: str) -> None:
    inputs = (tokens() * torch.where(torch.arange(COLUMNS) == 5, 1e-24, 1.0)).bfloat16()
    statistic = Statistic(COLUMNS, True, "cpu")
    statistic.add(inputs, None)
    H = statistic.value
    assert H[5, 5] == 0 and H[5, 6:].any()
    result = prune_matrix(torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(1)), H, method)
    assert is_pruned(result)
    assert result.relative_error is not None and result.relative_error < 0.5
    if method != "alps":  # which knows no dead columns
        assert (result.weight[:, 5] == 0).all()
        assert any(note.startswith("1 of 32 inputs are always zero, or too small to square") for note in result.notes)


def test_rank_deficient_hessians_are_better_than_magnitude_all_the_same() -> None:
    result = solve(tokens(COLUMNS // 2), "admm")
    assert result.relative_error is not None and result.magnitude_error is not None
    assert result.relative_error < 0.5 * result.magnitude_error


@pytest.mark.parametrize(("unseen", "share"), [("dense", 0.0), ("magnitude", 0.5)])
@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (torch.zeros(50, COLUMNS), "no calibration token reached it"),
        (tokens() * torch.logspace(-20, 20, COLUMNS), "its inputs are beyond fp32 when squared"),
    ],
    ids=["all zero", "1e-20 to 1e20"],
)
def test_inputs_that_say_nothing(inputs: Tensor, why: str, unseen: Any, share: float) -> None:
    result = solve(inputs, unseen=unseen)
    assert result.zeros == share * result.weight.numel()
    assert (result.skipped or result.notes[0].removesuffix(": pruned by magnitude")) == why


def test_tokens_with_nan_or_inf_are_left_out_and_counted() -> None:
    inputs = tokens()
    spoilt = inputs.clone()
    spoilt[3, 4], spoilt[9, 0] = torch.inf, torch.nan
    whole, part = Statistic(COLUMNS, True, "cpu"), Statistic(COLUMNS, True, "cpu")
    whole.add(inputs[[index for index in range(200) if index not in (3, 9)]], None)
    part.add(spoilt, torch.ones(200))
    assert (part.dropped, part.tokens) == (2, 198)
    torch.testing.assert_close(part.value, whole.value)


def test_dense_outputs_that_are_not_finite_are_not_matched() -> None:
    cross = torch.full((COLUMNS, 24), torch.inf)
    result = solve(tokens(), "admm", outputs=Outputs(cross, [torch.inf], [1.0]))
    assert is_pruned(result) and result.notes == ["the dense model's outputs are not finite: not matched"]
    assert result.relative_error == solve(tokens(), "admm").relative_error


def test_damping_is_raised_by_the_stated_schedule_and_never_to_the_identity() -> None:
    """A rank-one H is not definite with next to no damping: ten times more until it is, and the note says which."""
    inputs = tokens()[:, :1].expand(-1, COLUMNS).contiguous()
    H = torch.triu(inputs.T @ inputs)
    (result,) = prune_matrices([torch.randn(8, COLUMNS)], H, "sparsegpt", Target(damping=1e-8, block_size=16))
    assert result.damping is not None
    assert any(result.damping == pytest.approx(10**-power) for power in (7, 6, 5, 4, 3))
    assert [note for note in result.notes if note.startswith("not positive definite: damping raised from 1e-08 to")]


def test_a_result_that_is_not_finite_is_replaced_by_magnitude_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 holds no more than 65504; a solver's correction can go beyond."""
    real = find_method

    def broken(name: str) -> Any:
        method = real(name)
        if name != "sparsegpt":
            return method
        return replace(method, solve=lambda problem: Solution(problem.weights.float() * 1e6, 0.01))

    monkeypatch.setattr("rac_engine.solve.matrices.find_method", broken)
    result = solve(tokens(), weight=torch.randn(24, COLUMNS).half())
    assert is_pruned(result) and result.weight.dtype == torch.float16
    assert "the solver's result is not finite: pruned by magnitude" in result.notes
    assert result.relative_error == result.magnitude_error


def test_a_solver_that_is_worse_than_magnitude_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_method

    def bad(name: str) -> Any:
        method = real(name)
        solve = (
            method.solve if name != "sparsegpt" else lambda problem: Solution(torch.zeros_like(problem.weights), 1.0)
        )
        return replace(method, solve=solve)

    monkeypatch.setattr("rac_engine.solve.matrices.find_method", bad)
    (note,) = solve(tokens()).notes
    assert note.startswith("worse than magnitude pruning: relative error 1, by magnitude 0.")


@pytest.mark.parametrize("nonfinite", ["refuse", "dense"])
def test_a_model_with_nan_is_pruned_around_it_if_asked(
    checkpoint: Callable[..., Path], tmp_path: Path, nonfinite: Any
) -> None:
    """The token that meets it spoils its sequence from there on; the others calibrate, and the report counts."""
    source = Path(shutil.copytree(checkpoint("qwen2", shard_size="1GB"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    wanted = PruneSettings(method="sparsegpt", block_size=16, chunk_tokens=64, nonfinite=nonfinite)
    if nonfinite == "refuse":
        with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj\.weight' holds NaN or Inf"):
            prune(source, tmp_path / "out", wanted, tiny.calibration())
        return
    report = prune(source, tmp_path / "out", wanted, tiny.calibration())
    rows = {row["name"]: row for row in report.matrices}
    assert rows[name]["skipped"] == "holds NaN or Inf"
    assert rows["model.layers.0.mlp.down_proj.weight"]["notes"] == []
    after = rows["model.layers.2.mlp.up_proj.weight"]
    assert after.get("skipped") == "no calibration token reached it" or "NaN or Inf" in after["notes"][0]
    assert verify(tmp_path / "out", source).problems == []


def test_few_tokens_are_said_in_the_report(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    wanted = PruneSettings(method="sparsegpt", block_size=16, chunk_tokens=64)
    report = prune(checkpoint("qwen2"), tmp_path / "out", wanted, tiny.calibration([1]))
    assert report.matrices[0]["notes"][0] == "1 tokens for 48 inputs: damping alone makes H definite"
    assert verify(tmp_path / "out", checkpoint("qwen2")).problems == []


@pytest.mark.parametrize("reconstruct", ["dense", "residual"])
def test_a_token_that_is_not_finite_counts_nowhere(
    checkpoint: Callable[..., Path], tmp_path: Path, reconstruct: Any
) -> None:
    """Its embedding is Inf, in sequences that no other token is in: all else is as if these were not there."""
    folder = shutil.copytree(checkpoint("qwen2", dtype=torch.float32), tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][7, 3] = torch.inf
            save_file(tensors, file, {"format": "pt"})
    clean = tiny.calibration((40, 30, 22))
    ids = [np.where(sequence.token_ids == 7, 8, sequence.token_ids) for sequence in clean.sequences]
    settings = PruneSettings(method="admm", reconstruct=reconstruct, nonfinite="dense", chunk_tokens=64)
    found = {}
    for name in ("without", "counted", "weightless"):
        weights = np.zeros(1, np.float32) if name == "weightless" else None
        spoilt = [] if name == "without" else [TokenSequence(np.array([7]), 0, weights)] * 3
        sequences = [replace(sequence, token_ids=own) for sequence, own in zip(clean.sequences, ids, strict=True)]
        sequences += spoilt
        report = prune(folder, tmp_path / name, settings, replace(clean, sequences=sequences))
        found[name] = [row for row in report.matrices if "skipped" not in row]
    assert len(found["without"]) == 21
    for name in ("counted", "weightless"):
        for row, expected in zip(found[name], found["without"], strict=True):
            assert row["objective"] == pytest.approx(expected["objective"], rel=1e-3), row["name"]
            dropped = [note for note in row["notes"] if "NaN or Inf" in note]
            assert dropped == (["3 tokens hold NaN or Inf and were left out"] if name == "counted" else [])
            assert not any("not matched" in note for note in row["notes"])
