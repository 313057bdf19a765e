r"""Accuracy by bits a weight: sparsity × what kept values are stored as, chosen by the solver and rounded to nearest.

    python benchmarks/frontier.py --work build/frontier --record                # all cells; stopped, it goes on
    python benchmarks/frontier.py --work build/frontier --sparsities 0.8 1:4 --values same int4 --problems 200
    python benchmarks/frontier.py --table benchmarks/results/frontier-cpu-DATE.json --into benchmarks/README.md \
        --plot benchmarks/results/frontier-cpu-DATE.png

The example model is pruned on its own traces and asked as in quality.py. A cell is accuracy with its 95% interval, the
error of the hidden states behind every layer on traces that were held out (the mean of ‖h′ − h‖² / ‖h‖² over the
layers, h being the dense model's), the perplexity of the dense model's completions there, and bits a weight of the
matrices that are pruned: kept values, their scales, and one bit a weight for the mask where there is one (not the few
bytes a row and matrix of the file's index and padding). "nearest" is the model of the same sparsity with bf16 values,
each weight of which is rounded to nearest, with the scale of 14 that makes the smallest squared gaps: the mask is the
same. Sparsity 0 with int4 and "solver" is what 4-bit weights alone make. int3 is for comparison, rounded
to nearest: no recipe asks for it and no file holds it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import add_record_options, machine, record_file
from quality import ROOT, finished, own_traces, perplexity
from real import show
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_engine import prune
from rac_engine.base.sizes import parse_size
from rac_engine.evaluation import evaluate
from rac_engine.recipe import CalibrationSettings, EvalSettings, PruneSettings, Recipe
from rac_engine.traces import load_calibration, load_tokenizer
from rac_kernels import LARGEST, fit_grid, packed_group

SPARSITIES = ("0", "0.5", "0.6", "2:4", "0.7", "1:4", "0.8")
VALUES = ("same", "int8", "int4", "int3")
BITS = {"same": 16, "int8": 8, "int4": 4, "int3": 3}
MATRICES = "_proj.weight"
BEGIN, END = "<!-- table of frontier.py -->", "<!-- end of the table of frontier.py -->"


def main() -> None:
    args = _arguments()
    if args.table:
        cells = json.loads(args.table.read_text())["cells"]
        show(table(cells), args.into, BEGIN, END)
        if args.plot:
            plot(args.plot, cells)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model)
    lines = args.evaluation.read_text().splitlines()[args.problems :] or args.prompts.read_text().splitlines()[::-1]
    prompts = args.work / "held.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    traces = own_traces(args, "held", prompts, args.held_tokens)
    held = load_calibration(str(traces), part="completion", tokens=args.held_tokens, tokenizer=tokenizer).sequences
    asked = [
        (sparsity, values, how)
        for sparsity in args.sparsities
        for values in args.values
        for how in ({"same": ("solver",), "int3": ("nearest",)}.get(values, args.ways))
    ]
    for sparsity, values, how in asked:
        name = f"{sparsity.replace(':', 'of')}-{values}-{how}-{args.problems}"
        began = time.process_time()
        cell = finished(args.work, name, functools.partial(_made, args, sparsity, values, how, held))
        print(f"{name}: {cell['accuracy']:.3f}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    every = sorted((args.work / "cells").glob(f"*-{args.problems}.json"))
    cells = [json.loads(path.read_text()) for path in every]
    cells.sort(key=lambda cell: (SPARSITIES.index(cell["sparsity"]), -BITS[cell["values"]], cell["how"]))
    print(table(cells))
    out = record_file(args, "frontier")
    record = {"machine": machine(), "model": args.model.name, "tokens": args.tokens, "problems": args.problems}
    out.write_text(json.dumps({**record, "cells": cells}, indent=1) + "\n")
    print(f"record: {out}")
    if args.plot:
        plot(args.plot, cells)


def _made(args: argparse.Namespace, sparsity: str, values: str, how: str, held: list[Any]) -> dict[str, Any]:
    """Make a cell's model, ask it and measure it."""
    folder = args.work / "models" / f"{sparsity.replace(':', 'of')}-{values}-{how}"
    began = time.process_time()
    if how == "nearest":
        _round(_pruned(args, sparsity, "same"), folder, _density(sparsity), values)
    else:
        folder = _pruned(args, sparsity, values)
    seconds = time.process_time() - began
    settings = EvalSettings(
        problems=args.evaluation, limit=args.problems, max_new_tokens=args.max_new_tokens, batch_size=400
    )
    name = f"{sparsity.replace(':', 'of')}-{values}-{how}-{args.problems}.json"
    summary = evaluate(folder, settings, args.work / "eval" / name).summary
    kept = ("problems", "accuracy", "ci95", "mean_tokens", "cut_off_share")
    found = {
        "sparsity": sparsity,
        "values": values,
        "how": how,
        "bits": bits(folder, values, sparsity),
        **{key: summary[key] for key in kept},
        "hidden_error": hidden_error(args.model, folder, held),
        "trace_perplexity": perplexity(folder, held),
        "prune_processor_seconds": seconds,
    }
    metrics = folder / "rac/metrics.jsonl"
    if how == "solver" and metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        for key in ("relative_error", "held_out_error"):
            errors = [row[key] for row in rows if row["type"] == "matrix" and row.get(key) is not None]
            found[f"mean_{key}"] = sum(errors) / len(errors) if errors else None
    if folder != args.model and values != "same":
        shutil.rmtree(folder)
    return found


def _pruned(args: argparse.Namespace, sparsity: str, values: str) -> Path:
    """The model pruned by the solver; one that keeps bf16 values stays in WORK for others to be made of."""
    if sparsity == "0" and values == "same":
        dense: Path = args.model
        return dense
    out: Path = args.work / "models" / f"{sparsity.replace(':', 'of')}-{values}-solver"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        asked = {"pattern": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
        settings = PruneSettings.model_validate({**asked, "values": values})
        source = str(own_traces(args, "traces", args.prompts, args.tokens))
        calibration = CalibrationSettings(source=source, tokens=args.tokens)
        prune(args.model, out, Recipe(model=args.model, calibration=calibration, prune=settings))
    return out


def _density(sparsity: str) -> float:
    keep, _, group = sparsity.partition(":")
    return int(keep) / int(group) if group else 1 - float(sparsity)


def _round(source: Path, out: Path, density: float, values: str) -> None:
    """Copy a model with every matrix of its layers rounded to nearest."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("rac"))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if name.endswith(MATRICES):
                grid = fit_grid(weight.float(), None, LARGEST[values], packed_group(weight.shape[1], density))
                tensors[name] = grid.nearest(weight.float()).to(weight.dtype)
        save_file(tensors, file, {"format": "pt"})


def bits(folder: Path, values: str, sparsity: str) -> float:
    """Bits a weight of the matrices in the layers, as they are: a weight whose code is 0 is not kept."""
    total = weights = 0.0
    for file in folder.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if name.endswith(MATRICES):
                weights += weight.numel()
                sparse = sparsity != "0"
                total += BITS[values] * (int((weight != 0).sum()) if sparse else weight.numel())
                total += weight.numel() if sparse else 0
                if values != "same":
                    group = packed_group(weight.shape[1], _density(sparsity))
                    total += 16 * len(weight) * math.ceil(weight.shape[1] / group)
    return total / weights


@torch.inference_mode()
def hidden_error(dense: Path, folder: Path, sequences: list[Any]) -> float:
    """The mean over the layers of ‖h′ − h‖² / ‖h‖², h the dense model's hidden states behind a layer."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, local_files_only=True).eval()
        for path in (dense, folder)
    ]
    missed, whole = (torch.zeros(models[0].config.num_hidden_layers, dtype=torch.float64) for _ in range(2))
    for sequence in sequences:
        ids = torch.as_tensor(sequence.token_ids, dtype=torch.int64)[None]
        wanted, given = (model(ids, output_hidden_states=True).hidden_states[1:] for model in models)
        for layer, (h, found) in enumerate(zip(wanted, given, strict=True)):
            missed[layer] += (found.double() - h.double()).square().sum()
            whole[layer] += h.double().square().sum()
    return float((missed / whole).mean())


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table, the solver's way beside rounding to nearest."""
    lines = [
        "| sparsity | values | bits a weight | accuracy, solver [95%] | nearest [95%] "
        "| error of hidden states, solver | nearest |",
        "|---|---|---|---|---|---|---|",
    ]
    known = {(cell["sparsity"], cell["values"], cell["how"]): cell for cell in cells}
    for sparsity, values in dict.fromkeys((cell["sparsity"], cell["values"]) for cell in cells):
        ways = [known.get((sparsity, values, how)) for how in ("solver", "nearest")]
        size = next(cell["bits"] for cell in ways if cell)
        accuracies = [
            f"{cell['accuracy']:.3f} [{cell['ci95'][0]:.3f}, {cell['ci95'][1]:.3f}]" if cell else "" for cell in ways
        ]
        errors = [f"{cell['hidden_error']:.4f}" if cell else "" for cell in ways]
        lines.append(f"| {sparsity} | {values} | {size:.2f} | {' | '.join([*accuracies, *errors])} |")
    return "\n".join(lines)


def plot(path: Path, cells: list[dict[str, Any]]) -> None:
    """A picture of accuracy over bits a weight: a line for each kind of values, over sparsity; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for values in VALUES:
        how = "nearest" if values == "int3" else "solver"
        shown = [
            cell for cell in cells if (cell["values"], cell["how"]) == (values, how) and ":" not in cell["sparsity"]
        ]
        shown.sort(key=lambda cell: cell["bits"])
        bits, accuracy = [cell["bits"] for cell in shown], [cell["accuracy"] for cell in shown]
        low, high = ([abs(cell["ci95"][end] - cell["accuracy"]) for cell in shown] for end in (0, 1))
        label = {"same": "bf16", "int3": "int3, rounded to nearest"}.get(values, f"{values}, by the solver")
        axes.errorbar(bits, accuracy, yerr=[low, high], marker="o", capsize=2, label=label)
        for cell in shown:
            axes.annotate(
                f"{float(cell['sparsity']):.0%}",
                (cell["bits"], cell["accuracy"]),
                (3, 4),
                fontsize=7,
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([2, 3, 4, 6, 8, 16]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(
        xlabel="bits a weight, mask and scales included",
        ylabel="accuracy",
        title="Accuracy by bits a weight, by sparsity",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    problems = ROOT / "examples/problems"
    parser.add_argument("--model", type=Path, default=ROOT / "examples/abacus")
    parser.add_argument(
        "--work", type=Path, default=Path("build/frontier"), help="folder for all parts (build/frontier)"
    )
    add_record_options(parser)
    parser.add_argument("--plot", type=Path, help="picture of accuracy over bits a weight to write (matplotlib)")
    parser.add_argument("--prompts", type=Path, default=problems / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=problems / "evaluation.jsonl")
    parser.add_argument("--sparsities", nargs="+", choices=SPARSITIES, default=list(SPARSITIES))
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--ways", nargs="+", choices=("solver", "nearest"), default=["nearest", "solver"])
    parser.add_argument("--tokens", type=parse_size, default=38_000, help="calibration tokens (default 38k)")
    parser.add_argument("--held-tokens", type=parse_size, default=10_000, help="tokens to measure by (default 10k)")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--problems", type=int, default=500, help="problems answered in each cell (default 500)")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
