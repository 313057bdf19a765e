"""Selection: the exact k-th smallest, and masks with exactly as many elements as asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rac_kernels import kth_smallest, mask_by_score
from rac_kernels.ops.pattern import zeros_of
from rac_kernels.testing import CPU_FP32, running


@pytest.fixture(params=CPU_FP32)
def backend(request):
    with running(request.param) as name:
        yield name


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 1000, 100_003])
def test_kth_smallest_is_exact(backend, count):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count))
    ordered = scores.sort().values
    for k in {1, 2, count // 3, count // 2, count - 1, count} - {0}:
        if k <= count:
            assert torch.equal(kth_smallest(scores, k, backend=backend), ordered[k - 1])


def test_kth_smallest_among_special_values(backend):
    scores = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0])
    ordered = scores.sort().values
    for k in range(1, 11):
        assert kth_smallest(scores, k, backend=backend) == ordered[k - 1]
    assert kth_smallest(torch.tensor([torch.nan, 2.0, 1.0]), 2, backend=backend) == 2


def test_kth_smallest_of_any_shape_and_dtype(backend):
    scores = torch.randn(40, 30)[::3, ::2]
    assert kth_smallest(scores, 17, backend=backend) == scores.flatten().sort().values[16]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found = kth_smallest(scores.to(dtype), 17, backend=backend)
        assert found.dtype == dtype and found == scores.to(dtype).flatten().sort().values[16]


@pytest.mark.parametrize("k", [0, 11])
def test_k_outside_the_scores(k):
    with pytest.raises(ValueError, match="k ="):
        kth_smallest(torch.zeros(10), k)


FLOATS = hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=False))


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.data())
def test_kth_smallest_of_anything(values, data):
    k = data.draw(st.integers(1, len(values)))
    assert float(kth_smallest(torch.from_numpy(values), k)) == np.sort(values)[k - 1]


MATRICES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
    elements=st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 10, width=32)),
)


@settings(max_examples=100, deadline=None)
@given(
    MATRICES,
    st.floats(0, 1),
    st.sampled_from(["row", "matrix"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from(["auto", "reference"]),
)
def test_masks_hold_the_smallest_and_the_first(values, sparsity, per, dtype, backend):
    scores = torch.from_numpy(values).to(dtype)
    mask = mask_by_score(scores, sparsity, per=per, backend=backend)
    flat = scores.reshape(1, -1) if per == "matrix" else scores
    k, rows = zeros_of(sparsity, scores.numel()), len(flat)
    expected = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(rows):  # of the first rows together their share of k
        first = flat[row].sort(stable=True).indices[: (row + 1) * k // rows - row * k // rows]
        expected[row, first] = True
    assert torch.equal(mask, expected.view_as(scores))


@settings(max_examples=100, deadline=None)
@given(MATRICES, st.integers(1, 5), st.data())
def test_pattern_masks(values, group, data):
    keep = data.draw(st.integers(1, group))
    scores = torch.from_numpy(np.repeat(values, group, axis=1)) * torch.rand(
        values.shape[0], values.shape[1] * group
    ).round(decimals=1)
    mask = mask_by_score(scores, pattern=(keep, group))
    split = scores.unflatten(1, (-1, group))
    order = split.sort(dim=2, stable=True).indices[..., : group - keep]
    expected = torch.zeros_like(split, dtype=torch.bool).scatter_(2, order, True).flatten(1)
    assert torch.equal(mask, expected)


def test_pruning_by_a_mask_leaves_positive_zeros():
    W = -torch.rand(8, 8)
    pruned = W.masked_fill(mask_by_score(W.abs(), 0.5, per="matrix"), 0)
    assert (pruned == 0).sum() == 32 and not (pruned.signbit() & (pruned == 0)).any()


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)])
@pytest.mark.parametrize("per", ["row", "matrix"])
def test_empty(shape, per):
    assert mask_by_score(torch.empty(shape), 0.5, per=per).shape == shape
    assert mask_by_score(torch.empty(shape), pattern="2:4").shape == shape


def test_rows_make_up_the_zeros_of_the_matrix_and_differ_by_one():
    """floor(.6 · 576) = 345 of every row would leave 59.9% zeros."""
    mask = mask_by_score(torch.rand(192, 576, generator=torch.Generator().manual_seed(0)), 0.6)
    assert int(mask.sum()) == int(0.6 * 192 * 576)
    assert set(mask.sum(1).tolist()) == {345, 346}
    assert abs(int(mask[:96].sum()) - int(mask[96:].sum())) <= 1  # spread, not all at one end


def test_non_contiguous_scores():
    scores = torch.arange(24.0).view(4, 6).T
    assert torch.equal(mask_by_score(scores, 0.5, per="matrix"), mask_by_score(scores.contiguous(), 0.5, per="matrix"))
    ties = torch.ones(4, 6).T
    assert torch.equal(mask_by_score(ties, 0.5, per="matrix"), torch.arange(24).view(6, 4) < 12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": -0.1}, "between 0 and 1"),
        ({"pattern": "0:4"}, "0:4"),
        ({"pattern": "2:3"}, "whole groups of 3"),
        ({"per": "column"}, "'row' or 'matrix'"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_by_score(torch.zeros(2, 8), **arguments)
    with pytest.raises(ValueError, match="NaN"):
        mask_by_score(torch.full((2, 8), torch.nan))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1 << 40), st.data())
def test_a_share_gives_back_the_count_it_was_made_of(count, data):
    k = data.draw(st.integers(0, count))
    assert zeros_of(k / count, count) == k


@pytest.mark.parametrize("count", [100, 1000, 49_152])
def test_counts_are_of_the_decimal_number_that_was_written(count):
    """int(.29 * 100) is 28."""
    for hundredths in range(101):
        assert zeros_of(hundredths / 100, count) == hundredths * count // 100
