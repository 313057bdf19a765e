"""The solvers on single layers: squared error of the outputs against time, ours, ALPS and SparseGPT.

    python benchmarks/solvers.py --shapes 1536x1536 1536x8960 --out solvers.json --plot solvers.png
    python benchmarks/solvers.py --shapes --model examples/abacus --traces TRACES      # matrices of a model alone

Every solver is given the same dense matrix and the same H (`reconstruct: layer`) and is measured by the same objective,
tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ). Times are the processor's, of all threads and of the solver alone, H being there:
factors and decompositions count, measuring the objective does not. One warm-up, then the median of `--repeats`, or of
as many as half a second holds; a solver that took longer than `--limit` seconds once is not repeated. Synthetic inputs
have a spectrum that falls by a power law and a few columns that are much larger than the rest, as activations have. The
record is written anew after every matrix; what an `--out FILE` that is there holds already is not run again.

`alps` is ours. With `--alps-code FOLDER`, a clone of https://github.com/mazumder-lab/ALPS, the published code runs
beside it as `alps-code`, unchanged but that its device's name, `cuda:0`, is made the CPU's and that it waits for no
GPU; its time is that of the whole call, with the objectives that it computes on the way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from common import machine
from torch import Tensor

from rac_engine.calibrate import Packing, Statistic, Stream
from rac_engine.checkpoint import Checkpoint
from rac_engine.models import Model
from rac_engine.solve import Gram, LayerProblem, Target, find_method
from rac_engine.traces import load_calibration, load_tokenizer
from rac_kernels import objective, symmetrize_
from rac_kernels.ops.pattern import parse_pattern

METHODS = ("admm", "sparsegpt", "alps")
ALPS_CODE, ALPS_URL = "alps-code", "https://github.com/mazumder-lab/ALPS"
SPARSITIES = ("0.5", "0.6", "0.7", "2:4", "4:8")
SHORT = 0.5  # seconds: what is over sooner is timed until it adds up to that


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
    stream = Stream(model, Packing.of(calibration, 8192), model.dtype)
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


Solve = Callable[[], tuple[Tensor, int | None]]
"""What is timed; gives the pruned weights and, where it says so, how many iterations it took."""


class PublishedALPS:
    """ALPS's own code from a clone in `folder`, with the CPU for its device."""

    def __init__(self, folder: Path) -> None:
        module = ModuleType("alps_code")
        source = (folder / "alps.py").read_text().replace("cuda:0", "cpu")
        exec(compile(source, "alps.py", "exec"), module.__dict__)
        self._solver = module.ALPS_prune
        self.commit: str | None = None
        if (folder / ".git").exists():
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            self.commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None

    def ready(self, W: Tensor, H: Tensor, share: float, pattern: str | None) -> Solve:
        keep, group = parse_pattern(pattern) or (0, 0)  # with a pattern the share is not looked at
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(W.float().clone(), requires_grad=False)
        solver = self._solver(layer, 1, 1)
        solver.XtX = symmetrize_(H.float().clone())

        def solve() -> tuple[Tensor, None]:
            with mock.patch("torch.cuda.synchronize"):
                solver.ALPS_admm(sp=share, nm_n=keep, nm_m=group)
            return layer.weight.data, None

        return solve


def ours(method: str, W: Tensor, H: Tensor, share: float, pattern: str | None) -> Solve:
    problem = LayerProblem(W, [len(W)], Target(share, pattern), Gram(H.clone()))

    def solve() -> tuple[Tensor, int | None]:
        solution = find_method(method).solve(problem)
        return solution.weight, solution.iterations

    return solve


def check_zeros(weight: Tensor, share: float, pattern: str | None) -> None:
    """Raises ValueError unless `share` of the weights are zero, give or take one, or N of every M are not."""
    zero, parsed = weight == 0, parse_pattern(pattern)
    if parsed:
        right = bool((zero.unflatten(1, (-1, parsed[1])).sum(2) == parsed[1] - parsed[0]).all())
    else:
        right = abs(int(zero.sum()) - share * zero.numel()) <= 1
    if not right:
        raise ValueError(f"{ALPS_CODE}: {int(zero.sum())} zeros of {zero.numel()} are not those of {pattern or share}")


def goes_on(seconds: list[float], repeats: int, limit: float) -> bool:
    """Whether a solver is timed once more; the first time is the warm-up's."""
    if not seconds or seconds[0] >= limit:
        return not seconds
    return len(seconds) <= repeats or (repeats > 0 and sum(seconds[1:]) < SHORT)


def compare(
    name: str,
    W: Tensor,
    H: Tensor,
    args: argparse.Namespace,
    known: list[dict[str, Any]],
    published: PublishedALPS | None = None,
) -> None:
    """Adds to `known` a row for each sparsity and method that it lacks."""
    there = {(row["matrix"], row["sparsity"], row["method"]) for row in known}
    for sparsity, method in itertools.product(args.sparsities, args.methods):
        if (name, sparsity, method) in there:
            continue
        pattern = sparsity if ":" in sparsity else None
        share = 0.5 if pattern else float(sparsity)
        seconds: list[float] = []
        while goes_on(seconds, args.repeats, args.limit):
            if published is not None and method == ALPS_CODE:
                solve = published.ready(W, H, share, pattern)
            else:
                solve = ours(method, W, H, share, pattern)
            began = time.process_time()
            weight, iterations = solve()
            seconds.append(time.process_time() - began)
        if method == ALPS_CODE:
            check_zeros(weight, share, pattern)
        error = objective(W, weight.to(W.dtype), H) / objective(W, torch.zeros_like(W), H)
        known.append(
            {
                "matrix": name,
                "rows": W.shape[0],
                "columns": W.shape[1],
                "sparsity": sparsity,
                "method": method,
                "error": error,
                "iterations": iterations,
                "seconds": statistics.median(seconds[1:] or seconds),
            }
        )


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each shape, sparsity and method: geometric means over the matrices, of error and time also by those of
    ALPS, its published code and SparseGPT on the same matrix."""
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
                    "errors_by_alps_code": by_that_of(ALPS_CODE, "error"),
                    "seconds_by_alps_code": by_that_of(ALPS_CODE, "seconds"),
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """`means` in Markdown; the worst matrix stands behind the mean. ALPS's published code only where it was run."""
    found = means(rows)
    coded = any(row["errors_by_alps_code"] for row in found)
    lines = [
        "| rows × columns | matrices | sparsity | method | error | by ALPS's: mean, worst | iterations | seconds | "
        "by ALPS's | by SparseGPT's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    if coded:
        lines = [lines[0] + " error by ALPS's code: mean, worst | seconds by ALPS's code |", lines[1] + "---|---|"]

    def mean(values: list[float]) -> str:
        return f"{statistics.geometric_mean(values):.3g}" if values else ""

    def worst(values: list[float]) -> str:
        return f"{statistics.geometric_mean(values):.3f}, {max(values):.3f}" if values else ""

    for row in found:
        lines.append(
            f"| {row['rows']} × {row['columns']} | {row['matrices']} | {row['sparsity']} | {row['method']} | "
            f"{row['error']:.4f} | {worst(row['errors_by_alps'])} | {row['iterations'] or ''} | {row['seconds']:.3g} | "
            f"{mean(row['seconds_by_alps'])} | {mean(row['seconds_by_sparsegpt'])} |"
        )
        if coded:
            lines[-1] += f" {worst(row['errors_by_alps_code'])} | {mean(row['seconds_by_alps_code'])} |"
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against time, a panel a shape, a mark a method, a line from method to method at each sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

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
        panel.xaxis.set_minor_formatter(NullFormatter())  # in a narrow panel they would run into each other
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
    parser.add_argument("--alps-code", type=Path, metavar="FOLDER", help=f"a clone of {ALPS_URL}, run as {ALPS_CODE}")
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"rows": []}
    rows: list[dict[str, Any]] = record.pop("rows")
    published = None
    if args.alps_code:
        if not (args.alps_code / "alps.py").is_file():
            parser.error(f"--alps-code {args.alps_code}: no alps.py there, which a clone of {ALPS_URL} has")
        published = PublishedALPS(args.alps_code)
        record["alps_code"] = {"url": ALPS_URL, "commit": published.commit}
        args.methods = list(dict.fromkeys([*args.methods, ALPS_CODE]))
    elif ALPS_CODE in args.methods:
        parser.error(f"{ALPS_CODE} needs --alps-code FOLDER, a clone of {ALPS_URL}")
    with torch.inference_mode():
        for name, W, H in _matrices(args):
            compare(name, W, H, args, rows, published)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({**record, "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
