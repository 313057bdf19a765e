"""The product with a packed matrix against the fastest dense bf16 products with the same matrix unpacked.

    python benchmarks/packed.py --threads 1 --record        # under four minutes; each shape, sparsity and token count
    python benchmarks/packed.py --table benchmarks/results/packed-cpu-DATE.json --into benchmarks/README.md
    python benchmarks/kernels.py packed                      # the same op among the others, and on a GPU

On a CPU the dense products are torch's linear, oneDNN's with the matrix prepacked for it, and for one token one written
here (dense.cpp). To see a processor without AVX-512:
RAC_NATIVE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/packed.py

Every product finds a copy of the matrix that no cache holds, as in a model. On a GPU as many products as outgrow the
cache are captured in a graph.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import dense as written
import torch
from common import OURS, Bench, Measurement
from torch import Tensor
from torch.nn.functional import linear

from rac_kernels import pack, packed_matmul, unpack
from rac_kernels.measure.roofline import Peaks
from rac_kernels.ops import limits
from rac_kernels.ops import packed_matmul as op
from rac_kernels.ops.packed import VALUES, Packed, Values

OUTGROWN = 256 << 20  # bytes of weights that no cache holds
SPARSITIES = (0.5, 0.7, 0.8)
TOKENS = (1, 4, 16, 64, 512)
COPIES = 1024  # of a small matrix
MOST = 64  # products that are timed together
LEAST = 3  # rounds of a cell, unless they take three times its seconds
TORCH, ONEDNN, WRITTEN = "torch, bf16, dense", "oneDNN, bf16, prepacked", "written here, bf16, dense"
TARGETS = [
    ("same", 0.5, 1, 1.3),
    ("same", 0.7, 1, 1.8),
    ("int4", 0.7, 1, 2.2),
    *((values, sparsity, 512, 0.91) for values in VALUES for sparsity in SPARSITIES),
]
"""Values, sparsity, tokens, and how many times as fast as the fastest dense product, with AVX-512."""
BEGIN, END = "<!-- table of packed.py -->", "<!-- end of the table of packed.py -->"
"""Marks of the table in a page."""

Product = Callable[[], Tensor]
"""One product, with the next copy of the matrix."""


def copied(tensor: Tensor) -> list[Tensor]:
    """As many of the same as no cache holds."""
    return [tensor.clone() for _ in range(min(COPIES, -(-OUTGROWN // tensor.nbytes)))]


def pruned(bench: Bench, rows: int, columns: int, sparsity: float) -> Tensor:
    """A bf16 matrix of normal numbers without its smallest."""
    W = bench.randn(rows, columns)
    W *= W.abs() > 2**0.5 * torch.tensor(sparsity).erfinv().item()
    return W.bfloat16()


def packed_product(matrix: Packed, X: Tensor) -> Product:
    """Ours."""
    copies = itertools.cycle([Packed(data, matrix.layout) for data in copied(matrix.data)])
    return lambda: packed_matmul(X, next(copies))


def dense_products(dense: list[Tensor], X: Tensor, own: written.Product | None) -> dict[str, Product]:
    """Those that there are on this machine, by name."""
    copies = itertools.cycle(dense)
    found: dict[str, Product] = {TORCH: lambda: linear(X, next(copies))}
    if X.device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            ordered = itertools.cycle([torch.ops.mkldnn._reorder_linear_weight(W, len(X)) for W in dense[:MOST]])
            torch.ops.mkldnn._linear_pointwise(X, next(ordered), None, "none", [], "")
            found[ONEDNN] = lambda: torch.ops.mkldnn._linear_pointwise(X, next(ordered), None, "none", [], "")
        except RuntimeError as error:
            print(f"no product of oneDNN's to compare with: {str(error).splitlines()[0]}")
    if own is not None and len(X) == 1:
        y = torch.empty(len(dense[0]))

        def here() -> Tensor:
            own(y, next(copies), X)
            return y[None]

        found[WRITTEN] = here
    return found


def errors(X: Tensor, dense: Tensor, products: Mapping[str, Product]) -> dict[str, str]:
    """The largest error of each against fp64, relative to the largest element, in the first 256 rows."""
    exact = X.double() @ dense[:256].double().T
    scale = exact.abs().max().item()
    return {
        name: f"{(product()[:, :256].double() - exact).abs().max().item() / scale:.1e}"
        for name, product in products.items()
    }


def one(
    bench: Bench, rows: int, columns: int, sparsity: float, values: Values, own: written.Product | None
) -> list[Measurement]:
    matrix = pack(pruned(bench, rows, columns, sparsity), values)
    dense = copied(unpack(matrix))
    found = []
    for tokens in (1, 4, 16, 64, 4096) if bench.cuda() else TOKENS:
        X = bench.activations(columns, tokens)
        calls = min(MOST, -(-OUTGROWN // len(matrix.data))) if tokens <= (64 if bench.cuda() else 4) else 1
        products = {OURS: packed_product(matrix, X), **dense_products(dense, X, own)}
        rounded = errors(X, dense[0], products)
        limit = op.limit(tokens, rows, columns, len(matrix.data))
        found += bench.measure(
            "packed",
            f"{rows}x{columns} {sparsity:.0%} {values}, {tokens} tokens",
            columns,
            {name: graph(bench, repeated(product, calls)) for name, product in products.items()},
            limit=limits.Limit(limit.flops * calls, limit.moved * calls, limit.peak),
            extra={
                name: {
                    "rounded": rounded[name],
                    "bytes": len(matrix.data) if name == OURS else dense[0].nbytes,
                    "calls": calls,
                }
                for name in products
            },
        )
    return found


def repeated(product: Product, calls: int) -> common.Case:
    """So many products after one another."""

    def run() -> None:
        for _ in range(calls):
            product()

    return run


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
    """All shapes, sparsities and values, with the limit of each, for kernels.py."""
    own = None if bench.cuda() else written.product()
    shapes = list(dict.fromkeys([*bench.shapes, (min(map(min, bench.shapes)),) * 2]))
    return [
        found
        for rows, columns in shapes
        for sparsity in SPARSITIES
        for values in VALUES
        for found in one(bench, rows, columns, sparsity, values, own)
    ]


def timed(products: Mapping[str, Product], most: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each product in each round, the products taken in turn after one round that is not counted.

    Ends after `most` rounds, or after `seconds`: then with at least `LEAST` rounds, or one if three times as long went.
    """
    times: dict[str, list[float]] = {name: [] for name in products}
    began = time.perf_counter()
    for turn in range(most + 1):
        for name, product in products.items():
            start = time.perf_counter()
            product()
            if turn:
                times[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - began
        if turn and spent > seconds and (turn >= LEAST or spent > 3 * seconds):
            break
    return times


def cells(bench: Bench, sparsities: list[float], tokens: list[int], seconds: float, own: written.Product | None) -> Any:
    """A cell for each shape, sparsity and number of tokens: all values and all dense products in the same rounds."""
    for rows, columns in bench.shapes:
        for sparsity in sparsities:
            W = pruned(bench, rows, columns, sparsity)
            matrices = {values: pack(W, values) for values in VALUES}
            dense = copied(W)
            for count in tokens:
                X = bench.activations(columns, count)
                rivals = dense_products(dense, X, own)
                ours: dict[str, Product] = {values: packed_product(matrix, X) for values, matrix in matrices.items()}
                rounded = errors(X, W, rivals)
                for values, matrix in matrices.items():
                    strip = unpack(matrix.rows(0, min(rows, 256)))
                    rounded |= errors(X, strip, {values: ours[values]})
                yield {
                    "shape": [rows, columns],
                    "sparsity": sparsity,
                    "tokens": count,
                    "bytes": {"dense": W.nbytes, **{values: len(matrix.data) for values, matrix in matrices.items()}},
                    "rounded": rounded,
                    "seconds": timed(ours | rivals, bench.repeats, seconds),
                }


def fastest(cell: dict[str, Any]) -> tuple[str, float]:
    """The fastest dense product of a cell, and its median time in seconds."""
    medians = {name: statistics.median(found) for name, found in cell["seconds"].items() if name not in VALUES}
    name = min(medians, key=lambda each: medians[each])
    return name, medians[name]


def ratio(cell: dict[str, Any], values: str) -> float:
    """How many times as fast as the fastest dense product the packed one is, by their medians."""
    return fastest(cell)[1] / statistics.median(cell["seconds"][values])


def line(cell: dict[str, Any]) -> str:
    """A cell as a row of the table."""
    name, dense = fastest(cell)
    ours = [f"{statistics.median(cell['seconds'][values]) * 1e3:.2f} ({ratio(cell, values):.2f})" for values in VALUES]
    rows, columns = cell["shape"]
    said = [f"{rows} × {columns}", f"{cell['sparsity']:.0%}", cell["tokens"], f"{dense * 1e3:.2f}", name.split(",")[0]]
    return f"| {' | '.join(map(str, [*said, *ours]))} |"


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a row a cell, and which targets hold."""
    made, found = record["machine"], record["cells"]
    lines = [
        "| rows × columns | zeros | tokens | fastest dense, ms | whose | same, ms (times dense) | int8 | int4 |",
        "|---|---|---|---|---|---|---|---|",
        *(line(cell) for cell in found),
        "",
    ]
    for values, sparsity, tokens, target in TARGETS:
        ratios = [ratio(c, values) for c in found if (c["sparsity"], c["tokens"]) == (sparsity, tokens)]
        if ratios:
            said = "met" if min(ratios) >= target else "not met"
            measured = ", ".join(f"{each:.2f}" for each in ratios)
            many = "a token" if tokens == 1 else f"{tokens} tokens"
            lines.append(f"- {values}, {sparsity:.0%} zeros, {many}: {measured}, target {target}, {said}")
    isa = made["native"].get("isa", "none")
    rounds = [len(times) for cell in found for times in cell["seconds"].values()]
    lines += ["", f"Measured on {made['date']}, {made['cpu']}, native kernels for {isa}, threads: {made['threads']}."]
    lines[-1] += f" Medians of {min(rounds)} to {max(rounds)} rounds." if rounds else ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=common.shape, nargs="+", default=[(18944, 3584), (8960, 1536)], help="ROWSxCOLUMNS"
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES), help="shares of zeros")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="rows of X")
    parser.add_argument("--repeats", type=int, default=25, help="rounds of a cell, at most (25)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a cell, after which no round begins (4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every product")
    parser.add_argument("--work", type=Path, default=Path("build/packed"), help="folder (build/packed)")
    common.add_record_options(parser)
    args = parser.parse_args()
    if args.table:
        from real import show  # needs rac_engine, which the environment of peers has not

        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    out = common.record_file(args, "packed")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    bench = Bench("cpu", 0, [], args.shapes, args.repeats, args.seconds, Peaks(), None)
    record: dict[str, Any] = {"machine": common.machine(), "cells": []}
    began = time.perf_counter()
    for cell in cells(bench, args.sparsities, args.tokens, args.seconds, written.product()):
        record["cells"].append(cell)
        print(f"{time.perf_counter() - began:5.0f} s {line(cell)}", flush=True)
        out.write_text(json.dumps(record, indent=1) + "\n")  # after each, so that what is stopped leaves what it has
    print(table(record))
    print(f"record: {out}")


if __name__ == "__main__":
    main()
