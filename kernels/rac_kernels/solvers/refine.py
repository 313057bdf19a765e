"""Masked least squares: the best weights on a given mask, by conjugate gradients over all rows at once.

With the mask fixed, each row of min tr((Q − T) H (Q − T)ᵀ) is a linear system of its own, H_SS q_S = (T H)_S for the
row's support S. One product with H serves an iteration of all rows, so the cost is that of a matrix product, 2·rows·n²
FLOP an iteration. Everything else is a pass over the rows, fused: two dots, two updates and the next direction.
Preconditioned by H's diagonal (Jacobi): scaling a column of X with its weight changes nothing.

Where the rows' supports are small each row is solved exactly instead: gathered, a batched Cholesky factorization of its
own H_SS in fp64. Which it is depends on the shape alone.

Reference: Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems" (1952); as the last step of a
pruning solver, Meng et al., "ALPS" (NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.limits import Limit

TRIANGLES = ("full", "upper", "lower")

WAYS = ("auto", "gradients", "exact")

SIDE = 1024  # columns of H that a product takes at a time where only a triangle is given

COARSE = 5e-3  # a tolerance that the errors of 16-bit products, some 1e-4, do not keep from being reached

ROWS = 2048  # rows refined at a time, at most

ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 24}  # and weights: some ten matrices of that many are held, H read for each

EXACT_ELEMENTS = 1 << 24  # elements of the rows' own H_SS, fp64, held at a time


@dataclass(frozen=True)
class RefineResult:
    """Outcome of `refine`. Objectives are sums over the rows, made in fp64 of products made in H's dtype.

    The numbers are fetched from the device when they are first asked for: torch.compile can pass `rows` on.
    """

    rows: Tensor
    """[rows, 6] fp64: each row's iterations, residual, objective before and after, whether it kept the Q given and
    whether it was solved exactly."""

    @property
    def method(self) -> str:
        """ "gradients" or "exact"."""
        return "exact" if self._most[5] else "gradients"

    @property
    def iterations(self) -> int:
        """Products with H, the most that any row took; the first and the last, which measure, not counted."""
        return int(self._most[0])

    @property
    def residual(self) -> float:
        """‖r‖ at the end by ‖r‖ at the start in the worst row; r = (T − Q) H on the mask, in the norm of H's
        diagonal⁻¹."""
        return self._most[1]

    @property
    def before(self) -> float:
        """tr((Q − T) H (Q − T)ᵀ) of the Q given, without what lay outside the mask."""
        return self._sums[2]

    @property
    def after(self) -> float:
        """tr((Q − T) H (Q − T)ᵀ) of the Q returned; never above ``before`` but for rounding."""
        return self._sums[3]

    @property
    def kept(self) -> int:
        """Rows for which no better Q was found than the one given."""
        return int(self._sums[4])

    @cached_property
    def _most(self) -> list[float]:
        return self.rows.amax(0).tolist() if len(self.rows) else [0.0] * 6

    @cached_property
    def _sums(self) -> list[float]:
        return self.rows.sum(0).tolist()


def refine(
    Q: Tensor,
    H: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    triangle: str = "full",
    diagonal: Tensor | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
    method: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, RefineResult]:
    """The Q [rows, n] on the mask that minimises tr((Q − target) H (Q − target)ᵀ), from the given Q on.

    Q: [rows, n], any float dtype, where to start; read, never written. H: [n, n] fp32, symmetric positive
    semidefinite; ``triangle`` says where it stands: "full", or "upper" or "lower" with the rest never read.
    ``diagonal``: [n], H's diagonal where it is not H's own. After ``factor_`` H is in the lower triangle of
    ``factor.U``: pass ``factor.U, triangle="lower", diagonal=factor.diagonal``, plus ``factor.ridge`` to refine under
    H + λI. target: [rows, n], any float dtype. mask: [rows, n] bool, True for what stays; None means where Q is not 0.

    Each row stops when its residual is ``tolerance`` times what it was at the start, at the latest after
    ``iterations``. Rows whose objective did not fall, or is NaN, keep the Q given, so none rises. Columns with H_ii = 0
    keep their weights. ``method`` "auto" solves the rows exactly where that is the cheaper way (see `solves_exactly`);
    rows whose H_SS is singular are left to the gradients even so. An H of fp64 is served by the reference, in fp64
    throughout.

    With a ``tolerance`` of at least COARSE and all of H there, native code multiplies the directions by H in 16-bit
    integers, relative to the norms of the rows and columns; what is measured at both ends is still of fp32 products.

    Returns Q in H's dtype, exactly +0.0 outside the mask, and how it went. Raises ValueError for shapes, dtypes,
    devices or numbers that do not fit.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"H must be a square fp32 matrix, not {H.dtype} {list(H.shape)}")
    n = H.shape[0]
    if triangle not in TRIANGLES:
        raise ValueError(f"triangle {triangle!r} must be one of {', '.join(TRIANGLES)}")
    if method not in WAYS:
        raise ValueError(f"method {method!r} must be one of {', '.join(WAYS)}")
    if Q.ndim != 2 or Q.shape[1] != n or target.shape != Q.shape:
        raise ValueError(f"Q and target must be [rows, {n}] to fit H, not {list(Q.shape)} and {list(target.shape)}")
    if not (Q.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"Q and target must be floating point, not {Q.dtype} and {target.dtype}")
    if mask is not None and (mask.shape != Q.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(Q.shape)}, not {mask.dtype} {list(mask.shape)}")
    if diagonal is not None and diagonal.shape != (n,):
        raise ValueError(f"diagonal must be [{n}], not {list(diagonal.shape)}")
    if iterations < 0 or not tolerance >= 0:
        raise ValueError(f"iterations {iterations} and tolerance {tolerance} must be at least 0")
    if not all(t is None or t.device == H.device for t in (Q, target, mask, diagonal)):
        raise ValueError(f"Q, target, mask and diagonal must be on H's device, {H.device}")
    chosen = choose(backend, H.device, triton=True) if H.dtype == torch.float32 else "reference"
    refined, rows = _refine_op(Q, H, target, mask, triangle, diagonal, iterations, tolerance, method, chosen)
    return refined, RefineResult(rows)


@dataclass(frozen=True)
class _Task:
    """How the rows are refined, as the schema has it."""

    iterations: int
    tolerance: float
    method: str
    backend: str


class _Rows(NamedTuple):
    """Some rows of what was given, [rows, n]: in H's dtype, and `start` exactly +0.0 outside the mask."""

    start: Tensor
    mask: Tensor
    target: Tensor


class _Beginning(NamedTuple):
    """The rows' state before the first step."""

    first: Tensor
    """[rows, n]: the residual (target − start) H on the mask."""
    found: Tensor
    """[rows, 4] fp64, as `_begin` returns it."""


class _Gradients(NamedTuple):
    """Conjugate gradients between two products with H, all updated in place but A, mask, inverse and done_at."""

    Q: Tensor
    R: Tensor
    """[rows, n]: the residual on the mask."""
    P: Tensor
    """[rows, n]: the direction."""
    A: Tensor
    """[rows, n]: P H."""
    mask: Tensor
    inverse: Tensor
    """[n]: H's diagonal⁻¹."""
    sizes: Tensor
    """[rows] fp64: 〈R, inverse R〉, 0 for rows that are done; those stay as they are."""
    done_at: Tensor
    """[rows] fp64: the size at which a row is done."""
    counts: Tensor
    """[rows] int32: the steps made."""


class System(NamedTuple):
    """H, of which `triangle` is read, with `diagonal` [n] in place of its own; `inverse` [n] is 1 / diagonal or 0."""

    H: Tensor
    triangle: str
    diagonal: Tensor
    inverse: Tensor


@torch.library.custom_op("rac::refine", mutates_args=())
def _refine_op(
    Q: Tensor,
    H: Tensor,
    target: Tensor,
    mask: Tensor | None,
    triangle: str,
    diagonal: Tensor | None,
    iterations: int,
    tolerance: float,
    method: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns Q and RefineResult's rows."""
    rows, n = Q.shape
    refined = Q.new_empty(rows, n, dtype=H.dtype)
    found = torch.zeros(rows, 6, dtype=torch.float64, device=H.device)
    diagonal = (H.diagonal() if diagonal is None else diagonal).to(H.dtype).contiguous()
    system = System(H, triangle, diagonal, torch.where(diagonal > 0, 1 / diagonal, 0))
    each = max(1, min(ROWS, ELEMENTS.get(H.device.type, ELEMENTS["cpu"]) // max(n, 1)))
    coarse = backend == "native" and triangle == "full" and tolerance >= COARSE and 1 in H.stride()
    multiply = _Coarse(system, min(each, rows)) if coarse else partial(symmetric_product, system=system)
    task = _Task(iterations, tolerance, method, backend)
    with _full_precision(), torch.cuda.device_of(H):
        for lo in range(0, rows, each):
            some = slice(lo, min(lo + each, rows))
            keep = (Q[some] != 0 if mask is None else mask[some]).contiguous()
            start = Q[some].to(H.dtype).contiguous()
            start = start + 0.0 if mask is None else torch.where(keep, start, 0)  # −0.0 becomes +0.0
            aim = target[some].to(H.dtype).contiguous()
            _refine_rows(refined[some], found[some], _Rows(start, keep, aim), system, multiply, task)
    return refined, found


@_refine_op.register_fake
def _(
    Q: Tensor,
    H: Tensor,
    target: Tensor,
    mask: Tensor | None,
    triangle: str,
    diagonal: Tensor | None,
    iterations: int,
    tolerance: float,
    method: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return Q.new_empty(Q.shape, dtype=H.dtype), Q.new_empty(Q.shape[0], 6, dtype=torch.float64)


@contextmanager
def _full_precision() -> Iterator[None]:
    """torch's fp32 products in fp32, whatever the caller allows elsewhere: TF32 would stop the gradients early.

    torch has an older and a newer way to say it, and raises where the older is read after the newer was used.
    """
    places = [getattr(torch.backends, name) for name in ("cuda", "mkldnn")]
    places = [place.matmul for place in places if hasattr(getattr(place, "matmul", None), "fp32_precision")]
    newer = [place.fp32_precision for place in places]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    if older != "highest":
        torch.set_float32_matmul_precision("highest")
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for place, before in zip(places, newer, strict=True):
            place.fp32_precision = "none"  # then it gives what holds for all of torch
            if place.fp32_precision != before:
                place.fp32_precision = before


def symmetric_product(A: Tensor, system: System, out: Tensor) -> Tensor:
    """out [rows, n] = A H.

    A triangle is read in bands of SIDE columns, each used as it is and transposed: no full H is made.
    """
    H, triangle, diagonal, _ = system
    if triangle == "full":
        torch.mm(A, H, out=out)
        return out.addcmul_(A, diagonal - H.diagonal())
    n = H.shape[0]
    if triangle == "upper":
        H = H.T
    out.zero_()
    for lo in range(0, n, SIDE):
        hi = min(lo + SIDE, n)
        corner = H[lo:hi, lo:hi].tril(-1)
        corner = corner + corner.T
        corner.diagonal().copy_(diagonal[lo:hi])
        out[:, lo:hi].addmm_(A[:, lo:hi], corner)
        if hi < n:
            out[:, lo:hi].addmm_(A[:, hi:], H[hi:, lo:hi])
            out[:, hi:].addmm_(A[:, lo:hi], H[hi:, lo:hi].T)
    return out


class _Coarse:
    """Products with H in 16-bit integers, laid out by csrc/cpu/int16_gemm.h, for `rows` rows at most.

    They are of P diag(H)^½ with diag(H)^−½ H, each column of that by its norm: no column of X counts for its size.
    """

    def __init__(self, system: System, rows: int) -> None:
        self.system = system
        self.root = system.diagonal.clamp_min(0).sqrt()
        packed, scales, self.size = native.library().int16_sizes(rows, len(self.root))
        self.packed, self.scales = torch.zeros(packed, dtype=torch.int32), torch.zeros(scales)

    @cached_property
    def matrix(self) -> tuple[Tensor, Tensor]:
        """M and its columns' norms."""
        H, _, diagonal, inverse = self.system
        M, norms, scale = torch.zeros(self.size, dtype=torch.int32), torch.empty_like(diagonal), inverse.sqrt()
        to, by, of, *rest = (t.data_ptr() for t in (M, norms, H, scale, diagonal))
        stride = H.stride(0) if H.stride(1) == 1 else H.stride(1)
        native.library().int16_columns(to, by, of, stride, *rest, len(H), native.threads())
        return M, norms

    def __call__(self, P: Tensor, out: Tensor) -> None:
        library, threads = native.library(), native.threads()
        packed, scales, M, norms = (t.data_ptr() for t in (self.packed, self.scales, *self.matrix))
        library.int16_rows(packed, scales, P.data_ptr(), self.root.data_ptr(), *P.shape, threads)
        library.int16_gemm(out.data_ptr(), 0, packed, scales, M, norms, *P.shape, threads)


def _dot(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Row by row, in fp64: [rows]. weights: [n]."""
    a = a.double()
    return torch.linalg.vecdot(a if weights is None else a * weights, b.double())


def _refine_rows(
    Q: Tensor, found: Tensor, given: _Rows, system: System, multiply: Callable[..., object], task: _Task
) -> None:
    """Q = start, refined; found as `_refine_op` returns it. multiply(P, out=…) is P H."""
    is_native = task.backend == "native"
    start, mask, target = given
    Q.copy_(start)
    work = torch.empty_like(Q)
    error = target - Q
    symmetric_product(error, system, work)
    R, P, begun = (_begin_native if is_native else _begin)(error, work, mask, system)
    beginning = _Beginning(R.clone(), begun)
    before, size, support, _ = begun.unbind(1)
    # Below the second figure lies what rounding makes of an optimum: |r_j| ≤ √(H_jj objective) if exact.
    done_at = torch.maximum(size * task.tolerance**2, before * support * (torch.finfo(Q.dtype).eps / 4) ** 2)
    counts = torch.zeros(len(Q), dtype=torch.int32, device=Q.device)
    method = task.method
    widest = int(support.max()) if method != "gradients" and support.numel() else 0
    if method == "exact" or (method == "auto" and solves_exactly(widest, Q.shape[1], task.iterations, Q.device)):
        solved = _exact(Q, mask, R, widest, system)
        found[:, 5] = solved
        done_at.masked_fill_(solved, torch.inf)
    sizes = torch.where(size > done_at, size, 0)
    step = {"native": _step_native, "triton": _step_triton}.get(task.backend, _step_reference)
    state = _Gradients(Q, R, P, work, mask, system.inverse, sizes, done_at, counts)
    looks = LOOKS if Q.is_cuda else 1
    going = bool((sizes > 0).any())
    for iteration in range(task.iterations):
        if not going:
            break
        multiply(P, out=work)
        left = step(state)
        going = iteration % looks != looks - 1 or bool(left)
    del R, P, state
    torch.sub(target, Q, out=error)
    symmetric_product(error, system, work)
    end = _end_native if is_native else _end
    after, last, better = end(Q, given, error, work, system, beginning).unbind(1)
    found[:, 0] = counts
    found[:, 1] = torch.where(size > 0, (last / size).sqrt(), 0)
    found[:, 2] = before
    found[:, 3] = torch.where(better > 0, after, before)
    found[:, 4] = better == 0


def _begin(error: Tensor, product: Tensor, mask: Tensor, system: System) -> tuple[Tensor, Tensor, Tensor]:
    """R, P [rows, n]; [rows, 4] fp64: the objective 〈error, product〉, the residual 〈R, P〉, what the mask keeps and
    〈error, diagonal error〉. product is error H."""
    R = product * mask  # on a CPU three times as fast as where; what is not finite makes the row keep its Q
    P = R * system.inverse
    found = [_dot(error, product), _dot(R, P), mask.sum(1), _dot(error, error, system.diagonal)]
    return R, P, torch.stack([number.double() for number in found], 1)


def _begin_native(error: Tensor, product: Tensor, mask: Tensor, system: System) -> tuple[Tensor, Tensor, Tensor]:
    R, P = torch.empty_like(error), torch.empty_like(error)
    found = error.new_empty(len(error), 4, dtype=torch.float64)
    tensors = (error, product, mask, system.diagonal, system.inverse, R, P, found)
    native.library().refine_begin(*(t.data_ptr() for t in tensors), *R.shape, native.threads())
    return R, P, found


def _end(Q: Tensor, given: _Rows, error: Tensor, product: Tensor, system: System, beginning: _Beginning) -> Tensor:
    """Rows of Q that are no better than what was given become that. error is target − Q, product error H. Returns
    [rows, 3] fp64: the objective of the Q that came, the residual of what Q then is, whether it was better."""
    (start, mask, _), (first, begun) = given, beginning
    moved, R = Q - start, product * mask
    # The fall of the objective, by differences that do not cancel: 〈Q − start, r at the start + r at the end〉. It has
    # to exceed what rounding makes of it, each element of r being a sum of n products, |H_ij| ≤ √(H_ii H_jj).
    fall = _dot(moved, first + R)
    far, left = (_dot(a, a, system.diagonal).sqrt() for a in (moved, error))
    better = fall > torch.finfo(Q.dtype).eps * far * (begun[:, 3].sqrt() + left)
    Q.copy_(torch.where(better[:, None], Q, start))
    R = torch.where(better[:, None], R, first)
    return torch.stack([_dot(error, product), _dot(R, R, system.inverse), better.double()], 1)


def _end_native(
    Q: Tensor, given: _Rows, error: Tensor, product: Tensor, system: System, beginning: _Beginning
) -> Tensor:
    (start, mask, _), (first, begun) = given, beginning
    found = begun.new_empty(len(Q), 3)
    tensors = (Q, start, error, product, mask, first, system.diagonal, system.inverse, begun, found)
    native.library().refine_end(*(t.data_ptr() for t in tensors), *Q.shape, native.threads())
    return found


LOOKS = 4  # on a GPU, iterations between one look at whether any row goes on and the next: looking means waiting


def solves_exactly(support: int, n: int, iterations: int, device: torch.device) -> bool:
    """Whether rows of at most `support` kept weights are solved one by one rather than by gradients together.

    Gradients take 2n² FLOP an iteration and row at the speed of a large product; a row's own H_SS has to be gathered
    and factored, support³/3 FLOP and support² numbers moved, at the speed of small ones.
    """
    speed, moved = EXACT_COST["cuda" if device.type == "cuda" else "cpu"]
    return speed * support**3 / 3 + moved * support**2 < 2.0 * n * n * (iterations + 1)


#: FLOP of a large product that go by in the time of one of a batched small Cholesky, and of one gathered number. The
#: CPU's were measured (256 columns: 26 ns a number gathered and factored, 37 GFLOP/s of product, which by the residual
#: stops after half its iterations); no GPU was, which has the CPU's.
EXACT_COST = {"cpu": (1.0, 2000.0), "cuda": (1.0, 2000.0)}


def _exact(Q: Tensor, mask: Tensor, R: Tensor, widest: int, system: System) -> Tensor:
    """Q += the solution D of H_SS D_S = R_S, row by row, by batched Cholesky in fp64. Returns [rows] bool: which rows
    could be solved; the others are untouched."""
    H, triangle, diagonal, _ = system
    rows = len(Q)
    solved = torch.zeros(rows, dtype=torch.bool, device=Q.device)
    if not widest:
        return ~solved
    each = max(1, EXACT_ELEMENTS // widest**2)
    for lo in range(0, rows, each):
        some = slice(lo, min(lo + each, rows))
        kept, columns = mask[some].to(torch.int8).sort(dim=1, descending=True, stable=True)
        kept, columns = kept[:, :widest] > 0, columns[:, :widest].contiguous()
        i, j = columns[:, :, None], columns[:, None, :]
        if triangle != "full":
            # The columns rise, but for the filling, so that the lower triangle is (later, earlier).
            i, j = (
                (torch.maximum(i, j), torch.minimum(i, j))
                if triangle == "lower"
                else (torch.minimum(i, j), torch.maximum(i, j))
            )
        own = H[i, j].double()
        # Columns that are not there, and dead ones, stand alone with a unit diagonal.
        alive = kept & (diagonal[columns] > 0)
        own.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0)
        own.diagonal(0, 1, 2).copy_(torch.where(alive, diagonal[columns].double(), 1.0))
        side = R[some].gather(1, columns).double().masked_fill_(~alive, 0)
        L, info = torch.linalg.cholesky_ex(own)
        found = torch.cholesky_solve(side[:, :, None], L)[:, :, 0].to(Q.dtype)
        fine = (info == 0) & found.isfinite().all(1)
        Q[some] = Q[some].scatter_add(1, columns, found.masked_fill_(~fine[:, None], 0))
        solved[some] = fine
    return solved


def _step_reference(state: _Gradients) -> Tensor:
    """The step between two products with H. Returns whether any row goes on."""
    Q, R, P, A, mask, inverse, sizes, done_at, counts = state
    curvature = _dot(P, A)
    step = sizes / curvature
    going = (sizes > 0) & (curvature > 0) & step.isfinite()
    step = torch.where(going, step, 0).to(Q.dtype)[:, None]
    Q.addcmul_(P, step)
    R.sub_(torch.where(mask, A * step, 0))
    Z = R * inverse
    new = _dot(R, Z)
    turn = torch.where(going, new / sizes, 0).to(Q.dtype)[:, None]
    P.copy_(torch.where(going[:, None], Z + turn * P, P))
    counts += going
    sizes.copy_(torch.where(going & (new > done_at), new, 0))
    return (sizes > 0).any()


def _step_native(state: _Gradients) -> int:
    return native.library().refine_step(*(t.data_ptr() for t in state), *state.Q.shape, native.threads())


@gpu.jit("n")
def step_kernel(Q, R, P, A, mask, inverse, sizes, done_at, counts, left, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program: the dots, the step, the next direction. `left` counts the rows that go on."""
    row = tl.program_id(0)
    size = tl.load(sizes + row)
    if size > 0:
        at = row.to(tl.int64) * n
        Q += at
        R += at
        P += at
        A += at
        mask += at
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, n, BLOCK):
            j = first + lanes
            sums += tl.load(P + j, mask=j < n, other=0.0) * tl.load(A + j, mask=j < n, other=0.0)
        curvature = tl.sum(sums.to(tl.float64), 0)
        step = (size / curvature).to(tl.float32)
        new = tl.zeros((), tl.float64)
        # Without curvature, or with NaN, there is no step to make: the row is done.
        if (curvature > 0) & (step < float("inf")):
            sums = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, n, BLOCK):
                j = first + lanes
                inside = j < n
                kept = tl.load(mask + j, mask=inside, other=0) != 0
                p = tl.load(P + j, mask=inside, other=0.0)
                tl.store(Q + j, tl.load(Q + j, mask=inside, other=0.0) + step * p, mask=inside)
                a = tl.where(kept, tl.load(A + j, mask=inside, other=0.0), 0.0)
                r = tl.load(R + j, mask=inside, other=0.0) - step * a
                tl.store(R + j, r, mask=inside)
                sums += r * tl.load(inverse + j, mask=inside, other=0.0) * r
            tl.debug_barrier()  # what one thread stored another may load
            new = tl.sum(sums.to(tl.float64), 0)
            tl.atomic_add(counts + row, 1)
            turn = (new / size).to(tl.float32)
            if new > tl.load(done_at + row):
                tl.atomic_add(left, 1)
                for first in range(0, n, BLOCK):
                    j = first + lanes
                    inside = j < n
                    z = tl.load(R + j, mask=inside, other=0.0) * tl.load(inverse + j, mask=inside, other=0.0)
                    tl.store(P + j, z + turn * tl.load(P + j, mask=inside, other=0.0), mask=inside)
            else:
                new = tl.zeros((), tl.float64)
        tl.store(sizes + row, new)


BLOCK, WARPS = 512, 4


def _step_triton(state: _Gradients) -> Tensor:
    Q = state.Q
    left = torch.zeros(1, dtype=torch.int32, device=Q.device)
    if Q.numel():
        tensors = state._replace(mask=state.mask.view(torch.uint8))
        step_kernel[(len(Q),)](*tensors, left, Q.shape[1], BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)
    return left


def limit(rows: int, n: int, iterations: int) -> Limit:
    """A product with H [n, n] an iteration, and one before and after them to measure: each time H, Q, R, P [rows, n]
    and the product are read and those four written, in fp32."""
    products = iterations + 2
    return Limit(2.0 * rows * n * n * products, products * (4.0 * n * n + 4.0 * 8 * rows * n), "fp32")


def workspace(rows: int, n: int, kept: int, iterations: int, device: torch.device, method: str = "auto") -> int:
    """Bytes that `refine` takes for a Q [rows, n] with `kept` weights a row in the mean, beside what it is given and
    returns. Rows are refined some at a time; native code takes less for them than torch."""
    some = min(rows, ROWS, max(ELEMENTS[device.type] // n, 1))
    exactly = method == "exact" or (method == "auto" and solves_exactly(kept, n, iterations, device))
    # The row that keeps most has half as many again as the mean.
    gathered = 40 * min(EXACT_ELEMENTS, some * (3 * kept // 2) ** 2) if exactly else 0
    if device.type == "cuda" or not native.available():
        return 58 * some * n + gathered
    return 28 * some * n + 2 * n * n + gathered  # H in 16-bit integers
