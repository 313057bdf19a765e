"""The product with a packed matrix against torch's bf16 product with the same matrix unpacked.

On a GPU as many products as outgrow the cache are captured in a graph, each with a copy of the matrix of its own.
"""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch.nn.functional import linear

from rac_kernels import pack, packed_matmul, unpack
from rac_kernels.ops import limits
from rac_kernels.ops import packed_matmul as op
from rac_kernels.ops.packed import VALUES, Packed, Values

OUTGROWN = 256 << 20  # bytes of weights that no cache holds
SPARSITIES = (0.5, 0.7, 0.8)
MOST = 64  # products in a graph


def one(bench: Bench, rows: int, columns: int, sparsity: float, values: Values) -> list[Measurement]:
    W = bench.randn(rows, columns)
    W *= W.abs() > 2**0.5 * torch.tensor(sparsity).erfinv().item()  # a normal distribution's smallest
    matrix = pack(W.bfloat16(), values)
    del W
    dense = unpack(matrix)
    found = []
    for tokens in (1, 4, 16, 64, 4096) if bench.cuda() else (1, 4, 16, 64, 512):
        X = bench.activations(columns, tokens)
        calls = min(MOST, -(-OUTGROWN // len(matrix.data))) if bench.cuda() and tokens <= 64 else 1
        packed = [Packed(matrix.data.clone(), matrix.layout) for _ in range(calls)]
        copies = [dense.clone() for _ in range(min(calls, -(-OUTGROWN // dense.nbytes)))]

        def ours(X: torch.Tensor = X, packed: list[Packed] = packed) -> None:
            for one in packed:
                packed_matmul(X, one)

        def torchs(X: torch.Tensor = X, copies: list[torch.Tensor] = copies, calls: int = calls) -> None:
            for index in range(calls):
                linear(X, copies[index % len(copies)])

        plain = "torch, bf16, dense"
        cases: dict[str, common.Case] = {OURS: graph(bench, ours), plain: graph(bench, torchs)}
        strip = slice(0, min(rows, 256))
        exact = X.double() @ dense[strip].double().T
        scale = exact.abs().max().item()
        errors = {OURS: packed_matmul(X, matrix), plain: linear(X, dense)}
        extra = {
            name: {
                "rounded": f"{(Y[:, strip].double() - exact).abs().max().item() / scale:.1e}",
                "bytes": len(matrix.data) if name == OURS else dense.nbytes,
                "calls": calls,
            }
            for name, Y in errors.items()
        }
        limit = op.limit(tokens, rows, columns, len(matrix.data))
        found += bench.measure(
            "packed",
            f"{rows}x{columns} {sparsity:.0%} {values}, {tokens} tokens",
            columns,
            cases,
            limit=limits.Limit(limit.flops * calls, limit.moved * calls, limit.peak),
            extra=extra,
        )
    return found


def graph(bench: Bench, run: common.Case) -> common.Case:
    """On a GPU what launches everything that `run` does at once, so that the time is the device's."""
    if not bench.cuda():
        return run
    run()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def run(bench: Bench) -> list[Measurement]:
    shapes = list(dict.fromkeys([*bench.shapes, (min(map(min, bench.shapes)),) * 2]))
    return [
        found
        for rows, columns in shapes
        for sparsity in SPARSITIES
        for values in VALUES
        for found in one(bench, rows, columns, sparsity, values)
    ]


if __name__ == "__main__":
    common.main(__doc__, {"packed": run})
