"""H + λI = U Uᵀ with U upper triangular, by one Cholesky factorization in place.

The SparseGPT factor R with (H + λI)⁻¹ = RᵀR is U⁻¹, and the sweep never needs it. U itself is what a Cholesky gives
that runs from the last column to the first: n³/3 FLOP, where the usual chain (Cholesky, inverse, Cholesky of the
inverse) costs 4n³/3 and two more matrices.

Reference: Frantar, Alistarh, "SparseGPT" (arXiv 2301.00774), for damping and dead columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rac_kernels import cuda, gpu, native
from rac_kernels.backend import choose
from rac_kernels.gpu import tl
from rac_kernels.mirror import mirror
from rac_kernels.product import COLUMNS, invert, product

BLOCK = 128  # columns the reference factors at a time; the rest of the work is one product a block
# Up to this n the CPU factors in fp64: it costs little there, and rounding in an fp32 factor tips near-ties between
# scores, which was seen to cost small ill-conditioned matrices 5% in the objective.
EXACT = 4096
FIRST_STEP = 1e-6  # where escalation goes from no damping at all


class FactorError(RuntimeError):
    """H cannot be factored: it is not finite, no Gram matrix, or not positive definite at any damping allowed."""


@dataclass(frozen=True)
class Factor:
    """H + λI = U Uᵀ."""

    U: Tensor
    """[n, n] fp32, H's own storage: the upper triangle with the diagonal holds U; below the diagonal lies, mirrored,
    what stood above it in H, so that one matrix's memory keeps both."""
    diagonal: Tensor
    """[n] fp32: H's diagonal as it came."""
    dead: Tensor
    """[n] bool: columns with H_ii = 0. Their U_ii is 1, and nothing couples to them."""
    damping: float
    """The damping that did it: λ is this times the mean of H_ii over the columns that are not dead."""
    ridge: float
    """λ itself."""
    attempts: list[float]
    """Every damping tried; the last one is ``damping``."""

    @property
    def damped(self) -> Tensor:
        """[n] fp32: the diagonal of H + λI as it was factored, 1 where a column is dead."""
        return torch.where(self.dead, 1.0, self.diagonal + self.ridge)


def factor_(H: Tensor, damping: float = 0.01, max_damping: float = 1.0, backend: str = "auto") -> Factor:
    """Factors H + λI = U Uᵀ in place, λ = damping · mean(H_ii over live columns).

    H: [n, n] fp32 with contiguous rows; only its upper triangle is read. Dead columns (H_ii = 0) get a unit diagonal
    and stay out of the mean: without dead columns λ is the published SparseGPT's, which counts each dead column as 1
    and so depends on H's scale. Where fp32 cannot tell H + λI from an indefinite matrix (a pivot below 2⁻²³ of its
    diagonal element), the damping is raised tenfold, from 0 to 1e-6, up to ``max_damping``; the result lists every
    value tried. Scaling H, or any of its columns with its row, scales U and costs no accuracy, so nothing is scaled
    here; H_ii may range from 1e-30 to 1e30.

    Where H_ii is 0 and the rest of row i is not (as where x² underflows), that row and column are set to zero.

    Raises FactorError if H is not finite, has a negative diagonal element (no XᵀX has), or is not positive definite
    within the limit; ValueError for arguments that cannot be meant. After an
    error H's contents are lost.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype != torch.float32 or (len(H) > 1 and H.stride(1) != 1):
        raise ValueError(f"H must be a square fp32 matrix with contiguous rows, not {H.dtype} {list(H.shape)}")
    if not 0 <= damping <= max_damping:
        raise ValueError(f"damping {damping} must lie between 0 and max_damping, {max_damping}")
    diagonal, dead, used = _factor_op(H, damping, max_damping, choose(backend, H.device, triton=True))
    final, ridge = used.tolist()
    attempts = [damping]
    while attempts[-1] != final:
        attempts.append(_raised(attempts[-1]))
    return Factor(H, diagonal, dead, final, ridge, attempts)


def refactor_(factor: Factor, added: Tensor, backend: str = "auto") -> None:
    """U becomes that of H + λI + diag(added), in the same memory; everything else about ``factor`` stays.

    added: [n] fp32, not negative. In fp32 throughout: what is added is meant to be large. Raises FactorError if the sum
    is not positive definite.
    """
    if added.shape != factor.diagonal.shape:
        raise ValueError(f"added must be {list(factor.diagonal.shape)}, not {list(added.shape)}")
    wanted = factor.damped + added
    if not _refactor_op(factor.U, wanted, choose(backend, factor.U.device, triton=True)):
        raise FactorError(f"H {list(factor.U.shape)} is not positive definite with what was added to its diagonal")


@torch.library.custom_op("rac::refactor_", mutates_args={"U"})
def _refactor_op(U: Tensor, diagonal: Tensor, backend: str) -> bool:
    mirror(backend)(U, False)
    U.diagonal().copy_(diagonal)
    return _CHOLESKY.get(backend, _cholesky_)(U)


@_refactor_op.register_fake
def _(U: Tensor, diagonal: Tensor, backend: str) -> bool:
    return True


def _raised(damping: float) -> float:
    return damping * 10 or FIRST_STEP


@torch.library.custom_op("rac::factor_", mutates_args={"H"})
def _factor_op(H: Tensor, damping: float, max_damping: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns H's diagonal [n], the dead columns [n] and (damping, λ) that did it [2] fp64."""
    n = H.shape[0]
    mirror_ = mirror(backend)
    cholesky_ = _CHOLESKY.get(backend, _cholesky_)
    if H.device.type == "cpu" and backend != "triton" and n <= EXACT:
        cholesky_ = _cholesky_exact_
    if not mirror_(H, True):
        raise FactorError(f"H [{n}, {n}] holds infinities or NaN")
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    if (diagonal < 0).any():
        i = int((diagonal < 0).nonzero()[0])
        raise FactorError(f"H [{n}, {n}] is no Gram matrix: its diagonal element {i} is negative")
    # Where all x² underflowed, products with other columns need not have: nothing can be told from them alone.
    nearly = dead.nonzero().flatten()
    H.index_fill_(0, nearly, 0.0).index_fill_(1, nearly, 0.0)
    live = diagonal[~dead].double()
    mean = float(live.mean()) if live.numel() else 0.0
    tried = []
    while damping <= max_damping:
        tried.append(f"{damping:g}")
        wanted = torch.where(dead, 1.0, diagonal + damping * mean)
        H.diagonal().copy_(wanted)
        # A pivot that rounding alone could have made says nothing. NaN fails every comparison.
        if cholesky_(H) and (H.diagonal().square() > torch.finfo(H.dtype).eps * wanted).all():
            return diagonal, dead, torch.tensor([damping, damping * mean], dtype=torch.float64)
        damping = _raised(damping)
        mirror_(H, False)
    raise FactorError(
        f"H [{n}, {n}] is not positive definite with damping {', '.join(tried)}; the limit is {max_damping:g}"
    )


@_factor_op.register_fake
def _(H: Tensor, damping: float, max_damping: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    n = H.shape[0]
    return H.new_empty(n), H.new_empty(n, dtype=torch.bool), torch.empty(2, dtype=torch.float64)


def _cholesky_native_(H: Tensor) -> bool:
    return native.library().factor(H.data_ptr(), H.shape[0], H.stride(0), native.threads()) == native.DONE


def _cholesky_exact_(H: Tensor) -> bool:
    """As `_cholesky_`, in fp64 and rounded to H's dtype at the end, at the price of a second H of twice the size."""
    L, info = torch.linalg.cholesky_ex(H.double().flip(0, 1))
    if info:
        return False
    H.copy_(L.flip(0, 1).to(H.dtype) + H.tril(-1))
    return True


def _cholesky_(H: Tensor) -> bool:
    """Upper triangle of H → U with H = U Uᵀ; the rest stays. False: not positive definite, and H is half done.

    Left-looking from the last block of columns to the first: a block is final once the products of the columns to its
    right are taken off and its own corner is factored, which a flip makes an ordinary Cholesky.
    """
    hi = H.shape[0]
    while hi:
        lo = (hi - 1) // BLOCK * BLOCK
        corner = H[lo:hi, lo:hi]
        below = corner.tril(-1)
        H[:hi, lo:hi].addmm_(H[:hi, hi:], H[lo:hi, hi:].T, alpha=-1)
        L, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if info:
            return False
        U = L.flip(0, 1)
        corner.copy_(U + below)
        H[:lo, lo:hi] = torch.linalg.solve_triangular(U.T, H[:lo, lo:hi], upper=False, left=False)
        hi = lo
    return True


@gpu.jit()
def left_over(  # type: ignore[no-untyped-def]
    H, h_row, pulls, count, pull_rows, row, i, j, inside, COLUMNS: tl.constexpr
):
    """H[row + i, j] less the sum of pulls[:, row + i, j]."""
    row = tl.cast(row, tl.int64)
    left = tl.load(H + row * h_row + (i * h_row + j), mask=inside, other=0.0)
    for part in range(count):
        own = pulls + (part * tl.cast(pull_rows, tl.int64) + row) * COLUMNS
        left -= tl.load(own + (i * COLUMNS + j), mask=inside, other=0.0)
    return left


@gpu.jit("count", "pull_rows", "lo", "width")
def corner_kernel(H, h_row, pulls, count, pull_rows, lo, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block's corner of H, less what the columns to its right make, -> U. Not positive definite: NaN."""
    H += lo
    i = tl.arange(0, COLUMNS)
    inside = (i[:, None] <= i[None, :]) & (i < width)[None, :]
    C = left_over(H, h_row, pulls, count, pull_rows, lo, i[:, None], i[None, :], inside, COLUMNS)
    H += tl.cast(lo, tl.int64) * h_row
    for step in range(width):
        k = width - 1 - step
        u = tl.sum(tl.where((i == k)[None, :], C, 0.0), 1)
        pivot = tl.sum(tl.where(i == k, u, 0.0), 0)
        u /= tl.where(pivot > 0, tl.sqrt_rn(pivot), float("nan"))
        tl.store(H + i * h_row + k, u, mask=i <= k)
        C -= u[:, None] * u[None, :]


@gpu.jit("count", "pull_rows", "lo", "width")
def panel_kernel(  # type: ignore[no-untyped-def]
    H, h_row, pulls, count, pull_rows, inverse, lo, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    """Rows 0 .. lo of the block: less what the columns to its right make, times inv(U_bb)ᵀ."""
    H += lo
    first = tl.program_id(0) * ROWS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    live = (first + i < lo)[:, None]
    X = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, COLUMNS, STEP):
        k = begin + tl.arange(0, STEP)
        inside = live & (k < width)[None, :]
        left = left_over(H, h_row, pulls, count, pull_rows, first, i[:, None], k[None, :], inside, COLUMNS)
        X = tl.dot(left, tl.load(inverse + j[None, :] * COLUMNS + k[:, None]), X, input_precision="tf32x3")
    own = H + tl.cast(first, tl.int64) * h_row
    tl.store(own + (i[:, None] * h_row + j[None, :]), X, mask=live & (j < width)[None, :])


CORNER_WARPS = 8
PANEL = {"ROWS": 32, "STEP": 32, "num_warps": 8}


def _cholesky_triton_(H: Tensor) -> bool:
    """As `_cholesky_`, but the device is asked only at the end. Corners are a CUDA kernel's work where there is one."""
    cuda_corners = H.is_cuda and cuda.available()
    hi = H.shape[0]
    inverse = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float32, device=H.device)
    status = torch.zeros(1, dtype=torch.int32, device=H.device)
    fixed = {"COLUMNS": COLUMNS, "enable_fp_fusion": True}
    with torch.cuda.device_of(H):
        while hi:
            lo = (hi - 1) // COLUMNS * COLUMNS
            width = hi - lo
            pulls = product(H[:hi, hi:], H[lo:hi, hi:].T)
            taken = (H, H.stride(0), pulls, len(pulls), hi)
            if cuda_corners:
                cuda.factor_corner_(H, lo, hi, inverse[:width, :width], status, pulls)
            else:
                corner_kernel[(1,)](*taken, lo, width, num_warps=CORNER_WARPS, **fixed)
                invert(H[lo:hi, lo:hi], inverse[None], width)
            if lo:
                panel_kernel[(-(-lo // PANEL["ROWS"]),)](*taken, inverse, lo, width, **PANEL, **fixed)
            hi = lo
    return not status.item()


_CHOLESKY = {"native": _cholesky_native_, "triton": _cholesky_triton_}
