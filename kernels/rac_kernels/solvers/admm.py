"""ADMM for the best mask: min tr((Q − W) H (Q − W)ᵀ) with at most k of Q's weights, or N in M, not zero.

Two copies of the weights, V free and Q on a mask, are drawn together by a penalty ρ with multipliers L:

    V ← (H + ρI)⁻¹ (H Wᵀ − Lᵀ + ρ Qᵀ),   Q ← the k largest of V + L/ρ,   L ← L + ρ (V − Q).

H is scaled to a unit diagonal first, so that one ρ suits all columns. ρ starts low, where the mask moves freely, and
rises faster the more of the mask has moved since the last check; the mask that no longer moves is the result. One
eigendecomposition of H serves every ρ.

Reference: Meng et al., "ALPS" (NeurIPS 2024, arXiv 2406.07831): ρ from 0.1, a check every 3 steps, ρ times 1.3, 1.2 or
1.1 where at least 10%, 0.5% or one of k positions changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_kernels.backends import native
from rac_kernels.backends.dispatch import choose
from rac_kernels.ops import inverse
from rac_kernels.ops.cross import cross_accumulate_
from rac_kernels.ops.factor import Factor, refactor_, refactor_with_
from rac_kernels.ops.inverse import inverse_, side_of
from rac_kernels.ops.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern, zeros_of
from rac_kernels.ops.select import mask_by_score

FIRST_PENALTY = 0.1

RENEW = 4  # steps with one penalty

INVERT = 3  # H is inverted with every so many-th penalty

PENALTY_RANGE = 6.0  # the last step's penalty by the first's

# How far steps go at first, by the mean of M's diagonal: 1 up to EVEN, then rising up to FARTHEST.
EVEN, STEEPNESS, FARTHEST = 0.32, 4.0, 1.9

ELEMENTS = 1 << 24  # elements of W that go through a step's sums and differences at a time


def admm_(
    W: Tensor,
    factor: Factor,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    steps: int = 36,
    row_groups: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Q [rows, n] fp32 as by `alps` for H + λI, by a fixed number of steps and a penalty that rises at a fixed pace.

    W: [rows, n], any float dtype. ``factor`` is of H + λI and says both; its U is overwritten. ρ grows from 0.1 to 0.6
    over the steps. With the multipliers by the penalty, L/ρ, a step is

        V ← W + (Q − L/ρ − W) M,   M = ρ (H + ρI)⁻¹,

    H scaled. M does not exceed 1, as an operator or in any element, and what it is applied to is a difference that
    every step makes anew, so two bytes an element are enough: bf16 in torch and Triton, in native code 16-bit integers,
    which any CPU multiplies faster than fp32 (csrc/cpu/int16_gemm.cpp). Rounded to 5 bits, M and the difference leave
    the objective as it is within 0.1%. A step takes 2·rows·n² FLOP. ρ rises every RENEW steps. H + λI and every
    INVERT-th of its values are factored and inverted, n³ FLOP in the memory that U has; from one to the next M goes in
    equal parts: an eigenvalue of M is a logistic curve over log ρ, which the chords follow within 0.005.

    Where H is far from even, V is taken beyond what a step makes it, over-relaxed (Boyd et al., "Distributed
    optimization and statistical learning via ADMM", 2011, 3.4.3): M's eigenvalues are ρ / (e + ρ) for H's e, and their
    mean at the first ρ, that of M's diagonal, says how far; to the last step it falls by half. With a spectrum that
    falls by a power law H gains up to a fifth of the objective by it; an even one would lose.

    Beside U M is held, and of W's size three matrices in fp32, one of two bytes, a mask and what selection takes.
    ``row_groups``: row counts of matrices stacked in W, each with its own zeros to reach. ``backend`` as in
    `rac_kernels.backends.choose`. Other arguments as for `alps`.
    """
    n = len(factor.diagonal)
    if W.ndim != 2 or W.shape[1] != n or steps < 1:
        raise ValueError(f"factor of H [{n}, {n}] must fit W {list(W.shape)}, steps {steps} be at least 1")
    pattern, U = parse_pattern(pattern), factor.U
    check_sparsity(sparsity)
    if pattern is not None:
        check_pattern_fits(pattern, n)
    weight = factor.damped
    root = weight.sqrt()
    goal = (W.to(U.dtype) * root).contiguous()
    groups = [len(W)] if row_groups is None else list(row_groups)
    is_native = choose(backend, U.device, triton=True) == "native"
    run = _Int16(goal, groups) if is_native else _Floats(goal, groups, backend)
    growth = PENALTY_RANGE ** (1 / max(-(-steps // RENEW) - 1, 1))

    def invert(index: int) -> Tensor:
        """U becomes the inverse for the penalty of that index; what M is of it, by the rows and the columns."""
        penalty = FIRST_PENALTY * growth**index
        run.invert(factor, penalty * weight)
        return root * penalty**0.5

    beyond = 0.0
    for step in range(steps):
        if step:  # before the first, Q is W and so is V
            index = step // RENEW
            if step == 1:
                scale = invert(0)
                run.scale(U, scale)
                held = float((U.diagonal() * scale.square()).mean())
                beyond = min(STEEPNESS * max(held - EVEN, 0.0), FARTHEST - 1)
            elif step % RENEW == 0:
                if (index - 1) % INVERT == 0:
                    scale = invert(index + INVERT - 1)
                run.scale(U, scale, 1 / (INVERT - (index - 1) % INVERT))
            run.multiply()
        shrink = 1 / growth if (step + 1) % RENEW == 0 and step + 1 < steps else 1.0
        run.step(1 + beyond * (1 - 0.5 * step / steps), shrink, sparsity, pattern)
    return run.T.mul_(run.kept).div_(root).add_(0.0)


def inversions(steps: int) -> int:
    """Number of times that a run of so many steps inverts H and a penalty."""
    return 1 + -(-(-(-steps // RENEW) - 1) // INVERT)


class _State:
    """State of a run, [rows, n], in H's scaled terms; `groups` are the row counts of the matrices stacked in it."""

    T: Tensor
    """fp32: Q where a weight stays, the multiplier by the penalty where it goes; the other one is zero there."""
    V: Tensor
    """fp32."""
    kept: Tensor
    """bool: what stays."""
    goal: Tensor
    """fp32: W."""

    def __init__(self, goal: Tensor, groups: list[int]) -> None:
        self.goal, self.groups = goal, groups
        self.T, self.V = goal.clone(), goal.clone()
        self.kept = torch.ones(goal.shape, dtype=torch.bool, device=goal.device)


class _Floats(_State):
    """The steps in torch and Triton, on any device: `gap`, what the next product is made of, and M in bf16."""

    def __init__(self, goal: Tensor, groups: list[int], backend: str) -> None:
        super().__init__(goal, groups)
        n = goal.shape[1]
        self.gap = torch.empty_like(goal, dtype=torch.bfloat16)
        self.M = torch.empty(n, n, dtype=torch.bfloat16, device=goal.device)
        self.backend = backend

    def invert(self, factor: Factor, added: Tensor) -> None:
        """The factor's U becomes the upper triangle of (H + λI + diag(added))⁻¹."""
        refactor_(factor, added, backend=self.backend)
        inverse_(factor.U, backend=self.backend)

    def scale(self, U: Tensor, scale: Tensor, share: float = 1.0) -> None:
        """M goes by `share` towards the symmetric matrix in U's upper triangle, its rows and columns times `scale`
        [n]; with 1 it need not hold anything."""
        n, side, M = len(U), side_of(len(U)), self.M
        for lo in range(0, n, side):
            hi = min(lo + side, n)
            band = U[lo:hi, lo:] * scale[lo:] * scale[lo:hi, None]
            if share < 1:
                band = M[lo:hi, lo:].float().lerp(band, share)
            M[lo:hi, lo:] = band
            M[hi:, lo:hi] = band[:, hi - lo :].T
            corner = band[:, : hi - lo].triu()
            M[lo:hi, lo:hi] = corner + corner.triu(1).T

    def multiply(self) -> None:
        """V is what M makes of `gap`."""
        cross_accumulate_(self.V.copy_(self.goal), self.gap.T, self.M, backend=self.backend)

    def step(self, relaxation: float, shrink: float, sparsity: float, pattern: Pattern | None) -> None:
        """T relaxed towards V, the mask of its largest, and `gap`: Q − L/ρ − W.

        Where a weight goes, T is multiplied by ``shrink``: multipliers by a penalty that is raised. V is overwritten.
        """
        some = max(1, ELEMENTS // self.T.shape[1])
        for t, v, own in zip(self.T.split(some), self.V.split(some), self.kept.split(some), strict=True):
            t.sub_(t * own, alpha=relaxation).add_(v, alpha=relaxation)
            torch.abs(t, out=v)
        for scores, own in zip(self.V.split(self.groups), self.kept.split(self.groups), strict=True):
            torch.logical_not(mask_by_score(scores, sparsity, pattern, per="matrix"), out=own)
        parts = zip(*(whole.split(some) for whole in (self.T, self.kept, self.goal, self.gap)), strict=True)
        for t, own, aim, out in parts:
            t.mul_(torch.where(own, 1.0, shrink))
            out.copy_(torch.where(own, t, -t).sub_(aim))


class _Int16(_State):
    """The steps in native code: `gap` and M in 16-bit integers, laid out for the product (csrc/cpu/int16_gemm.h)."""

    def __init__(self, goal: Tensor, groups: list[int]) -> None:
        super().__init__(goal, groups)
        n, library = goal.shape[1], native.library()
        sizes = [library.int16_sizes(rows, n) for rows in groups]
        self.gap = torch.zeros(sum(size[0] for size in sizes), dtype=torch.int32)
        self.scales = torch.zeros(sum(size[1] for size in sizes))
        self.M = torch.zeros(library.int16_sizes(0, n)[2], dtype=torch.int32)
        packed, scales = ([size[part] for size in sizes] for part in (0, 1))
        state = (self.T, self.V, self.kept, goal)
        split = (*(whole.split(groups) for whole in state), self.gap.split(packed), self.scales.split(scales))
        # A step of a small matrix is over in less time than it takes to ask tensors for these.
        self.parts = [(*(part.data_ptr() for part in one), len(one[0]), n) for one in zip(*split, strict=True)]

    def invert(self, factor: Factor, added: Tensor) -> None:
        U = factor.U
        refactor_with_(U, factor.damped + added, "native")
        native.library().inverse(U.data_ptr(), len(U), U.stride(0), native.threads())

    def scale(self, U: Tensor, scale: Tensor, share: float = 1.0) -> None:
        native.library().int16_matrix(
            self.M.data_ptr(), U.data_ptr(), U.stride(0), scale.data_ptr(), len(U), share, native.threads()
        )

    def multiply(self) -> None:
        product, M, threads = native.library().int16_gemm, self.M.data_ptr(), native.threads()
        for _, V, _, goal, gap, scales, rows, n in self.parts:
            product(V, goal, gap, scales, M, 0, rows, n, threads)

    def step(self, relaxation: float, shrink: float, sparsity: float, pattern: Pattern | None) -> None:
        admm_step, threads = native.library().admm_step, native.threads()
        keep, group = pattern or (0, 0)
        for part in self.parts:
            admm_step(*part, zeros_of(sparsity, part[-2] * part[-1]), keep, group, relaxation, shrink, threads)


def workspace(weights: int, n: int, device: torch.device) -> int:
    """Bytes that `admm_` holds of so many weights in rows of n, the fp32 result included, and M beside U."""
    return (20 if device.type == "cuda" else 23) * weights + 2 * n * n + inverse.workspace(n, device)
