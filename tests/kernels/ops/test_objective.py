"""objective: the trace, in fp64, from one triangle."""

from __future__ import annotations

import sys

import pytest
import torch

from rac_kernels import (
    factor_,
    objective,
    reported_objective,
    reported_objectives,
    squared_outputs,
    squared_outputs_of,
    sweep,
)
from rac_kernels.testing import gram


@pytest.mark.parametrize("rows, n", [(1, 1), (3, 40), (70, 33), (20, 130)])
def test_against_the_activations_themselves(rows, n, monkeypatch):
    module = sys.modules[objective.__module__]
    monkeypatch.setattr(module, "ROWS_BYTES", 2048)
    monkeypatch.setattr(module, "COLUMNS", 32)
    X = torch.randn(50, n).double()
    W, Q = torch.randn(rows, n).double(), torch.randn(rows, n).double()
    expected = float((X @ (W - Q).T).square().sum())
    H = (X.T @ X).triu() + torch.full((n, n), torch.nan).tril(-1).nan_to_num(nan=1e9)
    assert objective(W, Q, H) == pytest.approx(expected, rel=1e-12)


def test_fp64_from_start_to_end():
    """What fp32 would lose: a small error over a large common part, in weights and in H."""
    H = gram("offset", 200)
    W = torch.randn(30, 200) * 1e4
    Q = W + 1e-3 * torch.randn(30, 200).round(decimals=2)
    D = W.double() - Q.double()
    expected = float(torch.trace(D @ H.double() @ D.T))
    assert objective(W, Q, H) == pytest.approx(expected, rel=1e-10)
    assert objective(W, W, H) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, n", [(1, 1), (70, 33), (9, 300), (0, 3), (3, 0)])
def test_squared_outputs(rows, n, dtype):
    X = torch.randn(50, n, generator=torch.Generator().manual_seed(0)).double()
    W = torch.randn(rows, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    H = (X.T @ X).float()
    assert squared_outputs(W, H.triu() + torch.full_like(H, 1e9).tril(-1)) == pytest.approx(
        float((X @ W.double().T).square().sum()), rel=3e-6
    )


@pytest.mark.parametrize("kind", ["plain", "offset", "low-rank plus noise", "outliers", "dead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reported_objective_of_what_the_sweep_leaves(kind, dtype):
    """Also where so little is left of what the weights that went would cost alone that fp32 does not do."""
    H = gram(kind, 300)
    W = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    Q = sweep(W, factor_(H.clone(), 0.01).U, 0.5).to(dtype)
    upper = H.triu() + torch.full_like(H, torch.nan).tril(-1)
    assert reported_objective(W, Q, upper) == pytest.approx(objective(W, Q, upper), rel=2e-6)


def test_reported_objective_goes_on_in_fp64_where_fp32_has_no_digits_left(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    X, W = 1 + 1e-2 * torch.randn(50, 8, generator=generator), torch.randn(1, 8, generator=generator)
    H, W = X.T @ X, W - W.mean()  # the ones cancel
    expected = float(torch.trace(W.double() @ H.double() @ W.double().T))
    assert reported_objective(W, torch.zeros_like(W), H) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(sys.modules[objective.__module__], "CANCELLED", 1e9)
    assert reported_objective(W, torch.zeros_like(W), H) != pytest.approx(expected, rel=1e-12)
    huge = torch.full((2, 3), 1e30, dtype=torch.bfloat16)
    assert reported_objective(huge, torch.zeros_like(huge), torch.eye(3)) > 1e60
    assert reported_objective(W, W, H) == 0


def test_reported_objectives_by_several_matrices_at_once():
    W, Q, Hs = torch.randn(9, 300), torch.randn(9, 300), [torch.randn(400, 300) for _ in range(2)]
    Hs = [X.T @ X for X in Hs]
    assert reported_objectives(W, Q, Hs) == [reported_objective(W, Q, H) for H in Hs]
    assert reported_objectives(W, Q, Hs) == pytest.approx([objective(W, Q, H) for H in Hs], rel=2e-6)


def test_squared_outputs_by_several_matrices_at_once():
    W = torch.randn(9, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    Hs = [gram("plain", 300), gram("outliers", 300)]
    assert squared_outputs_of(W, Hs) == [squared_outputs(W, H) for H in Hs]


def test_squared_outputs_of_weights_whose_squares_are_beyond_fp32():
    W, H = torch.full((2, 3), 1e30, dtype=torch.bfloat16), torch.eye(3)
    assert squared_outputs(W, H) == objective(W, torch.zeros_like(W), H) > 1e60


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        objective(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="do not fit"):
        objective(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3, 3))


def test_empty():
    assert objective(torch.zeros(0, 3), torch.zeros(0, 3), torch.eye(3)) == 0
    assert objective(torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(0, 0)) == 0
