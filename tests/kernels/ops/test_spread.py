"""Orders of columns in which a pattern costs least."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rac_kernels import pattern_order, spread_columns
from rac_kernels.ops import spread


def kept(scores: Tensor, keep: int, size: int) -> float:
    return float(scores.unflatten(1, (-1, size)).topk(keep, dim=2).values.double().sum())


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "1:2", "3:8", "4:4"])
@pytest.mark.parametrize("shape", [(1, 8), (33, 64), (700, 24), (5, 0)], ids=str)
def test_it_is_an_order_in_which_no_less_is_kept(pattern: str, shape: tuple[int, int]) -> None:
    keep, size = map(int, pattern.split(":"))
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).square()
    before = scores.clone()
    order = spread_columns(scores, pattern)
    assert torch.equal(scores, before)
    assert sorted(order.tolist()) == list(range(shape[1]))
    assert torch.equal(spread_columns(scores, pattern), order)
    dealt = scores.sum(0).argsort(descending=True, stable=True).view(size, -1).T.flatten()
    assert kept(scores[:, order], keep, size) >= kept(scores[:, dealt], keep, size) * (1 - 1e-6)


@pytest.mark.parametrize("pattern", ["1:2", "2:4"])
def test_no_exchange_of_two_columns_keeps_more(pattern: str) -> None:
    keep, size = map(int, pattern.split(":"))
    scores = torch.randn(20, 16, generator=torch.Generator().manual_seed(1)).square()
    order = spread_columns(scores, pattern)
    best = kept(scores[:, order], keep, size)
    assert best > 1.02 * kept(scores, keep, size)
    for i, j in itertools.combinations(range(16), 2):
        other = order.clone()
        other[[i, j]] = order[[j, i]]
        assert kept(scores[:, other], keep, size) <= best * (1 + 1e-4)


def test_columns_that_stand_in_each_others_way_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is one of four columns that are large together: at best there is one of each four in a group."""
    scores = torch.eye(16).repeat_interleave(4, 1) + 0.01
    for columns in (1024, 16):  # looked at all together, and a few groups at a time
        monkeypatch.setattr(spread, "COLUMNS", columns)
        order = spread_columns(scores, "1:4")
        assert kept(scores[:, order], 1, 4) > 0.9 * float(scores.sum() * 64 / 80)


@pytest.mark.parametrize(("columns", "pattern"), [(6, "1:4"), (8, None), (8, "4:2")])
def test_a_pattern_that_does_not_fit_is_refused(columns: int, pattern: str | None) -> None:
    with pytest.raises(ValueError, match="pattern"):
        spread_columns(torch.ones(3, columns), pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8), (33, 64), (5, 0)], ids=str)
def test_weights_are_ordered_by_what_their_outputs_lose(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(2)
    W, norms = torch.randn(shape, generator=draw).to(dtype), torch.rand(shape[1], generator=draw)
    before, also = W.clone(), norms.clone()
    order = pattern_order(W, norms, "2:4")
    assert torch.equal(W, before) and torch.equal(norms, also)
    assert torch.equal(order, spread_columns(W.float() * W.float() * norms, "2:4"))
    if shape == (33, 64):
        assert not torch.equal(order, pattern_order(W, torch.ones(shape[1]), "2:4"))
