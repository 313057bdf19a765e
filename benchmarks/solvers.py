"""The solvers on single layers: squared error of the outputs against time, ours, ALPS and SparseGPT.

    python benchmarks/solvers.py --shapes 1536x1536 1536x8960 --out solvers.json --plot solvers.png
    python benchmarks/solvers.py --shapes --model examples/abacus --traces TRACES      # matrices of a model alone

Every solver is given the same dense matrix and the same H (`reconstruct: layer`) and is measured by the same objective,
tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ). Times are of the solver alone, H being there: one warm-up, then the median of
`--repeats`. Synthetic inputs have a spectrum that falls by a power law and a few columns that are much larger than the
rest, as activations have. A solver that took longer than `--limit` seconds once is not repeated.
"""

from __future__ import annotations

import argparse
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
from rac_engine.solve import prune_matrix
from rac_engine.traces import load_calibration

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


def compare(name: str, W: Tensor, H: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each sparsity and method."""
    found = []
    for sparsity in args.sparsities:
        pattern = sparsity if ":" in sparsity else None
        share = 0.5 if pattern else float(sparsity)
        for method in args.methods:
            seconds: list[float] = []
            while len(seconds) <= args.repeats and (len(seconds) < 1 or seconds[0] < args.limit):
                began = time.perf_counter()
                result = prune_matrix(W, H, method, share, pattern)
                seconds.append(time.perf_counter() - began)
            found.append(
                {
                    "matrix": name,
                    "rows": W.shape[0],
                    "columns": W.shape[1],
                    "sparsity": sparsity,
                    "method": method,
                    "error": result.relative_error,
                    "iterations": result.iterations,
                    "seconds": statistics.median(seconds[1:] or seconds),
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Per shape and sparsity: error and time of each method as a multiple of ALPS's, in geometric means over matrices
    of one shape."""
    lines = ["| rows × columns | matrices | sparsity | method | error | error / alps | seconds | alps' time / time |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    keys = sorted({(row["rows"], row["columns"], row["sparsity"]) for row in rows})
    for key in keys:
        here = [row for row in rows if (row["rows"], row["columns"], row["sparsity"]) == key]
        base = {row["matrix"]: row for row in here if row["method"] == "alps"}
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            pairs = [(row, base[row["matrix"]]) for row in own if row["matrix"] in base]
            error = statistics.geometric_mean(row["error"] for row in own)
            worse = statistics.geometric_mean(row["error"] / alps["error"] for row, alps in pairs) if pairs else 0.0
            faster = (
                statistics.geometric_mean(alps["seconds"] / row["seconds"] for row, alps in pairs) if pairs else 0.0
            )
            seconds = statistics.geometric_mean(row["seconds"] for row in own)
            lines.append(
                f"| {key[0]} × {key[1]} | {len(own)} | {key[2]} | {method} | "
                f"{error:.4f} | {worse:.3f} | {seconds:.3g} | {faster:.2f} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against time, a panel a shape, a line a sparsity from method to method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = sorted({(row["rows"], row["columns"]) for row in rows})
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        here = [row for row in rows if (row["rows"], row["columns"]) == shape]
        for number, method in enumerate(dict.fromkeys(row["method"] for row in here)):
            own = [row for row in here if row["method"] == method]
            panel.scatter(
                [r["seconds"] for r in own], [r["error"] for r in own], label=method, marker="os^v"[number % 4]
            )
        panel.set(xscale="log", yscale="log", title=f"{shape[0]} × {shape[1]}", xlabel="seconds", ylabel="error")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


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
    rows = []
    with torch.inference_mode():
        if args.model:
            for name, W, H in of_model(args.model, args.traces, args.tokens):
                rows += compare(name, W, H, args)
        for shape in args.shapes:
            count, columns = map(int, shape.split("x"))
            rows += compare(f"synthetic {shape}", *synthetic(count, columns), args)
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
