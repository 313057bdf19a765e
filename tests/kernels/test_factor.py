"""factor_: accuracy, what it leaves alone, damping and its escalation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import Factor, FactorError, factor_, native
from tests.kernels.backends import CPU_FP32, running
from tests.kernels.gram import KINDS, gram

SIZES = [1, 7, 145, 300]


@pytest.fixture(params=CPU_FP32)
def backend(request):
    with running(request.param) as name:
        yield name


def damped(H: Tensor, factor: Factor) -> Tensor:
    """What U Uᵀ should be, in fp64."""
    H = H.double().clone()
    H.diagonal().add_(factor.ridge)
    H.diagonal()[factor.dead] = 1
    return H


def error(U: Tensor, H: Tensor) -> float:
    """The largest |U Uᵀ − H| relative to √(H_ii H_jj), which scaling the columns does not change."""
    scale = H.diagonal().sqrt()
    U = U.double().triu()
    return float(((U @ U.T - H) / scale / scale[:, None]).abs().max())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_against_plain_torch(backend, kind, n):
    H = gram(kind, n)
    found = factor_(H.triu(), backend=backend)
    expected = damped(H, found)
    plain = torch.linalg.cholesky(expected.float().flip(0, 1)).flip(0, 1)
    assert found.attempts == [0.01]
    assert error(found.U, expected) <= 2 * error(plain, expected) + 1e-6


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
    store = torch.full((170, 190), torch.nan)
    view = store[5:155, 7:157]
    view.copy_(H)
    found = factor_(view, backend=backend)
    assert error(found.U, damped(H, found)) < 2e-6
    view.zero_()
    assert store.isnan().sum() == store.numel() - view.numel() and (view == 0).all()


@pytest.mark.parametrize("scale", [1e-28, 1e-12, 1e12, 1e28])
def test_scale_does_not_matter(backend, scale):
    H = gram("correlated", 200)
    H = H / H.diagonal().mean() * scale
    found = factor_(H.clone(), backend=backend)
    assert found.attempts == [0.01]
    assert error(found.U, damped(H, found)) < 2e-6


def test_range_of_forty_orders_of_magnitude_inside_one_matrix(backend):
    H = gram("wide range", 400)
    assert H.diagonal().max() / H.diagonal().min() > 1e38
    found = factor_(H.clone(), damping=1e-4, backend=backend)
    assert found.attempts == [1e-4]
    assert error(found.U, damped(H, found)) < 2e-6


def test_escalation_is_recorded_and_goes_back_to_the_original(backend):
    H = gram("plain", 200)
    H -= 0.5 * H.diagonal().mean() * torch.eye(200)  # indefinite: eigenvalues down to about -0.4 of the mean diagonal
    found = factor_(H.clone(), damping=0.01, max_damping=10, backend=backend)
    assert found.attempts == pytest.approx([0.01, 0.1, 1.0]) and found.damping == found.attempts[-1]
    assert error(found.U, damped(H, found)) < 2e-6


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
    assert error(found.U, damped(H, found)) < 5e-6


@pytest.mark.skipif(not native.available(), reason="needs the native extension")
def test_threads_do_not_change_a_bit():
    H = gram("correlated", 700)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(factor_(H.clone()).U)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_registered_op():
    H = gram("plain", 50)
    torch.library.opcheck(torch.ops.rac.factor_, (H, 0.01, 1.0, "reference"))
