"""Every kernel once on small odd shapes, for compute-sanitizer: python tests/gpu/small.py

Results are not looked at here; the tests do that. Each tensor is an allocation of its own (torch's cache is turned
off), so that a read or write beyond one is seen.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from rac_kernels import (
    column_norm_accumulate_,
    cross_accumulate_,
    factor_batch_,
    hessian_accumulate_,
    mask_by_score,
    pack,
    packed_matmul,
    refine,
    sweep,
    symmetrize_,
)
from rac_kernels.backends import cuda
from rac_kernels.ops.packed import VALUES
from rac_kernels.ops.select import Selection

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(
    device: str = "cuda",
    n: int = 150,
    tokens: int = 1100,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    scores: int = 21_000,
) -> None:
    """On a CPU Triton's interpreter runs it."""
    g = torch.Generator(device).manual_seed(0)
    for dtype in dtypes:
        X = torch.randn(tokens, n, device=device, generator=g).to(dtype)
        Y = torch.randn(tokens, n // 2, device=device, generator=g).to(dtype)
        for weights in (None, torch.rand(tokens, device=device, generator=g)):
            H = torch.zeros(n, n, device=device)
            hessian_accumulate_(H, X, weights, backend="triton")
            cross_accumulate_(torch.zeros(n, n // 2, device=device), X, Y, weights, backend="triton")
            column_norm_accumulate_(torch.zeros(n, device=device), X, weights, backend="triton")
        W = torch.randn(37, n, device=device, generator=g).to(dtype) * (X[:37] > 0)
        for values in VALUES:
            packed = pack(W, values)
            for some in (X[:3], X[:20]):
                packed_matmul(some, packed, W[:, 0], backend="triton")
    wide = pack(torch.randn(5, 4200, device=device, generator=g).half(), "int4")  # programs share its columns
    packed_matmul(torch.ones(2, 4200, device=device, dtype=torch.float16), wide, backend="triton")
    for backend in ("triton", "cuda") if cuda.usable(torch.device(device)) else ("triton",):
        solve(device, backend, H, g, scores)
    if device == "cuda":
        torch.cuda.synchronize()


def solve(device: str, backend: str, H: torch.Tensor, g: torch.Generator, scores: int) -> None:
    """What comes after the calibration, from H's upper triangle on."""
    n = H.shape[0]
    full = symmetrize_(H.clone(), backend="triton")
    W = torch.randn(37, n, device=device, generator=g)
    factor = factor_batch_(torch.stack([H, 2 * H]), backend=backend)[1]
    # More than a program counts at a time, and so few values that those equal to the threshold have to be told apart.
    many = (torch.rand(scores + 5, device=device, generator=g) * 7).floor()
    selection = Selection(2, many.device, backend)
    for share in (0, 0.4, 1):
        selection.run(many, [scores, 5], [int(share * scores), int(share * 5)])
    for sparsity, pattern in ((0.5, None), (0.5, "1:3")):
        Q = sweep(W, factor.U, sparsity, pattern, row_groups=[30, 7], backend=backend)
        refine(Q, full, W, backend="triton", iterations=3)
    for per in ("row", "matrix") if backend == "triton" else ("matrix",):
        mask_by_score(many[:scores].view(30, -1), per=per, backend=backend)


if __name__ == "__main__":
    main()
