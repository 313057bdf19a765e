"""From a matrix and its Hessian to the pruned matrix, for every method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.solve import matrices
from rac_engine.solve.matrices import prune_matrices, prune_matrix
from rac_engine.solve.method import Gram, Target
from rac_engine.solve.methods import find_method, method_names
from rac_engine.solve.outputs import Outputs
from rac_kernels.measure.published import sparsegpt
from rac_kernels.testing import KINDS, gram


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """W [24, 64] and H of 500 correlated tokens."""
    torch.manual_seed(0)
    x = torch.randn(500, 64) @ torch.randn(64, 64) * torch.logspace(1, -1, 64)
    return torch.randn(24, 64), x.T @ x


def true_objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    D = W.double() - Q.double()
    return float(((D @ H.double()) * D).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.5, "2:4"), (0.75, "1:4"), (0.5, "4:8")])
@pytest.mark.parametrize("method", method_names())
def test_prunes_to_the_target(
    problem: tuple[Tensor, Tensor], method: str, sparsity: float, pattern: str | None, dtype: torch.dtype
) -> None:
    W, H = problem[0].to(dtype), problem[1].triu()
    before = W.clone(), H.clone()
    result = prune_matrix(W, H, method, sparsity, pattern, block_size=32)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    Q = result.weight
    assert Q.dtype == dtype
    assert result.zeros == int((Q == 0).sum())
    assert not Q.signbit()[Q == 0].any()
    if pattern is None:
        assert result.zeros / Q.numel() == pytest.approx(sparsity, abs=0.02)
    else:
        keep, group = map(int, pattern.split(":"))
        assert ((Q != 0).unflatten(1, (-1, group)).sum(-1) == keep).all()
    expected = true_objective(W, Q, problem[1])
    assert result.objective == pytest.approx(expected, rel=1e-4)
    assert result.relative_error == pytest.approx(
        expected / true_objective(W, torch.zeros_like(Q), problem[1]), rel=1e-4
    )
    if method == "sparsegpt":
        assert result.damping == 0.01
        assert result.notes == []
        assert expected < 0.9 * (prune_matrix(W, H, "magnitude", sparsity, pattern).objective or 0)


def test_wanda_compares_within_each_row(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    Q = prune_matrix(W, H, "wanda", 0.3).weight
    scores, every = W.abs() * H.diagonal().sqrt(), int(0.3 * 24 * 64)
    for row in range(24):
        count = (row + 1) * every // 24 - row * every // 24  # 19 or 20
        gone = scores[row].argsort()[:count]
        expected = W[row].index_fill(0, gone, 0)
        assert torch.equal(Q[row], expected)


def test_wanda_makes_each_matrix_as_sparse_as_asked_for() -> None:
    """Matrices of 576 columns at 60%, stacked as those of one input are: each has its own zeros."""
    weights = [torch.randn(rows, 576, generator=torch.Generator().manual_seed(rows)) for rows in (33, 7, 1)]
    results = prune_matrices(weights, torch.rand(576), "wanda", Target(sparsity=0.6))
    assert [result.zeros for result in results] == [int(0.6 * 576 * rows) for rows in (33, 7, 1)]
    assert [find_method("wanda").zeros(0.6, rows, 576, 128) for rows in (33, 7, 1)] == [r.zeros for r in results]


def test_magnitude_compares_within_the_whole_matrix(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    Q = prune_matrix(W, H, "magnitude", 0.3).weight
    gone = W.abs().flatten().argsort()[: int(0.3 * W.numel())]
    assert torch.equal(Q.flatten(), W.flatten().index_fill(0, gone, 0))


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_stacking_changes_nothing(problem: tuple[Tensor, Tensor], method: str, pattern: str | None) -> None:
    """Each of the matrices that share an input has its own thresholds."""
    W, H = problem
    parts = [3.0 * W[:10], W[10:14], W[14:]]
    statistic = {"hessian": H.clone(), "norms": H.diagonal().clone(), "nothing": None}[find_method(method).needs]
    together = prune_matrices(parts, statistic, method, Target(0.6, pattern))
    for part, result in zip(parts, together, strict=True):
        alone = prune_matrix(part, H, method, 0.6, pattern)
        assert result.zeros == alone.zeros
        torch.testing.assert_close(result.weight, alone.weight)
        if find_method(method).needs == "hessian":
            assert result.objective == pytest.approx(alone.objective, rel=1e-4)
        else:
            assert result.objective is None


@pytest.mark.parametrize("method", method_names())
def test_no_negative_zero_is_left_by_rounding(method: str) -> None:
    """Corrections can leave less of a weight than fp16 can hold, and sources may hold −0.0 themselves."""
    W = torch.tensor([[0.0, -0.0, 1.0, 2.0], [-6e-8, -6e-8, 1.0, 2.0]]).half()
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = -0.9
    for sparsity in (0.0, 0.3):
        Q = prune_matrix(W, H, method, sparsity).weight
        assert not Q.signbit()[Q == 0].any()


def test_dead_inputs_are_noted_and_get_zero_weights(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    H[5], H[:, 5] = 0, 0
    result = prune_matrix(W, H)
    assert not result.weight[:, 5].any()
    assert result.notes == ["1 of 64 inputs are always zero, or too small to square: their weights were set to zero"]


def test_raised_damping_is_noted() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    result = prune_matrix(torch.randn(8, 64), x.T @ x, damping=1e-12)
    assert result.damping is not None
    assert result.damping > 1e-12
    assert any("damping raised from 1e-12" in note for note in result.notes)
    assert result.weight.isfinite().all()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_input_that_no_token_reached(problem: tuple[Tensor, Tensor], method: str) -> None:
    W, H = problem
    statistic = torch.zeros_like(H) if find_method(method).needs == "hessian" else torch.zeros(64)
    left, also = prune_matrices([W, W[:3]], statistic, method, Target())
    assert torch.equal(left.weight, W)
    assert also.skipped == left.skipped == "no calibration token reached it"
    (pruned,) = prune_matrices([W], statistic, method, Target(), unseen="magnitude")
    assert torch.equal(pruned.weight, prune_matrix(W, H, "magnitude").weight)
    assert pruned.skipped is None
    assert pruned.notes == ["no calibration token reached it: pruned by magnitude"]


def test_what_does_not_fit_is_refused(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    with pytest.raises(BadInput, match="'alchemy' is not known"):
        prune_matrix(W, H, "alchemy")
    with pytest.raises(ValueError, match=r"2:5|5"):
        prune_matrix(W, H, pattern="2:5")
    with pytest.raises(ValueError, match="sparsity"):
        prune_matrix(W, H, sparsity=1.5)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "sparsity", "pattern"),
    [(40, 0.3, None), (97, 0.5, None), (33, 0.8, None), (50, 0.5, "2:4"), (50, 0.5, "4:8"), (300, 0.75, "1:4")],
)
def test_sparsegpt_is_as_good_as_the_published_loop(
    kind: str, rows: int, sparsity: float, pattern: str | None, block: int
) -> None:
    """The published loop runs in fp64, this in fp32: near ties fall either way, so objectives are compared."""
    H, W = gram(kind, 256), torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    result = prune_matrix(W, H, "sparsegpt", sparsity, pattern, block_size=block)
    n, m = map(int, (pattern or "0:0").split(":"))
    published = sparsegpt(W, H, sparsity, (n, m) if pattern else None, block)
    assert true_objective(W, result.weight, H) <= 1.001 * true_objective(W, published, H)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("damping", [0.01, 0.2])
def test_matrices_of_one_input_may_each_have_a_target_of_their_own(
    problem: tuple[Tensor, Tensor], method: str, damping: float
) -> None:
    W, H = problem
    parts = [W[:10], W[10:14], W[14:]]
    targets = [Target(0.6), Target(0.5, "2:4", damping), Target(0.6)]
    statistic = {"hessian": H.clone(), "norms": H.diagonal().clone(), "nothing": None}[find_method(method).needs]
    together = prune_matrices(parts, statistic, method, targets)
    for part, target, result in zip(parts, targets, together, strict=True):
        alone = prune_matrix(part, H, method, target.sparsity, target.pattern, target.damping)
        assert result.zeros == alone.zeros
        torch.testing.assert_close(result.weight, alone.weight, rtol=1e-3, atol=1e-3)


def test_a_factor_can_be_made_again_of_what_was_given_back(problem: tuple[Tensor, Tensor]) -> None:
    gram = Gram(problem[1].clone())
    first = gram.factor(0.01).U.triu().clone()
    assert torch.allclose(gram.upper().triu(), problem[1].triu())
    assert torch.allclose(gram.factor(0.01).U.triu(), first)


def test_what_is_solved_in_batches_is_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 32)
    dense = x + 0.1 * torch.randn(300, 32)
    weights = [torch.randn(rows, 32) for rows in (8, 24, 16)]
    results = []
    for together in (1 << 26, 24 * 32, 1):
        monkeypatch.setattr(matrices, "TOGETHER", together)
        outputs = Outputs.of_inputs(x.T @ dense, dense.T @ dense, weights)
        results.append(prune_matrices(weights, x.T @ x, "sparsegpt", Target(0.5), outputs=outputs))
    for some in results[1:]:
        for one, other in zip(results[0], some, strict=True):
            assert one.zeros == other.zeros
            assert other.objective == pytest.approx(one.objective, rel=1e-4)
            torch.testing.assert_close(other.weight, one.weight, rtol=1e-3, atol=1e-4)


def test_factors_asked_for_one_after_the_other_are_made_in_the_memory_of_one_matrix(
    problem: tuple[Tensor, Tensor],
) -> None:
    """With dampings of their own, matrices that share an input take no second H; nor does a factor lent and spoilt."""
    H = problem[1].triu()
    held = Gram(H)
    for damping, lent in ((0.01, True), (0.01, False), (0.3, True), (0.0, False)):
        factor = held.borrow(damping) if lent else held.factor(damping)
        expected = Gram(problem[1].triu()).factor(damping)
        assert torch.equal(factor.U.triu(), expected.U.triu()) and factor.ridge == expected.ridge
        assert factor.U.data_ptr() == H.data_ptr()
        if lent:
            factor.U.copy_(factor.U.tril(-1))
    assert torch.equal(held.upper().triu(), problem[1].triu())
