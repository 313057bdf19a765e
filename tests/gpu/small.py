"""Every kernel once on small odd shapes: a line an operation says how far it is from fp64.

    python tests/gpu/small.py           # ends non-zero if anything is wrong
    python tests/gpu/small.py --csrc    # csrc/cuda alone, for compute-sanitizer; results are not looked at

Each tensor is an allocation of its own (torch's cache is turned off), so that a read or write beyond one is seen.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from rac_kernels import (
    column_norm_accumulate_,
    cross_accumulate_,
    factor_batch_,
    hessian_accumulate_,
    mask_by_score,
    objective,
    pack,
    packed_matmul,
    refine,
    sweep,
    symmetrize_,
)
from rac_kernels.backends import cuda
from rac_kernels.ops.hessian import hessian_accumulate_reference
from rac_kernels.ops.packed import VALUES, Packed, unpack
from rac_kernels.ops.select import Selection
from rac_kernels.testing import factor_error, relative_error, triangle_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Error = Callable[[Tensor, Tensor], float]


class Findings:
    """A line for each operation, as soon as it is done: its error against fp64, and what is allowed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.wrong: list[str] = []

    def near(self, name: str, found: Tensor, wanted: Tensor, plain: Tensor, error: Error = relative_error) -> None:
        """Twice the error of `plain` torch in the same dtypes is allowed, and 1e-6."""
        self.at_most(name, error(found, wanted), 2 * error(plain, wanted) + 1e-6)

    def at_most(self, name: str, own: float, allowed: float) -> None:
        """An error that may not be larger than `allowed`; NaN is."""
        good = own <= allowed
        self._say(f"{name}: error {own:.3g}, allowed {allowed:.3g}: {'right' if good else 'WRONG'}")
        if not good:
            self.wrong.append(name)


def main(
    device: str = "cuda",
    n: int = 150,
    tokens: int = 1100,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    scores: int = 21_000,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Names what is wrong. On a CPU Triton's interpreter runs it."""
    g = torch.Generator(device).manual_seed(0)
    found = Findings(say)
    for dtype in dtypes:
        X = torch.randn(tokens, n, device=device, generator=g).to(dtype)
        Y = torch.randn(tokens, n // 2, device=device, generator=g).to(dtype)
        for weights in (None, torch.rand(tokens, device=device, generator=g)):
            H = sums(found, X, Y, weights)
        W = torch.randn(37, n, device=device, generator=g).to(dtype) * (X[:37] > 0)
        for values in VALUES:
            packed = pack(W, values)
            for some in (X[:3], X[:20]):
                product(found, f"packed_matmul {values} {dtype} x {len(some)}", some, packed, W[:, 0])
    wide = pack(torch.randn(5, 4200, device=device, generator=g).half(), "int4")  # programs share its columns
    product(found, "packed_matmul wide", torch.ones(2, 4200, device=device, dtype=torch.float16), wide, None)
    for backend in ("triton", "cuda") if cuda.usable(torch.device(device)) else ("triton",):
        solve(found, device, backend, H, g, scores)
    if device == "cuda":
        torch.cuda.synchronize()
    return found.wrong


def sums(found: Findings, X: Tensor, Y: Tensor, weights: Tensor | None) -> Tensor:
    """The sums over tokens; returns H."""
    kind, (n, m), device = f"{X.dtype}{'' if weights is None else ' weighted'}", (X.shape[1], Y.shape[1]), X.device
    H = hessian_accumulate_(torch.zeros(n, n, device=device), X, weights, backend="triton")
    wide, plain = (
        hessian_accumulate_reference(torch.zeros(n, n, device=device, dtype=dtype), X, weights)
        for dtype in (torch.float64, torch.float32)
    )
    found.near(f"hessian_accumulate_ {kind}", H, wide.triu(), plain, triangle_error)
    C = cross_accumulate_(torch.zeros(n, m, device=device), X, Y, weights, backend="triton")
    w = torch.ones(len(X), device=device) if weights is None else weights
    wide, plain = (X.to(dtype).T @ (Y.to(dtype) * w[:, None]) for dtype in (torch.float64, torch.float32))
    found.near(f"cross_accumulate_ {kind}", C, wide, plain)
    norms = torch.zeros(n, device=device)
    column_norm_accumulate_(norms, X, weights, backend="triton")
    wide, plain = ((X.to(dtype).square() * w[:, None]).sum(0) for dtype in (torch.float64, torch.float32))
    found.near(f"column_norm_accumulate_ {kind}", norms, wide, plain)
    return H


def product(found: Findings, name: str, x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    """A product with a packed matrix."""
    dense = unpack(packed)
    wide = linear(x.double(), dense.double(), None if bias is None else bias.double())
    plain = linear(x, dense, bias)
    found.near(name, packed_matmul(x, packed, bias, backend="triton"), wide, plain)


def solve(found: Findings, device: str, backend: str, H: Tensor, g: torch.Generator, scores: int) -> None:
    """What comes after the calibration, from H's upper triangle on."""
    n = H.shape[0]
    full = symmetrize_(H.clone(), backend="triton")
    mirrored = H.triu() + H.triu(1).T
    found.at_most(f"symmetrize_, {backend}", float((full - mirrored).abs().max()), 0)
    W = torch.randn(37, n, device=device, generator=g)
    factor = factor_batch_(torch.stack([H, 2 * H]), backend=backend)[1]
    damped = 2 * mirrored.double()
    damped.diagonal().add_(factor.ridge)
    plain = torch.linalg.cholesky(damped.float().flip(0, 1)).flip(0, 1)
    found.near(f"factor_batch_, {backend}", factor.U, damped, plain, factor_error)
    # More than a program counts at a time, and so few values that those equal to the threshold have to be told apart.
    many = (torch.rand(scores + 5, device=device, generator=g) * 7).floor()
    selection = Selection(2, many.device, backend)
    for share in (0, 0.4, 1):
        ks = [int(share * scores), int(share * 5)]
        selection.run(many, [scores, 5], ks)
        missed = sum(
            abs(int(((part < limit) | ((part == limit) & (torch.arange(len(part), device=device) <= last))).sum()) - k)
            for part, limit, last, k in zip(
                many.split([scores, 5]), selection.thresholds, selection.last, ks, strict=True
            )
        )
        found.at_most(f"selection of {share}, {backend}", missed, 0)
    # Rounding tips near ties between scores: what is held is the objective, beside the reference's.
    for sparsity, pattern in ((0.5, None), (0.5, "1:3")):
        both = [sweep(W, factor.U, sparsity, pattern, row_groups=[30, 7], backend=b) for b in (backend, "reference")]
        own, theirs = (objective(W, Q, H) for Q in both)
        found.at_most(f"sweep {pattern or sparsity}, {backend}", own / theirs, 1.02)
        better = [refine(both[1], full, W, backend=b, iterations=3)[0] for b in ("triton", "reference")]
        own, theirs = (objective(W, Q, H) for Q in better)
        found.at_most(f"refine {pattern or sparsity}", own / theirs, 1.01)
    table = many[:scores].view(30, -1)
    for per in ("row", "matrix") if backend == "triton" else ("matrix",):
        masks = [mask_by_score(table, per=per, backend=b) for b in (backend, "reference")]
        found.at_most(f"mask_by_score per {per}, {backend}", int((masks[0] != masks[1]).sum()), 0)


def csrc(n: int = 150, scores: int = 21_000) -> None:
    """The kernels of csrc/cuda alone, on the GPU, for compute-sanitizer."""
    H, status = torch.eye(n, device="cuda").repeat(2, 1, 1), torch.zeros(2, dtype=torch.int32, device="cuda")
    for lo, hi in ((128, n), (0, 128)):
        inverse = torch.empty(2, hi - lo, hi - lo, device="cuda")
        cuda.factor_corner_(H, lo, hi, inverse, status, torch.zeros(2, 3, hi, hi - lo, device="cuda"))
    many = (torch.rand(scores + 5, device="cuda") * 7).floor()
    for share in (0, 0.4, 1):
        cuda.select_thresholds(many, [scores, 5], [int(share * scores), int(share * 5)])
    torch.cuda.synchronize()


if __name__ == "__main__":
    if "--csrc" in sys.argv:
        csrc()
    elif wrong := main(say=partial(print, flush=True)):  # who is stopped has said what was found
        sys.exit(f"wrong: {', '.join(wrong)}")
