"""refine: the optimum on the mask, exact or by gradients; nothing ever worse; layouts, storages, edges, refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import factor_, objective, refine
from rac_kernels.ops.pattern import parse_pattern
from rac_kernels.solvers.refine import System, _Coarse
from rac_kernels.testing import CPU, CPU_FP32, KINDS, gram, running

ROWS, N = 17, 48
SOLVABLE = [kind for kind in KINDS if kind not in ("rank-deficient", "low-rank plus noise")]


@pytest.fixture(params=CPU_FP32)
def backend(request):
    with running(request.param) as name:
        yield name


def problem(kind: str, rows: int = ROWS, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """H [n, n], a target [rows, n] and a mask that keeps half of it, in row 3 nothing."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, n, generator=g) < 0.5
    mask[3:4] = False
    return gram(kind, n), torch.randn(rows, n, generator=g), mask


def best(T: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """The optimum of each row in fp64, by least squares on its own equations scaled to a unit diagonal."""
    Q = torch.zeros(T.shape, dtype=torch.float64)
    H = H.double()
    for row, (kept, t) in enumerate(zip(mask, T.double(), strict=True)):
        S = (kept & (H.diagonal() > 0)).nonzero().flatten()
        if len(S):
            scale = H.diagonal()[S].rsqrt()
            A = scale[:, None] * H[S][:, S] * scale
            Q[row, S] = scale * torch.linalg.lstsq(A, scale * (t @ H[:, S]), driver="gelsd").solution
    return Q


def row_objectives(T: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    D = T.double() - Q.double()
    return ((D @ H.double()) * D).sum(1)


@pytest.mark.parametrize("method", ["gradients", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_reaches_the_optimum(backend: str, kind: str, method: str) -> None:
    H, T, mask = problem(kind)
    Q, how = refine(T * mask, H, T, mask, iterations=300, tolerance=1e-6, method=method, backend=backend)
    wanted = objective(T, best(T, mask, H), H)
    slack = 1e-6 if kind in SOLVABLE else 1e-4  # what fp32's products of H leave where H is close to singular
    assert objective(T, Q, H) <= wanted * (1 + slack) + 1e-6 * objective(T, torch.zeros_like(T), H)
    assert (Q[~mask] == 0).all() and not (Q.signbit() & (Q == 0)).any()
    assert how.method == method
    assert how.after == pytest.approx(objective(T, Q, H), rel=1e-4, abs=1e-6 * how.before)
    assert how.before == pytest.approx(objective(T, T * mask, H), rel=1e-5)
    if method == "gradients" and kind in SOLVABLE:
        assert 1 <= how.iterations < 100 and how.residual < 1e-3


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_patterns(backend: str, pattern: str) -> None:
    H, T, _ = problem("correlated")
    keep, group = parse_pattern(pattern) or (0, 0)
    mask = torch.zeros(T.shape, dtype=torch.bool).view(ROWS, -1, group)
    mask.scatter_(2, T.abs().view(ROWS, -1, group).topk(keep).indices, True)
    mask = mask.view(T.shape)
    for method in ("gradients", "exact"):
        Q, _ = refine(T * mask, H, T, method=method, iterations=100, tolerance=1e-6, backend=backend)
        assert objective(T, Q, H) == pytest.approx(objective(T, best(T, mask, H), H), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(CPU_FP32),
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 9),
    n=st.integers(1, 70),
    iterations=st.integers(0, 12),
    method=st.sampled_from(["auto", "gradients", "exact"]),
    start=st.sampled_from(["target", "zero", "noise", "optimum"]),
)
def test_never_worse_in_any_row(name, kind, rows, n, iterations, method, start):
    H, T, mask = problem(kind, rows, n, seed=rows * 100 + n)
    Q0 = {"target": T, "zero": torch.zeros_like(T), "noise": torch.randn_like(T)}.get(start)
    Q0 = (best(T, mask, H).float() if Q0 is None else Q0) * mask
    with running(name) as backend:
        Q, how = refine(Q0, H, T, mask, iterations=iterations, method=method, tolerance=0, backend=backend)
    before, after = row_objectives(T, Q0, H), row_objectives(T, Q, H)
    whole = row_objectives(T, torch.zeros_like(T), H) + before
    assert (after <= before + 2e-7 * whole).all()
    assert how.iterations <= iterations and 0 <= how.kept <= rows
    assert (Q[~mask] == 0).all()


@pytest.mark.parametrize("triangle", ["upper", "lower"])
def test_a_triangle_does_with_the_rest_poisoned(backend: str, triangle: str, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["rac_kernels.solvers.refine"], "SIDE", 20)  # several bands
    H, T, mask = problem("correlated")
    nan = torch.full_like(H, torch.nan)
    poisoned = torch.where(torch.ones(N, N).triu(1).bool(), H, nan)
    if triangle == "lower":
        poisoned = torch.where(torch.ones(N, N).tril(-1).bool(), H, nan)
    arguments: dict[str, Any] = {"triangle": triangle, "diagonal": H.diagonal(), "iterations": 50, "tolerance": 1e-6}
    for method in ("gradients", "exact"):
        Q, how = refine(T * mask, poisoned, T, mask, method=method, backend=backend, **arguments)
        assert how.kept == 1  # the row without weights
        assert objective(T, Q, H) == pytest.approx(objective(T, best(T, mask, H), H), rel=1e-6)


def test_after_the_factor(backend: str) -> None:
    H, T, mask = problem("dead")
    factor = factor_(H.clone())
    Q, _ = refine(
        T * mask, factor.U, T, mask, triangle="lower", diagonal=factor.diagonal, iterations=60, backend=backend
    )
    assert objective(T, Q, H) == pytest.approx(objective(T, best(T, mask, H), H), rel=1e-5)
    ridge = factor.diagonal + factor.ridge
    Q, _ = refine(T * mask, factor.U, T, mask, triangle="lower", diagonal=ridge, iterations=60, backend=backend)
    damped = H + factor.ridge * torch.eye(N)
    assert objective(T, Q, damped) == pytest.approx(objective(T, best(T, mask, damped), damped), rel=1e-5)


def test_dead_columns_keep_their_weights(backend: str) -> None:
    H, T, mask = problem("dead")
    dead = H.diagonal() == 0
    for method in ("gradients", "exact"):
        Q, _ = refine(T * mask, H, T, mask, method=method, backend=backend)
        assert dead.any() and torch.equal(Q[:, dead], (T * mask)[:, dead])


@pytest.mark.parametrize(("method", "tolerance"), [("auto", 1e-3), ("gradients", 1e-3), ("gradients", 1e-2)])
def test_layouts_and_dtypes(backend: str, method: str, tolerance: float) -> None:
    H, T, mask = problem("plain")
    how: dict[str, Any] = {"tolerance": tolerance, "method": method, "backend": backend}
    wanted, _ = refine((T * mask).half(), H, T.bfloat16(), mask, **how)

    def strided(M: Tensor) -> Tensor:
        whole = torch.full((2 * len(M) + 1, 3 * M.shape[1]), 0, dtype=M.dtype)
        return whole[1::2, ::3].copy_(M)

    around = torch.full((N + 2, N + 5), torch.nan)
    view = around[1 : N + 1, 2 : N + 2].copy_(H)
    before = (T * mask).half()
    Q0 = strided(before)
    for same in (view, view.T, strided(H)):
        Q, _ = refine(Q0, same, strided(T.bfloat16()), mask.T.contiguous().T, **how)
        torch.testing.assert_close(Q, wanted, rtol=tolerance / 10, atol=tolerance / 100)
        assert torch.equal(Q0, before) and Q.dtype == torch.float32


def test_rows_that_meet_nan_keep_what_they_had(backend: str) -> None:
    H, T, mask = problem("plain")
    spoilt = T.clone()
    spoilt[5, 7] = torch.nan
    for method in ("gradients", "exact"):
        Q, how = refine(T * mask, H, spoilt, mask, method=method, backend=backend)
        assert torch.equal(Q[5], (T * mask)[5]) and how.kept == 2
        others = torch.arange(ROWS) != 5
        assert (row_objectives(T, Q, H)[others] <= row_objectives(T, T * mask, H)[others]).all()


def test_an_indefinite_matrix_does_no_harm(backend: str) -> None:
    _, T, mask = problem("plain")
    A = torch.randn(N, N)
    H = A + A.T
    Q, _ = refine(T * mask, H, T, mask, iterations=30, backend=backend)
    assert Q.isfinite().all()
    assert (row_objectives(T, Q, H) <= row_objectives(T, T * mask, H) + 1e-3).all()


def test_stops_when_the_residual_says_so(backend: str) -> None:
    H, T, mask = problem("correlated")
    taken = []
    for tolerance in (1e-1, 1e-2, 1e-4):
        _, how = refine(T * mask, H, T, mask, iterations=100, tolerance=tolerance, method="gradients", backend=backend)
        assert how.residual <= 1.05 * tolerance
        taken.append(how.iterations)
    assert taken == sorted(set(taken))
    optimum, _ = refine(T * mask, H, T, mask, iterations=100, tolerance=1e-7, backend=backend)
    _, how = refine(optimum, H, T, mask, iterations=500, tolerance=0, method="gradients", backend=backend)
    assert how.iterations < 100  # rounding is not chased


@pytest.mark.parametrize("isa", CPU[1:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (ROWS, N), (5, 257), (14, 801)])
def test_coarse_products_are_right_by_the_norms(isa: str, kind: str, rows: int, n: int) -> None:
    """However different the columns' sizes are."""
    H = gram(kind, n)
    diagonal = 1.01 * H.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    P = torch.randn(rows, n, generator=torch.Generator().manual_seed(n)) * inverse.sqrt()
    out = torch.full_like(P, torch.nan)
    with running(isa):
        _Coarse(System(H, "full", diagonal, inverse), rows)(P, out)
    whole = H.double()
    whole.diagonal().copy_(diagonal)
    columns = (whole * inverse.double().sqrt()[:, None]).norm(dim=0)
    far = (out - P.double() @ whole).abs()
    assert (far <= 2e-4 * (P * diagonal.sqrt()).double().norm(dim=1, keepdim=True) * columns).all()


@pytest.mark.parametrize("isa", CPU[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_coarse_products_end_as_low(isa: str, kind: str) -> None:
    H, T, mask = problem(kind, 14, 500)
    ends, taken = [], []
    with running(isa) as backend:
        for name, triangle in ((backend, "full"), (backend, "upper"), ("reference", "full")):
            how: dict[str, Any] = {"triangle": triangle, "method": "gradients", "backend": name}
            Q, _ = refine(T * mask, H, T, mask, iterations=8, tolerance=1e-2, **how)
            ends.append(float(row_objectives(T, Q, H).sum()))
            taken.append(Q)
    assert ends[0] == pytest.approx(ends[2], rel=2e-3)
    assert not torch.equal(taken[0], taken[1])  # or this compares nothing


def test_the_reference_in_fp64_is_exact() -> None:
    H, T, mask = problem("correlated")
    Q, how = refine((T * mask).double(), H.double(), T.double(), mask, iterations=200, tolerance=1e-13)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q, best(T, mask, H), rtol=1e-9, atol=1e-9)
    assert how.after < how.before


def test_empty(backend: str) -> None:
    for rows, n in ((0, 5), (3, 0), (0, 0)):
        Q, how = refine(torch.zeros(rows, n), torch.zeros(n, n), torch.zeros(rows, n), backend=backend)
        assert Q.shape == (rows, n) and how.before == how.after == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"H": torch.zeros(4, 5)}, "square fp32"),
        ({"H": torch.zeros(4, 4).half()}, "square fp32"),
        ({"Q": torch.zeros(3, 5)}, r"\[rows, 4\]"),
        ({"target": torch.zeros(2, 4)}, r"\[rows, 4\]"),
        ({"Q": torch.zeros(3, 4).int()}, "floating point"),
        ({"mask": torch.ones(3, 4)}, "bool"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "bool"),
        ({"diagonal": torch.ones(3)}, r"diagonal must be \[4\]"),
        ({"triangle": "left"}, "full, upper, lower"),
        ({"method": "magic"}, "auto, gradients, exact"),
        ({"iterations": -1}, "at least 0"),
        ({"tolerance": torch.nan}, "at least 0"),
        ({"target": torch.zeros(3, 4, device="meta")}, "H's device"),
    ],
)
def test_refuses(change, message):
    arguments = {"Q": torch.zeros(3, 4), "H": torch.eye(4), "target": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        refine(**arguments)


ALL: Any = torch.backends
CUDA: Any = ALL.cuda.matmul
ONEDNN: Any = getattr(ALL.mkldnn, "matmul", None)
PRECISIONS = {
    "nothing": lambda: None,
    "all": lambda: setattr(ALL, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "cuda, older": lambda: setattr(CUDA, "allow_tf32", True),
    "cpu": lambda: setattr(ONEDNN, "fp32_precision", "bf16"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


def precisions() -> list[str]:
    found = [ALL.fp32_precision, CUDA.fp32_precision, ONEDNN.fp32_precision]
    for read in (torch.get_float32_matmul_precision, lambda: str(CUDA.allow_tf32)):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.mark.skipif(not hasattr(ALL, "fp32_precision"), reason="an older torch")
@pytest.mark.parametrize("allowed", PRECISIONS)
def test_tf32_allowed_elsewhere(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever of torch's ways it was allowed: not within, and as it was afterwards."""
    H, target, mask = problem("plain")
    module: Any = sys.modules["rac_kernels.solvers.refine"]
    seen: list[list[str]] = []
    product = module.symmetric_product

    def look(*some: Any, **named: Any) -> Tensor:
        seen.append(precisions())
        return product(*some, **named)

    monkeypatch.setattr(module, "symmetric_product", look)
    expected, _ = refine(target, H, target, mask)
    seen.clear()
    try:
        PRECISIONS[allowed]()
        before = precisions()
        found, _ = refine(target, H, target, mask)
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        ALL.fp32_precision = CUDA.fp32_precision = ONEDNN.fp32_precision = "none"
    assert torch.equal(found, expected)
    assert seen and all(inside[1:] == ["ieee", "ieee", "highest", "False"] for inside in seen)
