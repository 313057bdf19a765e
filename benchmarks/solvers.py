"""The solvers on single layers: squared error of the outputs against time, ours, ALPS and SparseGPT.

    python benchmarks/solvers.py --shapes 1536x1536 1536x8960 --out solvers.json --plot solvers.png
    python benchmarks/solvers.py --shapes --model examples/abacus --traces TRACES      # matrices of a model alone

Every solver is given the same dense matrix and the same H (`reconstruct: layer`) and is measured by the same objective,
tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ). Times are the processor's, of all threads and of the solver alone, H being there:
factors and decompositions count, measuring the objective does not. One warm-up, then the median of `--repeats`; a
solver that took longer than `--limit` seconds once is not repeated. Synthetic inputs have a spectrum that falls by a
power law and a few columns that are much larger than the rest, as activations have. The record is written anew after
every matrix; what an `--out FILE` that is there holds already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor

from rac_engine.calibrate import Packing, Statistic, Stream
from rac_engine.checkpoint import Checkpoint
from rac_engine.decode import load_tokenizer
from rac_engine.models import Model
from rac_engine.solve import Gram, Problem, Target, find_method
from rac_engine.traces import load_calibration
from rac_kernels import objective

METHODS = ("rac", "sparsegpt", "alps")
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")


def synthetic(rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [rows, n] and H [n, n] of 4n tokens whose covariance has eigenvalues ~ 1/k."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5
    H = torch.zeros(n, n)
    sizes = torch.ones(n)
    sizes[torch.randperm(n, generator=generator)[: max(n // 200, 1)]] = 10.0
    spectrum = torch.arange(1, n + 1).float().rsqrt()
    for _ in range(4):
        x = (torch.randn(n, n, generator=generator) * spectrum) @ mix * sizes
        H.addmm_(x.T, x)
    return torch.randn(rows, n, generator=generator) * n**-0.5, H


def of_model(folder: Path, traces: str, tokens: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every matrix of a model with H of its input in the dense model."""
    model = Model.open(Checkpoint.open(folder))
    calibration = load_calibration(traces, part="all", tokens=tokens, tokenizer=load_tokenizer(folder))
    stream = Stream(model, Packing.of(calibration, 8192), model.dtype, "cpu")
    for layer in range(model.layers):
        tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
        matrices = model.matrices(layer)
        for block in model.build_layer(layer, tensors, model.dtype, "cpu"):
            here = {m.group.input: m.columns for m in matrices if m.module in block.linears}
            statistics = {name: Statistic(columns, True, "cpu") for name, columns in here.items()}
            kept = stream.observe(block, statistics)
            for matrix in matrices:
                if matrix.group.input in statistics:
                    yield matrix.path, tensors[matrix.name], statistics[matrix.group.input].value
            stream.advance(block, kept)


def compare(name: str, W: Tensor, H: Tensor, args: argparse.Namespace, known: list[dict[str, Any]]) -> None:
    """Adds to `known` a row for each sparsity and method that it lacks."""
    there = {(row["matrix"], row["sparsity"], row["method"]) for row in known}
    for sparsity, method in itertools.product(args.sparsities, args.methods):
        if (name, sparsity, method) in there:
            continue
        pattern = sparsity if ":" in sparsity else None
        share = 0.5 if pattern else float(sparsity)
        seconds: list[float] = []
        while len(seconds) <= args.repeats and (len(seconds) < 1 or seconds[0] < args.limit):
            problem = Problem(W, [len(W)], Target(share, pattern), Gram(H.clone()))
            began = time.process_time()
            solution = find_method(method).solve(problem)
            seconds.append(time.process_time() - began)
        error = objective(W, solution.weight.to(W.dtype), H) / objective(W, torch.zeros_like(W), H)
        known.append(
            {
                "matrix": name,
                "rows": W.shape[0],
                "columns": W.shape[1],
                "sparsity": sparsity,
                "method": method,
                "error": error,
                "iterations": solution.iterations,
                "seconds": statistics.median(seconds[1:] or seconds),
            }
        )


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each shape, sparsity and method: geometric means over the matrices, of error and time also by those of
    ALPS and SparseGPT on the same matrix."""
    found = []
    keys = sorted({(row["rows"], row["columns"], row["sparsity"]) for row in rows})
    for key in keys:
        here = [row for row in rows if (row["rows"], row["columns"], row["sparsity"]) == key]
        by = {(row["method"], row["matrix"]): row for row in here}
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]

            def by_that_of(
                other: str, what: str, own: list[dict[str, Any]] = own, by: dict[Any, dict[str, Any]] = by
            ) -> list[float]:
                pairs = [(row, by.get((other, row["matrix"]))) for row in own]
                return [row[what] / its[what] for row, its in pairs if its is not None]

            found.append(
                {
                    "rows": key[0],
                    "columns": key[1],
                    "sparsity": key[2],
                    "method": method,
                    "matrices": len(own),
                    "error": statistics.geometric_mean(row["error"] for row in own),
                    "seconds": statistics.geometric_mean(row["seconds"] for row in own),
                    "iterations": max((row["iterations"] or 0) for row in own),
                    "errors_by_alps": by_that_of("alps", "error"),
                    "seconds_by_alps": by_that_of("alps", "seconds"),
                    "seconds_by_sparsegpt": by_that_of("sparsegpt", "seconds"),
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """`means` in Markdown; the worst matrix stands behind the mean."""
    lines = [
        "| rows × columns | matrices | sparsity | method | error | by ALPS's: mean, worst | iterations | seconds | "
        "by ALPS's | by SparseGPT's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def mean(values: list[float]) -> str:
        return f"{statistics.geometric_mean(values):.3g}" if values else ""

    for row in means(rows):
        errors = row["errors_by_alps"]
        compared = f"{statistics.geometric_mean(errors):.3f}, {max(errors):.3f}" if errors else ""
        lines.append(
            f"| {row['rows']} × {row['columns']} | {row['matrices']} | {row['sparsity']} | {row['method']} | "
            f"{row['error']:.4f} | {compared} | {row['iterations'] or ''} | {row['seconds']:.3g} | "
            f"{mean(row['seconds_by_alps'])} | {mean(row['seconds_by_sparsegpt'])} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against time, a panel a shape, a mark a method, a line from method to method at each sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = means(rows)
    shapes = sorted({(row["rows"], row["columns"]) for row in points})
    across = min(len(shapes), 4)
    down = -(-len(shapes) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(4 * across, 4 * down), squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    for panel, shape in zip(panels.flat, shapes, strict=False):
        here = [row for row in points if (row["rows"], row["columns"]) == shape]
        for sparsity in dict.fromkeys(row["sparsity"] for row in here):
            own = sorted((row for row in here if row["sparsity"] == sparsity), key=lambda row: row["seconds"])
            panel.plot([r["seconds"] for r in own], [r["error"] for r in own], color="0.8", zorder=0)
            panel.annotate(sparsity, (own[0]["seconds"], own[0]["error"]), fontsize=7, ha="right", va="bottom")
        for number, method in enumerate(dict.fromkeys(row["method"] for row in here)):
            own = [row for row in here if row["method"] == method]
            panel.scatter(
                [r["seconds"] for r in own], [r["error"] for r in own], label=method, marker="os^v"[number % 4]
            )
        panel.set(xscale="log", yscale="log", title=f"{shape[0]} × {shape[1]}", xlabel="seconds", ylabel="error")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _matrices(args: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    if args.model:
        yield from of_model(args.model, args.traces, args.tokens)
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        yield f"synthetic {shape}", *synthetic(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["1536x1536", "1536x8960"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint whose matrices are pruned")
    parser.add_argument("--traces", help="what calibrates them: a traces folder, .jsonl or text:FILE")
    parser.add_argument("--tokens", type=int, default=38_000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    with torch.inference_mode():
        for name, W, H in _matrices(args):
            compare(name, W, H, args, rows)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
