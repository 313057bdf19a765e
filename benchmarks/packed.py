"""The product with a packed matrix against torch's bf16 product with the same matrix unpacked.

On a CPU one token has a second rival, written here (dense.cpp). To see a processor without AVX-512:
RAC_NATIVE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/packed.py

Every product finds a copy of the matrix that no cache holds, as in a model. On a GPU as many products as outgrow the
cache are captured in a graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import common
import dense as written
import torch
from common import OURS, Bench, Measurement
from torch.nn.functional import linear

from rac_kernels import pack, packed_matmul, unpack
from rac_kernels.ops import limits
from rac_kernels.ops import packed_matmul as op
from rac_kernels.ops.packed import VALUES, Packed, Values

OUTGROWN = 256 << 20  # bytes of weights that no cache holds
SPARSITIES = (0.5, 0.7, 0.8)
COPIES = 1024  # of a small matrix
MOST = 64  # products that are timed together


def copied(tensor: torch.Tensor) -> list[torch.Tensor]:
    """As many of the same as no cache holds."""
    return [tensor.clone() for _ in range(min(COPIES, -(-OUTGROWN // tensor.nbytes)))]


def one(
    bench: Bench, rows: int, columns: int, sparsity: float, values: Values, own: written.Product | None
) -> list[Measurement]:
    W = bench.randn(rows, columns)
    W *= W.abs() > 2**0.5 * torch.tensor(sparsity).erfinv().item()  # a normal distribution's smallest
    matrix = pack(W.bfloat16(), values)
    del W
    dense = unpack(matrix)
    found, y = [], torch.empty(rows)
    for tokens in (1, 4, 16, 64, 4096) if bench.cuda() else (1, 4, 16, 64, 512):
        X = bench.activations(columns, tokens)
        calls = min(MOST, -(-OUTGROWN // len(matrix.data))) if tokens <= 64 else 1
        packed = itertools.cycle([Packed(data, matrix.layout) for data in copied(matrix.data)])
        copies = itertools.cycle(copied(dense))

        def ours(X: torch.Tensor = X, packed: Iterator[Packed] = packed, calls: int = calls) -> None:
            for _ in range(calls):
                packed_matmul(X, next(packed))

        def torchs(X: torch.Tensor = X, copies: Iterator[torch.Tensor] = copies, calls: int = calls) -> None:
            for _ in range(calls):
                linear(X, next(copies))

        plain = "torch, bf16, dense"
        cases: dict[str, common.Case] = {OURS: graph(bench, ours), plain: graph(bench, torchs)}
        if own is not None and tokens == 1:

            def here(
                X: torch.Tensor = X,
                copies: Iterator[torch.Tensor] = copies,
                calls: int = calls,
                own: written.Product = own,
            ) -> None:
                for _ in range(calls):
                    own(y, next(copies), X)

            here()
            cases["written here, bf16, dense"] = here
        strip = slice(0, min(rows, 256))
        exact = X.double() @ dense[strip].double().T
        scale = exact.abs().max().item()
        errors = {OURS: packed_matmul(X, matrix), plain: linear(X, dense)}
        if len(cases) > 2:
            errors["written here, bf16, dense"] = y[None]
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
    own = None if bench.cuda() else written.product()
    shapes = list(dict.fromkeys([*bench.shapes, (min(map(min, bench.shapes)),) * 2]))
    return [
        found
        for rows, columns in shapes
        for sparsity in SPARSITIES
        for values in VALUES
        for found in one(bench, rows, columns, sparsity, values, own)
    ]


if __name__ == "__main__":
    common.main(__doc__, {"packed": run})
