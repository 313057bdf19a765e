"""The selection kernel, run on the host (see shim/cuda_runtime.h), against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.host import Program, select


def check(program: Program, scores: list[Tensor], ks: list[int], processors: int = 2) -> None:
    """Groups of scores, one after the other; twice on one state, which must be as new the second time."""
    counts = [len(group) for group in scores]
    for found in select(program, torch.cat(scores), counts, ks, processors):
        assert not found.said
        for group, k, threshold, last in zip(scores, ks, found.thresholds, found.last, strict=True):
            goes = (group < threshold) | ((group == threshold) & (torch.arange(len(group)) <= last))
            wanted = torch.zeros(len(group), dtype=torch.bool)
            wanted[group.sort(stable=True).indices[:k]] = True
            assert torch.equal(goes, wanted)
            if k == 0:
                assert (threshold, last) == (-torch.inf, -1)


def random(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs()


def test_blocks_share_a_group(program: Program) -> None:
    scores = random(10_001)
    check(program, [scores], [5000])


@pytest.mark.parametrize("k", [1, 9_000])
def test_the_ends(program: Program, k: int) -> None:
    check(program, [random(9_000)], [k])


def test_groups_of_all_sizes(program: Program) -> None:
    """More than are resident at once, so in several launches; odd sizes, so that groups begin anywhere."""
    counts = [5000, 1, 77, 0, 256, 257, 4097, 3]
    ks = [2500, 1, 0, 0, 256, 3, 4000, 1]
    check(program, [random(count, seed) for seed, count in enumerate(counts)], ks, processors=3)


@pytest.mark.parametrize("k", [1, 4_000, 8_999])
def test_ties_go_by_position(program: Program, k: int) -> None:
    """A few values, so that the k-th is shared; all of them equal; the block with the last one is not the first."""
    check(program, [(random(9_000) * 4).round() / 4], [k])
    check(program, [torch.ones(9_000)], [k], processors=1)


def test_extreme_values(program: Program) -> None:
    """Zeros of either sign, denormal numbers, neighbours in the last bit, infinities; NaN counts as largest."""
    tiny, one = torch.finfo(torch.float32).smallest_normal, torch.ones(())
    few = [0.0, -0.0, tiny / 2, tiny / 4, tiny, 1.0, float(one.nextafter(2 * one)), 3e38, torch.inf]
    few += [-tiny / 4, -tiny / 2, -1.0, float(-one.nextafter(2 * one)), -3e38, -torch.inf]
    scores = torch.tensor(few).repeat(40)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    check(program, [scores] * 8, [1, 79, 80, 130, 250, 300, 359, 599])
    scores[::3] = torch.nan
    scores[1::30] = -torch.nan
    (found,) = select(program, scores, [600], [300], times=1)
    goes = (scores < found.thresholds[0]) | ((scores == found.thresholds[0]) & (torch.arange(600) <= found.last[0]))
    assert goes.sum() == 300 and scores[goes].max() <= scores[~goes & ~scores.isnan()].min()
    (found,) = select(program, scores, [600], [599], times=1)
    assert torch.tensor(found.thresholds).isnan().all() and found.last == [int(scores.isnan().nonzero()[-2])]
