"""How many calibration tokens an input needs: errors on tokens seen and on others, by tokens, inputs and sparsity.

    python benchmarks/tokens.py --work build/real --record        # 20 minutes of one thread; stopped, it goes on
    python benchmarks/tokens.py --work build/real --counts 2k 8k 32k 128k --traces MORE_TRACES
    python benchmarks/tokens.py --table benchmarks/results/tokens-cpu-DATE.json --into benchmarks/README.md

The first layers of SmolLM2-135M-Instruct (576 inputs; 1536 of down) are pruned as a job prunes them, on the first
tokens of the traces that `real.py` makes in WORK, and judged by 6k tokens of held-out prompts' traces, from which no
solver learns. Beside each ratio of the two errors stands what `rac_engine.solve.expected_gap` says, from which
`rac plan` warns. Then one budget is spent in several ways: many short traces or few long ones, positions left out, two
samples a prompt (`--second` names traces to the same prompts, sampled with another seed). A cell is a file in
WORK/cells.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_record_options, machine, record_file
from quality import finished
from real import NAME, PACKAGE, show
from safetensors import safe_open
from safetensors.torch import save_file

from rac_engine import prune
from rac_engine.base.sizes import format_count, parse_size
from rac_engine.engine import load_metrics
from rac_engine.jobs.layout import RAC
from rac_engine.recipe import CalibrationSettings, PruneSettings, Recipe
from rac_engine.solve import expected_gap, find_method
from rac_engine.traces import Calibration, TokenSequence, load_calibration, load_tokenizer

BEGIN, END = "<!-- table of tokens.py -->", "<!-- end of the table of tokens.py -->"
"""Marks of the table in a page."""
HELD = 6000
"""Tokens of held-out prompts' traces."""
SHORT = 64
"""Tokens that are left of a trace that is cut short."""


class Lab:
    """The first layers of the model, and its traces."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.model = args, args.work / f"first-{args.layers}-layers"
        if not self.model.exists():
            first_layers(args.work / "model", self.model, args.layers)
        self.tokenizer = load_tokenizer(self.model)
        self.seen = self._sequences([args.work / "traces-calibration", *args.traces])
        self.held = first(self._sequences([args.work / "traces-held-out"]), HELD)

    def _sequences(self, sources: Sequence[Path]) -> list[TokenSequence]:
        return [one for source in sources for one in self.read(source)]

    def read(self, source: Path) -> list[TokenSequence]:
        """The sequences of a folder of traces."""
        return load_calibration(str(source), tokenizer=self.tokenizer).sequences

    def cell(self, method: str, sparsity: float, sequences: list[TokenSequence]) -> dict[str, Any]:
        """Prune, and the sums of squares of the errors on tokens seen and held out by the number of inputs."""
        out = self.args.work / "out" / "tokens"
        for left in (out, Path(f"{out}.partial")):
            shutil.rmtree(left, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        held = [replace(one, held_out=True) for one in self.held]
        recipe = Recipe(
            model=self.model,
            calibration=CalibrationSettings(held_out=0),  # of these none beside those that are
            prune=PruneSettings(method=method, sparsity=sparsity),
        )
        prune(self.model, out, recipe, calibration=Calibration("traces", "traces", "all", [*sequences, *held]))
        metrics = load_metrics(out / RAC)
        keys = ("name", "rows", "columns", "relative_error", "held_out_error", "damping")
        rows = [{key: row[key] for key in keys} for row in metrics.pruned]
        last = metrics.last_layer
        shutil.rmtree(out)
        return {
            "method": method,
            "sparsity": sparsity,
            "tokens": sum(one.counted for one in sequences),
            "run": sum(len(one.token_ids) for one in sequences),
            "prompts": len({tuple(one.token_ids[: one.prompt_length]) for one in sequences}),
            "sequences": len(sequences),
            "matrices": rows,
            "hidden": None if last is None else {key: last[key] for key in ("relative_error", "held_out_error")},
        }


def first_layers(model: Path, out: Path, layers: int) -> None:
    """Write a checkpoint of a model's first layers, with all that is around them."""
    staged = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(model, staged, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": layers}
    (staged / "config.json").write_text(json.dumps(config))
    kept = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                _, inside, rest = name.partition(".layers.")
                if not inside or int(rest.partition(".")[0]) < layers:
                    kept[name] = tensors.get_tensor(name)
    save_file(kept, staged / "model.safetensors", {"format": "pt"})
    staged.rename(out)


def first(sequences: Sequence[TokenSequence], tokens: int) -> list[TokenSequence]:
    """The first sequences, of which so many tokens count; the last one is cut."""
    found, left = list[TokenSequence](), tokens
    for one in sequences:
        counts = np.ones(len(one.token_ids)) if one.weights is None else one.weights
        length = int(np.searchsorted(np.cumsum(counts > 0), left)) + 1
        weights = None if one.weights is None else one.weights[:length]
        cut = replace(one, token_ids=one.token_ids[:length], weights=weights)
        found.append(cut)
        left -= cut.counted
        if left <= 0:
            break
    return found


def thinned(one: TokenSequence, step: int) -> TokenSequence:
    """A sequence of which one token in `step` counts."""
    weights = (np.arange(len(one.token_ids)) % step == step - 1).astype(np.float32)
    return replace(one, weights=weights)


def ways(lab: Lab, tokens: int, second: Path | None) -> dict[str, Callable[[], list[TokenSequence]]]:
    """Ways to spend a budget of tokens, by name."""
    seen = lab.seen
    found = {
        "as they come": lambda: first(seen, tokens),
        f"cut to {SHORT} tokens": lambda: first([first([one], SHORT)[0] for one in seen], tokens),
        "the longest": lambda: first(sorted(seen, key=lambda one: -len(one.token_ids)), tokens),
        "every 2nd token": lambda: first([thinned(one, 2) for one in seen], tokens),
        "every 3rd token": lambda: first([thinned(one, 3) for one in seen], tokens),
        "twice the tokens": lambda: first(seen, 2 * tokens),
    }
    if second is not None:
        found["2 samples a prompt"] = lambda: first(pairs(seen, lab.read(second)), tokens)
    return found


def pairs(ours: Sequence[TokenSequence], others: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Each sequence that has another one to the same prompt, and that behind it."""

    def key(one: TokenSequence) -> bytes:
        return one.token_ids[: one.prompt_length].tobytes()

    known = {key(one): one for one in others}
    return [each for one in ours if key(one) in known for each in (one, known[key(one)])]


def errors(cell: dict[str, Any], columns: int) -> tuple[float, float]:
    """Geometric means of the relative errors seen and held out of the matrices with so many inputs."""
    rows = [row for row in cell["matrices"] if row["columns"] == columns]
    seen, held = ([math.log(row[key]) for row in rows] for key in ("relative_error", "held_out_error"))
    return math.exp(sum(seen) / len(rows)), math.exp(sum(held) / len(rows))


def fitted(cells: Sequence[dict[str, Any]], method: str) -> float:
    """The constant c of a method for which `expected_gap` is nearest to the ratios that were measured.

    By least squares of logarithms, with a golden section.
    """
    points = [
        ((1 - cell["sparsity"]) * columns / cell["tokens"], math.log(held / seen))
        for cell in cells
        if cell["method"] == method and cell["way"] is None
        for columns in widths(cell)
        for seen, held in [errors(cell, columns)]
    ]

    def cost(c: float) -> float:
        return sum((math.log1p(c * x) - y) ** 2 for x, y in points)

    low, high, golden = 0.0, 1000.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-3:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    return (low + high) / 2


def widths(cell: dict[str, Any]) -> list[int]:
    """The numbers of inputs of a cell's matrices."""
    return sorted({row["columns"] for row in cell["matrices"]})


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: errors by tokens beside the law, then one budget spent in several ways."""
    cells = record["cells"]
    lines = [
        "| method, sparsity | tokens | prompts | inputs | error seen | held out | ratio | law |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counted = [cell for cell in cells if cell["way"] is None]
    for cell in sorted(counted, key=lambda c: (c["method"], c["sparsity"], c["tokens"])):
        for columns in widths(cell):
            seen, held = errors(cell, columns)
            law = expected_gap(find_method(cell["method"]), columns, cell["tokens"], cell["sparsity"])
            named = f"{cell['method']}, {cell['sparsity']:g} | {cell['tokens']:,} | {cell['prompts']} | {columns}"
            said = "" if law is None else f"{law:.2f}"
            lines.append(f"| {named} | {seen:.4f} | {held:.4f} | {held / seen:.2f} | {said} |")
    fits = {method: fitted(cells, method) for method in dict.fromkeys(cell["method"] for cell in counted)}
    told = "; ".join(f"{method} c = {c:.1f}" for method, c in fits.items())
    lines += ["", f"The law is 1 + c · (1 − sparsity) · inputs / tokens. These points fit best with {told}.", ""]
    spent = [cell for cell in cells if cell["way"] is not None]
    heads = [f"held out, {columns} inputs" for columns in widths(cells[0])]
    heads = ["tokens that count", "run", "prompts", *heads, "hidden states held out"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in spent:
        if cell["hidden"] is not None:
            held_out = " | ".join(f"{errors(cell, columns)[1]:.4f}" for columns in widths(cell))
            behind = f"{cell['hidden']['held_out_error']:.5f}"
            lines.append(
                f"| {cell['tokens']:,}, {cell['way']} | {cell['run']:,} | {cell['prompts']} | {held_out} | {behind} |"
            )
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cells, each made if it is not there."""
    lab = Lab(args)
    there = sum(one.counted for one in lab.seen)
    for way, chosen in ways(lab, args.budget, args.second).items():

        def spent(way: str = way, chosen: Callable[[], list[TokenSequence]] = chosen) -> dict[str, Any]:
            return {"way": way, **lab.cell("admm", 0.6, chosen())}

        yield finished(args.work, f"tokens-{args.budget}-{way.replace(' ', '-')}", spent)
    for sparsity, tokens, method in itertools.product(args.sparsities, args.counts, args.methods):
        if tokens > there:
            print(f"{format_count(tokens)} tokens: there are {there:,}, see --traces")
            continue

        def made(method: str = method, sparsity: float = sparsity, tokens: int = tokens) -> dict[str, Any]:
            return {"way": None, **lab.cell(method, sparsity, first(lab.seen, tokens))}

        yield finished(args.work, f"tokens-{method}-{sparsity:g}-{tokens}", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="folder of real.py's parts (build/real)")
    parser.add_argument("--counts", type=parse_size, nargs="+", default=[2000, 4000, 8000, 16000, 29000])
    parser.add_argument("--traces", type=Path, nargs="*", default=[], help="more traces, behind those of WORK")
    parser.add_argument("--second", type=Path, help="traces to the same prompts as WORK's, sampled with another seed")
    parser.add_argument("--budget", type=parse_size, default=8000, help="tokens that are spent in several ways (8k)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model (default 3)")
    parser.add_argument("--methods", nargs="+", default=["admm", "sparsegpt"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.5])
    add_record_options(parser)
    args = parser.parse_args()
    if args.table:
        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    args.work = args.work.resolve()
    out, cells = record_file(args, "tokens"), []
    for cell in measure(args):
        cells.append(cell)
        told = {"layers": args.layers, "model": {"name": NAME, "package": PACKAGE}, "threads": torch.get_num_threads()}
        out.write_text(json.dumps({"machine": machine(), **told, "cells": cells}, indent=1) + "\n")
        for columns in widths(cell):
            seen, held = errors(cell, columns)
            print(cell["method"], cell["sparsity"], cell["tokens"], cell["way"] or "", columns, seen, held, held / seen)
    print(f"record: {out}")


if __name__ == "__main__":
    main()
