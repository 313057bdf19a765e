"""H + λI = U Uᵀ with U upper triangular, by one Cholesky factorization in place.

The SparseGPT factor R with (H + λI)⁻¹ = RᵀR is U⁻¹, and the sweep never needs it. U itself is what a Cholesky gives
that runs from the last column to the first: n³/3 FLOP, where the usual chain (Cholesky, inverse, Cholesky of the
inverse) costs 4n³/3 and two more matrices.

Reference: Frantar, Alistarh, "SparseGPT" (arXiv 2301.00774), for damping and dead columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rac_kernels.backends import cuda, gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.limits import Limit
from rac_kernels.ops.mirror import mirror
from rac_kernels.ops.product import COLUMNS, invert, product

BLOCK = 128  # columns the reference factors at a time; the rest of the work is one product a block

# Up to this n the CPU factors in fp64 unless told otherwise: it costs little there, and rounding in an fp32 factor tips
# near-ties between scores, which was seen to cost small ill-conditioned matrices 5% in the objective.
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
    asked: float
    """The damping asked for."""
    used: Tensor
    """[2] fp64 on the CPU: the damping that did it, and λ. Read as `damping` and `ridge`: torch.compile, which cannot
    have them as numbers, can pass a tensor on."""

    @property
    def damping(self) -> float:
        """The damping that did it: λ is this times the mean of H_ii over the columns that are not dead."""
        return float(self.used[0])

    @property
    def ridge(self) -> float:
        """λ itself."""
        return float(self.used[1])

    @property
    def attempts(self) -> list[float]:
        """Every damping tried; the last one is ``damping``."""
        tried = [self.asked]
        while tried[-1] != self.damping:
            tried.append(_raised(tried[-1]))
        return tried

    @property
    def damped(self) -> Tensor:
        """[n] fp32: the diagonal of H + λI as it was factored, 1 where a column is dead."""
        return torch.where(self.dead, 1.0, self.diagonal + self.used[1])


def factor_(
    H: Tensor, damping: float = 0.01, max_damping: float = 1.0, backend: str = "auto", exact: bool = True
) -> Factor:
    """Factors H + λI = U Uᵀ in place, λ = damping · mean(H_ii over live columns).

    H: [n, n] fp32 with contiguous rows; only its upper triangle is read. Dead columns (H_ii = 0) get a unit diagonal
    and stay out of the mean: without dead columns λ is the published SparseGPT's, which counts each dead column as 1
    and so depends on H's scale. Where fp32 cannot tell H + λI from an indefinite matrix (a pivot below 2⁻²³ of its
    diagonal element), the damping is raised tenfold, from 0 to 1e-6, up to ``max_damping``; the result lists every
    value tried. Scaling H, or any of its columns with its row, scales U and costs no accuracy, so nothing is scaled
    here; H_ii may range from 1e-30 to 1e30.

    Where H_ii is 0 and the rest of row i is not (as where x² underflows), that row and column are set to zero.

    On a GPU it waits for the device twice, before the first attempt and after it, and once for each one that follows.
    A CPU factors up to n = 4096 in fp64, at some four times the cost and with 16 n² bytes more, unless ``exact`` is
    False.

    Raises FactorError if H is not finite, has a negative diagonal element (no XᵀX has), or is not positive definite
    within the limit; ValueError for arguments that cannot be meant. After an error H's contents are lost.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype != torch.float32 or (len(H) > 1 and H.stride(1) != 1):
        raise ValueError(f"H must be a square fp32 matrix with contiguous rows, not {H.dtype} {list(H.shape)}")
    chosen = _choose(H, damping, max_damping, backend)
    diagonal, dead, used = _factor_op(H[None], damping, max_damping, exact, chosen)
    return Factor(H, diagonal[0], dead[0], damping, used[0])


def factor_batch_(H: Tensor, damping: float = 0.01, max_damping: float = 1.0, backend: str = "auto") -> list[Factor]:
    """``factor_`` for several matrices of one size at once; each has a factor, dead columns and a damping of its own,
    bit for bit what ``factor_`` gives for it alone.

    H: [matrices, n, n] fp32 with contiguous rows, not overlapping. On a GPU a launch serves all of them, as small
    matrices leave most of it idle; on a CPU they follow each other, with all threads at each. The damping is raised
    only for those that need it. The FactorError of a batch names each matrix that has no factor, and why; the contents
    of all are lost.
    """
    if H.ndim != 3 or H.shape[1] != H.shape[2] or H.dtype != torch.float32 or (H.shape[1] > 1 and H.stride(2) != 1):
        raise ValueError(f"H must be square fp32 matrices with contiguous rows, not {H.dtype} {list(H.shape)}")
    diagonals, dead, used = _factor_op(H, damping, max_damping, True, _choose(H, damping, max_damping, backend))
    return [Factor(H[i], diagonals[i], dead[i], damping, used[i]) for i in range(len(H))]


def _choose(H: Tensor, damping: float, max_damping: float, backend: str) -> str:
    """The implementation that runs. Raises ValueError for dampings that cannot be meant."""
    if not 0 <= damping <= max_damping:
        raise ValueError(f"damping {damping} must lie between 0 and max_damping, {max_damping}")
    return choose(backend, H.device, triton=True, cuda=True)


def refactor_(factor: Factor, added: Tensor, backend: str = "auto") -> None:
    """U becomes that of H + λI + diag(added), in the same memory; everything else about ``factor`` stays.

    added: [n] fp32, not negative. In fp32 throughout: what is added is meant to be large. Raises FactorError if the sum
    is not positive definite.
    """
    if added.shape != factor.diagonal.shape:
        raise ValueError(f"added must be {list(factor.diagonal.shape)}, not {list(added.shape)}")
    _refactor_op(factor.U, factor.damped + added, choose(backend, factor.U.device, triton=True, cuda=True))


@torch.library.custom_op("rac::refactor_", mutates_args={"U"})
def _refactor_op(U: Tensor, diagonal: Tensor, backend: str) -> None:
    refactor_with_(U, diagonal, backend)


@_refactor_op.register_fake
def _(U: Tensor, diagonal: Tensor, backend: str) -> None:
    return None


def refactor_with_(U: Tensor, diagonal: Tensor, backend: str) -> None:
    """`refactor_` with the diagonal that the sum has, past torch's dispatcher, whose time small matrices notice."""
    H = U[None]
    mirror(backend)(H, False)
    U.diagonal().copy_(diagonal)
    if not (_CHOLESKY[backend](H) & (U.diagonal() > 0).all()):
        raise FactorError(f"H {list(U.shape)} is not positive definite with what was added to its diagonal")


def _raised(damping: float) -> float:
    return damping * 10 or FIRST_STEP


@torch.library.custom_op("rac::factor_", mutates_args={"H"})
def _factor_op(
    H: Tensor, damping: float, max_damping: float, exact: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors H [matrices, n, n]. Returns the diagonals [matrices, n], the dead columns [matrices, n] and, on the CPU,
    the (damping, λ) that did it [matrices, 2] fp64."""
    matrices, n = H.shape[:2]
    names = [f"H{f'[{i}]' if matrices > 1 else ''} [{n}, {n}]" for i in range(matrices)]
    mirror_ = mirror(backend)
    finite = mirror_(H, True)
    diagonals = H.diagonal(0, 1, 2).clone()
    dead = diagonals == 0
    means = diagonals.sum(1, dtype=torch.float64) / (n - dead.sum(1)).clamp_min(1)
    known = torch.stack([finite.double(), (diagonals >= 0).all(1).double(), dead.any(1).double(), means], 1).tolist()
    problems = []
    for i, (is_finite, is_gram, has_dead, _mean) in enumerate(known):
        if not is_finite:
            problems.append(f"{names[i]} holds infinities or NaN")
        elif not is_gram:
            column = int((diagonals[i] < 0).nonzero()[0])
            problems.append(f"{names[i]} is no Gram matrix: its diagonal element {column} is negative")
        elif has_dead:
            # Where all x² underflowed, products with other columns need not have: nothing can be told from them alone.
            nearly = dead[i].nonzero().flatten()
            H[i].index_fill_(0, nearly, 0.0).index_fill_(1, nearly, 0.0)
    if problems:
        raise FactorError("; ".join(problems))
    cholesky_ = _CHOLESKY[backend]
    if exact and H.device.type == "cpu" and backend != "triton" and n <= EXACT:
        cholesky_ = _cholesky_exact_

    def attempt(some: slice, damping: float) -> list[bool]:
        """H -> U of some of the matrices; whether it is one."""
        ridges = (damping * means[some]).to(H.dtype)[:, None]
        wanted = torch.where(dead[some], 1.0, diagonals[some] + ridges)
        found = H[some].diagonal(0, 1, 2)
        found.copy_(wanted)
        done = cholesky_(H[some])
        # A pivot that rounding alone could have made says nothing. NaN fails every comparison.
        return (done & (found.square() > torch.finfo(H.dtype).eps * wanted).all(1)).tolist()

    used = []
    for i, done in enumerate(attempt(slice(matrices), damping)):
        own, tried = damping, [f"{damping:g}"]
        while not done and (own := _raised(own)) <= max_damping:
            alone = slice(i, i + 1)
            mirror_(H[alone], False)
            tried.append(f"{own:g}")
            (done,) = attempt(alone, own)
        used.append([own, own * known[i][3]])
        if not done:
            tries = ", ".join(tried)
            problems.append(f"{names[i]} is not positive definite with damping {tries}; the limit is {max_damping:g}")
    if problems:
        raise FactorError("; ".join(problems))
    return diagonals, dead, torch.tensor(used, dtype=torch.float64).reshape(matrices, 2)


@_factor_op.register_fake
def _(H: Tensor, damping: float, max_damping: float, exact: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    diagonals = H.new_empty(H.shape[:2])
    return diagonals, diagonals.to(torch.bool), torch.empty(len(H), 2, dtype=torch.float64)


# The implementations: upper triangles of H [matrices, n, n] → U with H = U Uᵀ; what is below the diagonals stays. They
# return [matrices] bool; what is not positive definite is False, or has a diagonal element that is not positive, and is
# half done.


def _cholesky_reference_(H: Tensor) -> Tensor:
    """Left-looking from the last block of columns to the first: a block is final once the products of the columns to
    its right are taken off and its own corner is factored, which a flip makes an ordinary Cholesky."""
    done = torch.ones(len(H), dtype=torch.bool, device=H.device)
    hi = H.shape[1]
    while hi:
        lo = (hi - 1) // BLOCK * BLOCK
        corner = H[:, lo:hi, lo:hi]
        below = corner.tril(-1)
        H[:, :hi, lo:hi].baddbmm_(H[:, :hi, hi:], H[:, lo:hi, hi:].mT, alpha=-1)
        L, info = torch.linalg.cholesky_ex(corner.flip(1, 2))
        done &= info == 0
        U = L.flip(1, 2)
        corner.copy_(U + below)
        H[:, :lo, lo:hi] = torch.linalg.solve_triangular(U.mT, H[:, :lo, lo:hi], upper=False, left=False)
        hi = lo
    return done


def _cholesky_exact_(H: Tensor) -> Tensor:
    """LAPACK's factor in fp64, rounded to H's dtype at the end: one matrix after the other, as fp64 takes memory."""
    done = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    for one, ended in zip(H, done, strict=True):
        L, info = torch.linalg.cholesky_ex(one.flip(0, 1).double())
        one.tril_(-1).add_(L.to(H.dtype).flip(0, 1))  # nothing but zeros lies above L's diagonal
        ended.copy_(info == 0)
    return done


def _cholesky_native_(H: Tensor) -> Tensor:
    run, threads = native.library().factor, native.threads()
    ended = [run(one.data_ptr(), len(one), one.stride(0), threads) for one in H]
    return torch.tensor([end == native.DONE for end in ended], dtype=torch.bool)


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
def corner_kernel(  # type: ignore[no-untyped-def]
    H, h_matrix, h_row, pulls, count, pull_rows, lo, width, COLUMNS: tl.constexpr
):
    """A block's corner of a matrix, less what the columns to its right make, -> U. Not positive definite: NaN."""
    matrix = tl.program_id(0).to(tl.int64)
    H += matrix * h_matrix + lo
    pulls += matrix * count * pull_rows * COLUMNS
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
    H,
    h_matrix,
    h_row,
    pulls,
    count,
    pull_rows,
    inverse,
    lo,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows 0 .. lo of a matrix's block: less what the columns to its right make, times inv(U_bb)ᵀ."""
    matrix = tl.program_id(1).to(tl.int64)
    H += matrix * h_matrix + lo
    pulls += matrix * count * pull_rows * COLUMNS
    inverse += matrix * COLUMNS * COLUMNS
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


def _cholesky_triton_(H: Tensor, cuda_corners: bool = False) -> Tensor:
    """The reference's blocks by Triton's kernels, or the corners by CUDA's; nothing waits for the device."""
    matrices, hi = H.shape[:2]
    inverses = torch.zeros(matrices, 1, COLUMNS, COLUMNS, dtype=torch.float32, device=H.device)
    status = torch.zeros(matrices, dtype=torch.int32, device=H.device)
    fixed = {"COLUMNS": COLUMNS, "enable_fp_fusion": True}
    with torch.cuda.device_of(H):
        while hi and matrices:
            lo = (hi - 1) // COLUMNS * COLUMNS
            width = hi - lo
            pulls = product(H[:, :hi, hi:], H[:, lo:hi, hi:].mT)
            taken = (H, H.stride(0), H.stride(1), pulls, pulls.shape[1], hi)
            if cuda_corners:
                cuda.factor_corner_(H, lo, hi, inverses[:, 0, :width, :width], status, pulls)
            else:
                corner_kernel[(matrices,)](*taken, lo, width, num_warps=CORNER_WARPS, **fixed)
                invert(H[:, lo:hi, lo:hi], inverses, width)
            if lo:
                panel_kernel[(-(-lo // PANEL["ROWS"]), matrices)](*taken, inverses, lo, width, **PANEL, **fixed)
            hi = lo
    return status == 0


_CHOLESKY: dict[str, Callable[[Tensor], Tensor]] = {
    "reference": _cholesky_reference_,
    "native": _cholesky_native_,
    "triton": _cholesky_triton_,
    "cuda": partial(_cholesky_triton_, cuda_corners=True),
}


def limit(n: int, matrices: int = 1) -> Limit:
    """One Cholesky factorization, n³/3, of each matrix [n, n]: the fp32 triangle read and written."""
    return Limit(matrices * n**3 / 3, matrices * 4.0 * n * (n + 1), "tf32x3")


def workspace(n: int, device: torch.device, exact: bool = True) -> int:
    """Bytes that `factor_` takes for an H [n, n] where a CPU factors it in fp64: two copies."""
    return 16 * n * n if exact and device.type == "cpu" and n <= EXACT else 0
