"""factor_: accuracy, what it leaves alone, damping and its escalation, and what it refuses."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import Factor, FactorError, factor_, factor_batch_, refactor_
from rac_kernels.backends import native
from rac_kernels.testing import CPU_FP32, KINDS, Poisoned, assert_close, factor_error, gram, running

SIZES = [1, 7, 145, 300]
MODULE = importlib.import_module("rac_kernels.ops.factor")  # the package's name is the function


@pytest.fixture(params=["exact", *CPU_FP32])
def backend(request, monkeypatch):
    """The way of small matrices, in fp64, which is the same for all, and those of large ones."""
    if request.param == "exact":
        yield "auto"
        return
    monkeypatch.setattr(MODULE, "EXACT", 0)
    with running(request.param) as name:
        yield name


def damped(H: Tensor, factor: Factor) -> Tensor:
    """What U Uᵀ should be, in fp64."""
    H = H.double().clone()
    H.diagonal().add_(factor.ridge)
    H.diagonal()[factor.dead] = 1
    return H


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_against_plain_torch(backend, kind, n):
    H = gram(kind, n)
    found = factor_(H.triu(), backend=backend)
    expected = damped(H, found)
    plain = torch.linalg.cholesky(expected.float().flip(0, 1)).flip(0, 1)
    assert found.attempts == [0.01]
    assert_close(found.U, expected, plain, factor_error)


def test_damping_is_that_of_the_published_loop_without_dead_columns(backend):
    H = gram("outliers", 64)
    found = factor_(H.clone(), damping=0.03, backend=backend)
    assert found.ridge == pytest.approx(0.03 * H.diagonal().double().mean().item(), rel=1e-6)
    assert found.damping == 0.03 and not found.dead.any()


def test_dead_columns_leave_the_rest_as_if_they_were_not_there(backend):
    H = gram("dead", 90)
    live = H.diagonal() > 0
    found, alone = factor_(H.clone(), backend=backend), factor_(H[live][:, live].contiguous(), backend=backend)
    assert torch.equal(found.dead, ~live)
    assert found.ridge == alone.ridge
    torch.testing.assert_close(found.U.triu()[live][:, live], alone.U.triu(), rtol=2e-5, atol=1e-5)
    assert torch.equal(found.U.triu()[~live], torch.eye(90)[~live])


def test_only_the_upper_triangle_is_read_and_the_lower_keeps_the_original(backend):
    H = gram("correlated", 333)
    poisoned = torch.full_like(H, torch.nan).tril(-1) + H.triu()
    poisoned[H.tril(-1) != 0] = torch.nan
    found = factor_(poisoned, backend=backend)
    assert found.U.data_ptr() == poisoned.data_ptr()
    assert torch.equal(found.U.tril(-1), H.tril(-1))
    assert torch.equal(found.diagonal, H.diagonal())


def test_nothing_outside_a_view_is_touched(backend):
    H = gram("plain", 150)
    around = Poisoned(H)
    found = factor_(around.view, backend=backend)
    assert factor_error(found.U, damped(H, found)) < 2e-6
    assert around.intact()


@pytest.mark.parametrize("scale", [1e-28, 1e-12, 1e12, 1e28])
def test_scale_does_not_matter(backend, scale):
    H = gram("correlated", 200)
    H = H / H.diagonal().mean() * scale
    found = factor_(H.clone(), backend=backend)
    assert found.attempts == [0.01]
    assert factor_error(found.U, damped(H, found)) < 2e-6


def test_range_of_forty_orders_of_magnitude_inside_one_matrix(backend):
    H = gram("wide range", 400)
    assert H.diagonal().max() / H.diagonal().min() > 1e38
    found = factor_(H.clone(), damping=1e-4, backend=backend)
    assert found.attempts == [1e-4]
    assert factor_error(found.U, damped(H, found)) < 2e-6


def test_escalation_is_recorded_and_goes_back_to_the_original(backend):
    H = gram("plain", 200)
    H -= 0.5 * H.diagonal().mean() * torch.eye(200)  # indefinite: eigenvalues down to about -0.4 of the mean diagonal
    found = factor_(H.clone(), damping=0.01, max_damping=10, backend=backend)
    assert found.attempts == pytest.approx([0.01, 0.1, 1.0]) and found.damping == found.attempts[-1]
    assert factor_error(found.U, damped(H, found)) < 2e-6


def test_a_pivot_made_by_rounding_counts_as_none(backend):
    X = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    found = factor_(X.T @ X, damping=0.0, backend=backend)
    assert found.attempts[:2] == [0.0, 1e-6] and found.damping > 0


def test_past_the_limit_it_names_what_was_tried(backend):
    H = gram("plain", 60)
    H -= 2 * H.diagonal().max() * torch.eye(60)
    H.diagonal().abs_()
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(FactorError, match=r"H \[60, 60\].*damping 0.01, 0.1, 1; the limit is 1"):
        factor_(H, backend=backend)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (3, 199), (150, 150), (198, 199)])
def test_not_finite_is_refused(backend, bad, at):
    H = gram("plain", 200)
    H[at] = bad
    with pytest.raises(FactorError, match="infinities or NaN"):
        factor_(H, backend=backend)


def test_what_is_no_gram_matrix_is_refused(backend):
    H = gram("plain", 10)
    H[4, 4] = -1.0
    with pytest.raises(FactorError, match="element 4 is negative"):
        factor_(H, backend=backend)


@pytest.mark.parametrize("n", [10, 300])
def test_a_column_whose_squares_underflow_is_dead(backend, n):
    H = gram("plain", n)
    H[6, 6] = 0.0
    found = factor_(H.clone(), backend=backend)
    assert found.dead.nonzero().flatten().tolist() == [6]
    H[6], H[:, 6] = 0.0, 0.0
    assert torch.equal(found.U, factor_(H, backend=backend).U)


def test_matrix_that_saw_nothing(backend):
    found = factor_(torch.zeros(130, 130), backend=backend)
    assert found.dead.all() and found.ridge == 0
    assert torch.equal(found.U, torch.eye(130))


def test_empty(backend):
    assert factor_(torch.empty(0, 0), backend=backend).U.shape == (0, 0)


@pytest.mark.parametrize(
    "H", [torch.zeros(3, 4), torch.zeros(9), torch.zeros(3, 3).double(), torch.zeros(4, 4)[:, ::2][:2]]
)
def test_arguments_that_cannot_be_meant(H):
    with pytest.raises(ValueError, match="square fp32"):
        factor_(H)
    with pytest.raises(ValueError, match="square fp32"):
        factor_batch_(H[None] if H.ndim > 1 else H)


def test_damping_outside_its_limits():
    for damping in (-0.1, 2.0, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            factor_(torch.eye(3), damping=damping)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 400),
    kind=st.sampled_from(KINDS),
    damping=st.sampled_from([1e-3, 0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_any_shape(n, kind, damping, seed):
    H = gram(kind, n, seed)
    found = factor_(H.triu(), damping)
    assert found.attempts == [damping]
    assert factor_error(found.U, damped(H, found)) < 5e-6


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 200),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    rows=st.integers(0, 9),
    below=st.integers(0, 2),
    exact=st.booleans(),
)
def test_any_strides_and_batch(n, kinds, rows, below, exact):
    """Inside a buffer of NaN whose rows and matrices are further apart; each as if it were alone."""
    store = torch.full((len(kinds), n + below, n + rows), torch.nan)
    H = store[:, :n, rows:]
    matrices = [gram(kind, n, seed) for seed, kind in enumerate(kinds)]
    H.copy_(torch.stack(matrices))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "EXACT", MODULE.EXACT if exact else 0)
        found = factor_batch_(H)
        alone = [factor_(matrix.clone()) for matrix in matrices]
    for one, other, own in zip(found, alone, H, strict=True):
        assert torch.equal(one.U, other.U) and one.attempts == other.attempts and one.ridge == other.ridge
        assert torch.equal(one.dead, other.dead) and torch.equal(one.diagonal, other.diagonal)
        assert one.U.data_ptr() == own.data_ptr()
    H.fill_(torch.nan)
    assert store.isnan().all()


def test_batch_raises_the_damping_of_those_that_need_it(backend):
    plain, n = gram("plain", 200), 200
    indefinite = plain - 0.5 * plain.diagonal().mean() * torch.eye(n)
    matrices = [plain, indefinite, gram("dead", n)]
    found = factor_batch_(torch.stack(matrices), max_damping=10, backend=backend)
    assert [one.attempts for one in found] == [[0.01], pytest.approx([0.01, 0.1, 1.0]), [0.01]]
    for H, one in zip(matrices, found, strict=True):
        assert factor_error(one.U, damped(H, one)) < 2e-6
        assert torch.equal(one.U.tril(-1), H.tril(-1))


def test_batch_names_each_matrix_that_has_no_factor(backend):
    good = gram("plain", 30)
    batch = torch.stack([good, good * torch.nan, good, -good])
    with pytest.raises(FactorError, match=r"^H\[1\] \[30, 30\] holds inf.*; H\[3\] \[30, 30\] is no Gram matrix"):
        factor_batch_(batch, backend=backend)
    worse = good - 2 * good.diagonal().max() * torch.eye(30)
    worse.diagonal().abs_()
    worse[0, 1] = worse[1, 0] = 1e6
    with pytest.raises(FactorError, match=r"^H\[1\] .* not positive definite with damping 0.01, 0.1, 1; .* is 1$"):
        factor_batch_(torch.stack([good, worse]), backend=backend)


def test_refactor_of_what_is_not_positive_definite(backend):
    found = factor_(gram("plain", 150), backend=backend)
    U = found.U.clone()
    refactor_(found, torch.zeros(150), backend)
    torch.testing.assert_close(found.U, U, rtol=1e-4, atol=1e-3)
    with pytest.raises(FactorError, match="what was added"):
        refactor_(found, torch.full((150,), -2e6), backend)


def test_empty_batches(backend):
    assert factor_batch_(torch.empty(0, 5, 5), backend=backend) == []
    assert len(factor_batch_(torch.empty(3, 0, 0), backend=backend)) == 3


@pytest.mark.skipif(not native.available(), reason="needs the native extension")
@pytest.mark.parametrize("exact", [True, False])
def test_threads_do_not_change_a_bit(exact, monkeypatch):
    monkeypatch.setattr(MODULE, "EXACT", MODULE.EXACT if exact else 0)
    H = gram("correlated", 700)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(factor_(H.clone()).U)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_in_fp32_where_that_is_asked_for(monkeypatch):
    H = gram("correlated", 300)
    found = factor_(H.clone(), exact=False)
    assert not torch.equal(found.U, factor_(H.clone()).U)
    monkeypatch.setattr(MODULE, "EXACT", 0)
    assert torch.equal(found.U, factor_(H.clone()).U)
