"""The diagonal block's kernel, run on the host (see shim/cuda_runtime.h), against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels.testing import gram
from tests.cuda.host import Program, factor_corner


def damped(kind: str, n: int, seed: int = 0) -> Tensor:
    H = gram(kind, n, seed)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return H


def placed(matrices: list[Tensor], lo: int) -> Tensor:
    """[matrices, n, row stride] with the upper triangles at (lo, lo) and NaN wherever nothing may be read."""
    size = len(matrices[0])
    H = torch.full((len(matrices), lo + size + 3, lo + size + 5), torch.nan)
    for one, matrix in zip(H, matrices, strict=True):
        where = torch.ones(size, size, dtype=torch.bool).triu()
        one[lo : lo + size, lo : lo + size][where] = matrix[where]
    return H


def flipped_cholesky(H: Tensor) -> Tensor:
    return torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)


@pytest.mark.parametrize("size", [1, 31, 33, 64, 97, 128])
def test_factor_and_inverse(program: Program, size: int) -> None:
    """Matrices of all kinds at once; what is beside their corners is neither read nor written."""
    lo = 2
    matrices = [damped(kind, size) for kind in ("correlated", "low-rank plus noise", "wide range")]
    before = placed(matrices, lo)
    done = factor_corner(program, before, lo, lo + size)
    assert not done.said and done.status == [0, 0, 0]
    corner = torch.zeros_like(before, dtype=torch.bool)
    corner[:, lo : lo + size, lo : lo + size] = torch.ones(size, size, dtype=torch.bool).triu()
    assert (done.H.isnan() == ~corner).all()
    assert done.inverse[:, size:].isnan().all() and done.inverse[:, :, size:].isnan().all()
    for H, found, inverse in zip(matrices, done.H, done.inverse, strict=True):
        U, V = found[lo : lo + size, lo : lo + size].triu(), inverse[:size, :size]
        assert (V.tril(-1) == 0).all()
        # As if each column had length 1: the worst of a matrix of wide range is as good as the best.
        scale = H.double().diagonal().sqrt()

        def error_of(U: Tensor, H: Tensor = H, scale: Tensor = scale) -> float:
            return float(((U.double() @ U.double().T - H.double()).triu() / scale / scale[:, None]).abs().max())

        def error_of_inverse(V: Tensor, U: Tensor = U, scale: Tensor = scale) -> float:
            exact = torch.linalg.inv(U.double()) * scale
            return float(((V.double() * scale - exact).abs().max()) / exact.abs().max())

        plain = torch.linalg.solve_triangular(U, torch.eye(size), upper=True)
        assert error_of(U) <= 2 * error_of(flipped_cholesky(H)) + 1e-6
        assert error_of_inverse(V) <= 2 * error_of_inverse(plain) + 1e-6


def test_pulls_are_taken_off_first(program: Program) -> None:
    """Of three parts, with NaN where they have no say; bit for bit what comes of taking them off beforehand."""
    size, lo = 70, 4
    matrices = [damped("plain", size, seed) for seed in range(2)]
    pulls = torch.full((2, 3, lo + size + 1, size + 2), torch.nan)
    off = 0.05 * torch.stack([matrices[1] / scale for scale in (2, 3, 5)])
    pulls[:, :, lo : lo + size, :size] = torch.where(torch.ones(size, size, dtype=torch.bool).triu(), off, torch.nan)
    done = factor_corner(program, placed(matrices, lo), lo, lo + size, pulls=pulls)
    less = [matrix - off[0] - off[1] - off[2] for matrix in matrices]
    wanted = factor_corner(program, placed(less, lo), lo, lo + size)
    assert not done.said and done.status == wanted.status == [0, 0]
    assert torch.equal(done.H.nan_to_num(-7), wanted.H.nan_to_num(-7))
    assert torch.equal(done.inverse.nan_to_num(-7), wanted.inverse.nan_to_num(-7))


def spoil(H: Tensor, column: int, value: float) -> Tensor:
    H = H.clone()
    H[column, column] = value
    return H


@pytest.mark.parametrize(
    ("size", "spoilt"),
    [
        (40, [(0, -1.0), (7, 0.0), (31, torch.nan), (32, torch.inf), (39, 0.0), (24, -1.0), (8, torch.inf)]),
        (128, [(127, torch.nan), (50, -1.0)]),
    ],
)
def test_not_positive_definite(program: Program, size: int, spoilt: list[tuple[int, float]]) -> None:
    """The column is named, its matrix stays as it was, and the one beside it is factored."""
    lo = 3
    good = damped("plain", size)
    before = placed([good, *(spoil(good, column, value) for column, value in spoilt)], lo)
    done = factor_corner(program, before, lo, lo + size)
    assert not done.said
    assert done.status == [0, *(lo + column + 1 for column, _ in spoilt)]
    assert torch.equal(done.H[1:].nan_to_num(-7), before[1:].nan_to_num(-7))
    assert done.inverse[1:].isnan().all() and not done.inverse[0][:size, :size].isnan().any()


def test_nan_off_the_diagonal(program: Program) -> None:
    H = damped("plain", 70)
    H[20, 60] = torch.nan
    assert factor_corner(program, placed([H], 0), 0, 70).status == [21]


def test_a_status_that_is_not_0_stops(program: Program) -> None:
    before = placed([damped("plain", 5)] * 2, 0)
    done = factor_corner(program, before, 0, 5, status=[9, 0])
    assert done.status == [9, 0]
    assert torch.equal(done.H[0].nan_to_num(-7), before[0].nan_to_num(-7))
    assert not torch.equal(done.H[1].nan_to_num(-7), before[1].nan_to_num(-7))


def test_nothing_to_do(program: Program) -> None:
    assert factor_corner(program, placed([damped("plain", 5)], 0), 2, 2).status == [0]
