"""sweep: never worse than the published loop, exact counts, and what it leaves alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import factor_, objective, sweep
from rac_kernels.backends import native
from rac_kernels.measure.published import sparsegpt
from rac_kernels.testing import CPU, CPU_FP32, KINDS, Poisoned, gram, running


@pytest.fixture(params=CPU_FP32)
def backend(request):
    with running(request.param) as name:
        yield name


def weights(rows: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_group(Q: Tensor, group: int) -> Tensor:
    """Nonzeros in each group of columns."""
    return (Q != 0).unflatten(1, (-1, group)).sum(2)


def as_good(Q: Tensor, W: Tensor, H: Tensor, *how: Any) -> bool:
    """Whether Q is as good as what the published loop makes of W, `how` being its arguments after H.

    Two things that no fp32 result can be blamed for are allowed: an ulp in every weight, which counts where H spans
    more than fp32 does; and near ties, that is what the loop itself makes of an H that differs by half an ulp.
    """
    ulp = float(((Q.double() * 2**-23).square() @ H.double().diagonal()).sum())
    found = objective(W, Q, H) - ulp
    g = torch.Generator().manual_seed(0)
    for nudge in [0.0] + 12 * [2**-24]:
        noise = torch.randn(H.shape, generator=g, dtype=torch.float64).triu()
        nudged = H.double() * (1 + nudge * (noise + noise.triu(1).T))
        if found <= 1.001 * objective(W, sparsegpt(W, nudged, *how), H):
            return True
    return False


CASES = [
    (40, 300, 0.3, None, 128),
    (97, 300, 0.5, None, 128),
    (33, 200, 0.5, None, 64),
    (5, 300, 0.8, None, 128),
    (33, 256, 0.5, (2, 4), 128),
    (33, 252, 0.5, (2, 4), 64),
    (50, 256, 0.5, (4, 8), 64),
    (50, 256, 0.5, (4, 8), 128),
    (1, 256, 0.5, (1, 4), 128),
    (49, 300, 0.5, (5, 12), 60),
    (20, 256, 0.5, (20, 32), 64),
]


@cache
def published(kind: str, rows: int, n: int, sparsity: float, pattern: tuple[int, int] | None, block: int) -> float:
    """The published loop's objective on gram(kind, n) and weights(rows, n)."""
    H, W = gram(kind, n), weights(rows, n)
    return objective(W, sparsegpt(W, H, sparsity, pattern, block), H)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, n, sparsity, pattern, block", CASES)
def test_objective_against_the_published_loop_in_fp64(backend, kind, rows, n, sparsity, pattern, block):
    H, W = gram(kind, n), weights(rows, n)
    factor = factor_(H.clone())
    Q = sweep(W, factor.U, sparsity, pattern, block, factor.dead, backend=backend)
    assert objective(W, Q, H) <= 1.001 * published(kind, rows, n, sparsity, pattern, block)
    assert (Q[:, factor.dead] == 0).all()
    if pattern:
        assert (in_group(Q, pattern[1]) <= pattern[0]).all()


@pytest.mark.parametrize("sparsity, pattern", [(0.6, None), (0.5, (2, 4))])
def test_reference_in_fp64_is_the_published_loop(sparsity, pattern):
    H, W = gram("correlated", 200), weights(30, 200)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(200)
    U = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    Q = sweep(W, U, sparsity, pattern, 64, backend="reference")
    wanted = sparsegpt(W, H, sparsity, pattern, 64)
    assert Q.dtype == torch.float64
    assert torch.equal(Q == 0, wanted == 0)
    torch.testing.assert_close(Q, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_exact_count_in_every_block(backend, sparsity):
    W, U = weights(53, 300), factor_(gram("plain", 300)).U
    Q = sweep(W, U, sparsity, block_size=128, backend=backend)
    for lo, hi in ((0, 128), (128, 256), (256, 300)):
        assert int((Q[:, lo:hi] == 0).sum()) == int(sparsity * 53 * (hi - lo))


def test_row_groups_are_sweeps_of_their_own(backend):
    U = factor_(gram("correlated", 200)).U
    W = torch.cat([weights(50, 200), 100 * weights(7, 200, 1), 0.01 * weights(64, 200, 2)])
    stacked = sweep(W, U, 0.5, row_groups=[50, 7, 0, 64], backend=backend)
    parts = [sweep(part, U, 0.5, backend=backend) for part in W.split([50, 7, 64])]
    torch.testing.assert_close(stacked, torch.cat(parts), rtol=0, atol=0 if backend == "native" else 1e-4)
    assert [int((part == 0).sum()) for part in stacked.split([50, 7, 64])] == [50 * 100, 7 * 100, 64 * 100]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_pruned_gives_the_weights_back(backend, dtype):
    W, U = weights(50, 150, dtype=dtype), factor_(gram("plain", 150)).U
    assert torch.equal(sweep(W, U, 0.0, backend=backend), W.float())
    assert torch.equal(sweep(W, U, pattern="3:3", backend=backend), W.float())


def test_everything_pruned(backend):
    Q = sweep(weights(50, 150), factor_(gram("plain", 150)).U, 1.0, backend=backend)
    assert torch.equal(Q.view(torch.int32), torch.zeros(50, 150, dtype=torch.int32))  # and no −0.0


def test_zeros_are_positive(backend):
    W = weights(20, 64)
    W[:, ::3] = -0.0
    Q = sweep(W, torch.eye(64), 0.5, backend=backend)
    assert not (Q.signbit() & (Q == 0)).any()
    Q = sweep(W, torch.eye(64), pattern="2:4", backend=backend)
    assert not (Q.signbit() & (Q == 0)).any()


@pytest.mark.parametrize("groups", [None, [20, 30, 50]])
def test_ties_go_by_position(backend, groups):
    W = torch.ones(100, 40)
    Q = sweep(W, torch.eye(40), 0.33, block_size=16, row_groups=groups, backend=backend)
    for block in Q.split(16, 1):
        for part in block.split(groups or [100]):
            k = int(0.33 * part.numel())
            assert (part.reshape(-1)[:k] == 0).all() and (part.reshape(-1)[k:] == 1).all()
    Q = sweep(W, torch.eye(40), pattern="3:5", backend=backend)
    assert torch.equal(Q[0].view(8, 5), torch.tensor([0.0, 0, 1, 1, 1]).expand(8, 5))


def test_many_zero_weights_are_no_ties_lost(backend):
    W = weights(60, 128) * (weights(60, 128, 1) > 0)  # half are zero, more than go
    Q = sweep(W, torch.eye(128), 0.25, backend=backend)
    assert torch.equal(Q, W)


@pytest.mark.parametrize(
    "rows, n, block", [(1, 1, 128), (1, 300, 128), (300, 1, 128), (17, 5, 128), (49, 131, 7), (3, 9, 1)]
)
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_odd_shapes(backend, rows, n, block, sparsity):
    H, W = gram("plain", n), weights(rows, n)
    Q = sweep(W, factor_(H.clone()).U, sparsity, block_size=block, backend=backend)
    assert objective(W, Q, H) <= 1.001 * published("plain", rows, n, sparsity, None, block)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)])
def test_empty(backend, shape):
    assert sweep(torch.empty(shape), torch.eye(shape[1]), backend=backend).shape == shape


def test_strides_and_poison(backend):
    """Nothing is read beyond the views, below U's diagonal, or in dead columns that is not a number to prune by."""
    H = gram("dead", 130)
    factor = factor_(H.clone())
    W = weights(70, 130, dtype=torch.bfloat16)
    expected = sweep(W, factor.U, 0.5, dead=factor.dead, backend=backend)
    store_w, store_u = torch.full((90, 300), torch.nan, dtype=torch.bfloat16), torch.full((140, 150), torch.nan)
    store_w[10:80, 20:280:2] = W
    store_u[3:133, 4:134] = factor.U.triu() + torch.full_like(H, torch.nan).tril(-1).nan_to_num(nan=7e30)
    Q = sweep(store_w[10:80, 20:280:2], store_u[3:133, 4:134], 0.5, dead=factor.dead, backend=backend)
    assert torch.equal(Q, expected)
    columns = sweep(W.T.contiguous().T, factor.U.T.contiguous().T, 0.5, dead=factor.dead, backend=backend)
    torch.testing.assert_close(columns, expected)
    assert torch.equal(W, weights(70, 130, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (49, 33), (50, 149)])
def test_weights_that_are_not_finite_are_refused(backend, bad, at):
    W = weights(51, 150)
    W[at] = bad
    with pytest.raises(ValueError, match="NaN or infinities"):
        sweep(W, torch.eye(150), backend=backend)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": float("nan")}, "between 0 and 1"),
        ({"pattern": "5:4"}, "5:4"),
        ({"pattern": "2-4"}, "N:M"),
        ({"pattern": "2:7"}, "whole groups of 7"),
        ({"block_size": 0}, "block_size"),
        ({"row_groups": [3, 4]}, "add up to 8"),
        ({"row_groups": [9, -1]}, "add up to 8"),
        ({"dead": torch.zeros(9, dtype=torch.bool)}, "must be"),
        ({"U": torch.eye(15)}, "must be"),
        ({"U": torch.eye(16).bfloat16()}, "must be"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep(weights(8, 16), **{"U": torch.eye(16), **arguments})


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 120),
    n=st.integers(1, 260),
    sparsity=st.floats(0, 1),
    block=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    cut=st.integers(0, 120),
    seed=st.integers(0, 99),
)
@example(rows=55, n=259, sparsity=0.5386534783827378, block=55, kind="low-rank plus noise", cut=0, seed=0)  # a near tie
def test_any_unstructured_sweep(rows, n, sparsity, block, kind, cut, seed):
    H, W, cut = gram(kind, n, seed), weights(rows, n, seed), min(cut, rows)
    factor = factor_(H.clone())
    Q = sweep(W, factor.U, sparsity, None, block, factor.dead, [cut, rows - cut])
    for part, original in ((Q[:cut], W[:cut]), (Q[cut:], W[cut:])):
        for lo in range(0, n, block):
            columns = slice(lo, min(lo + block, n))
            zeros, dead = int((part[:, columns] == 0).sum()), int(factor.dead[columns].sum()) * len(part)
            assert zeros == max(int(sparsity * part[:, columns].numel()), dead)
        assert as_good(part, original, H, sparsity, None, block)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 120),
    groups=st.integers(1, 40),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (1, 3), (7, 16), (1, 1), (9, 10)]),
    block=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_pattern(rows, groups, pattern, block, kind, seed):
    n = groups * pattern[1]
    H, W = gram(kind, n, seed), weights(rows, n, seed)
    factor = factor_(H.clone())
    Q = sweep(W, factor.U, 0.5, pattern, block, factor.dead)
    most = torch.minimum(torch.tensor(pattern[0]), (~factor.dead).view(-1, pattern[1]).sum(1))
    assert torch.equal(in_group(Q, pattern[1]), most.expand(rows, -1))
    assert as_good(Q, W, H, 0.5, pattern, max(block // pattern[1], 1) * pattern[1])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    groups=st.integers(0, 40),
    pattern=st.sampled_from([None, (2, 4), (1, 3)]),
    block=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    turned=st.tuples(st.booleans(), st.booleans()),
    name=st.sampled_from(CPU_FP32[1:] or CPU_FP32),
)
def test_any_strides_and_dtype(rows, groups, pattern, block, dtype, steps, turned, name):
    """As if both were contiguous and W fp32, bit for bit; the reference's sums are torch's, of whatever order."""
    turned = turned if name != "reference" else (False, False)
    n = groups * (pattern[1] if pattern else 3)
    W, U = weights(rows, n, dtype=dtype), factor_(gram("correlated", n)).U
    below = torch.ones(n, n, dtype=torch.bool).tril(-1)
    strange_w, strange_u = Poisoned(W, turned[0], steps).view, Poisoned(U.masked_fill(below, 7e30), turned[1]).view
    with running(name) as backend:
        Q = sweep(strange_w, strange_u, 0.6, pattern, block, backend=backend)
        wanted = sweep(W.float(), U, 0.6, pattern, block, backend=backend)
    assert Q.dtype == torch.float32 and torch.equal(Q, wanted)
    assert torch.equal(strange_w, W)


def added_by_rounding(Q: Tensor, W: Tensor, U: Tensor) -> float:
    """The share of ‖(W − Q) U‖² that is in weights that stay: without rounding they are where nothing is left."""
    left = ((W.double() - Q.double()) @ U.triu().double()).square()
    return float(left[Q != 0].sum() / left.sum())


@pytest.mark.skipif("avx512bf16" not in native.info().get("isas", []), reason="needs AVX512-BF16")
@pytest.mark.parametrize(
    "kind, damping, pattern, block",
    [(kind, 0.01, None, 128) for kind in KINDS]
    + [("low-rank plus noise", 1e-5, None, 128), ("plain", 0.01, (2, 4), 128), ("plain", 0.01, None, 77)],
)
def test_bf16_products_add_no_more_than_they_may(kind, damping, pattern, block):
    W = weights(1100, 600)
    factor = factor_(gram(kind, 600), damping)
    W[:, factor.dead] = 0
    with native.use_isa("avx512bf16"):
        Q = sweep(W, factor.U, 0.5, pattern, block)
    with native.use_isa("avx512"):
        fp32 = sweep(W, factor.U, 0.5, pattern, block)
    assert added_by_rounding(Q, W, factor.U) < 1e-4
    assert added_by_rounding(fp32, W, factor.U) < 1e-10
    if kind == "plain":  # where all of the product may go through bf16
        assert added_by_rounding(Q, W, factor.U) > 1e-7
        H = gram(kind, 600)
        assert objective(W, Q, H) <= 1.001 * objective(W, fp32, H)


@pytest.mark.skipif("avx512bf16" not in native.info().get("isas", []), reason="needs AVX512-BF16")
def test_row_groups_keep_accounts_of_their_own():
    U = factor_(gram("low-rank plus noise", 600)).U
    W = torch.cat([weights(900, 600), 1e-3 * weights(70, 600, 1), 1e3 * weights(1000, 600, 2)])
    stacked = sweep(W, U, 0.5, row_groups=[900, 70, 1000])
    assert torch.equal(stacked, torch.cat([sweep(part, U, 0.5) for part in W.split([900, 70, 1000])]))


@pytest.mark.skipif(not native.available(), reason="needs the native extension")
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("groups, n", [([90, 410], 256), ([1100, 90], 500)])
def test_threads_do_not_change_a_bit(pattern, groups, n):
    W, U = weights(sum(groups), n), factor_(gram("correlated", n)).U
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(sweep(W, U, 0.5, pattern, row_groups=groups))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_floors_are_of_the_number_that_was_written():
    """.29 of 100 weights are 29, though .29 · 100 is 28.999… in floating point."""
    W, U = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)), torch.eye(10)
    for backend in CPU:
        with running(backend) as name:
            assert int((sweep(W, U, 0.29, block_size=10, backend=name) == 0).sum()) == 29
