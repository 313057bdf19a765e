"""What pruned models are worth: method × calibration × sparsity, each cell pruned, evaluated and measured.

    python benchmarks/quality.py --work build/quality                  # all cells; stopped, it goes on where it was
    python benchmarks/quality.py --work build/quality --methods admm alps --calibrations traces --sparsities 0.7 2:4
    python benchmarks/quality.py --work build/quality --methods admm --calibrations traces --sparsities 0.7 \\
        --token-counts 5k 200k            # or --dampings 0.003, --reconstruct dense, --without sort multiply,
                                          # at 1:4 --efforts "tuned only"

A cell is accuracy with its 95% interval, decode length, share of answers cut off, perplexity on held-out traces of the
dense model (completions only) and on general text, and the time to prune. Cells count the same number of calibration
tokens and answer the same problems with the same random numbers, unless `--token-counts` or `--replaced` says otherwise
(the latter adds copies with replaced tokens to the traces), or `--without`, which leaves a kind of problem out of the
traces and answers the problems of that kind alone. Every finished cell is a file in WORK, and so are the dense model's
traces; the table and the JSON record are of all the cells that are there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from transformers import AutoModelForCausalLM

from rac_engine import prune
from rac_engine.base.sizes import parse_size
from rac_engine.evaluation import evaluate
from rac_engine.recipe import CalibrationSettings, EvalSettings, PruneSettings, Recipe, TraceSettings
from rac_engine.traces import generate, load_calibration, load_tokenizer

ROOT = Path(__file__).parents[1]
METHODS = ("admm", "sparsegpt", "alps", "wanda", "magnitude")
CALIBRATIONS = ("traces", "prompt", "text")
SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "2:4", "1:4")
EFFORTS: dict[str, dict[str, Any]] = {
    "not reordered nor tuned": {"reorder": "none", "tune": 0},
    "reordered only": {"tune": 0},
    "tuned only": {"reorder": "none"},
    "tuned": {"tune": 10},
}
HELD_TOKENS = 20_000
COLUMNS = {
    "by method, on traces": [*((method, "traces") for method in METHODS[:-1]), ("magnitude", "none")],
    "by calibration": [(method, how) for method in METHODS[:-1] for how in ("prompt", "text")],
}


@dataclass(frozen=True)
class Cell:
    """What is pruned and calibrated how; `None` is what the other cells have."""

    method: str
    calibration: str
    sparsity: str
    reconstruct: str = "auto"
    damping: float | None = None
    tokens: int | None = None
    without: str | None = None
    """The kind of problem that no trace is of, and that is answered."""
    effort: str | None = None
    """Which of EFFORTS, where it is not what the pattern has by default."""
    allocation: str = "uniform"
    """How the sparsity is spread over the model."""
    replaced: float = 0.0
    """Copies with replaced tokens, so many tokens for each of the traces."""

    @property
    def variant(self) -> list[str]:
        """How this cell differs from the plain one of its method."""
        found = [] if self.reconstruct == "auto" else [self.reconstruct]
        found += [] if self.damping is None else [f"damping {self.damping:g}"]
        found += [] if self.tokens is None else [f"{self.tokens / 1000:g}k tokens"]
        found += [] if self.effort is None else [self.effort]
        found += [] if self.allocation == "uniform" else [f"allocation {self.allocation}"]
        found += [f"replaced {self.replaced:g}"] if self.replaced else []
        return found + ([] if self.without is None else [f"no {self.without} in the traces, all answered are"])

    @property
    def name(self) -> str:
        parts = [self.method, self.calibration, self.sparsity.replace(":", "of")]
        parts += [] if self.reconstruct == "auto" else [self.reconstruct]
        parts += [] if self.damping is None else [f"damping{self.damping:g}"]
        parts += [] if self.tokens is None else [f"tokens{self.tokens}"]
        parts += [] if self.effort is None else [self.effort.replace(" ", "-")]
        parts += [] if self.allocation == "uniform" else [self.allocation]
        parts += [f"replaced{self.replaced:g}"] if self.replaced else []
        return "-".join(parts + ([] if self.without is None else [f"without-{self.without}"]))


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    _same_settings(args)
    tokenizer = load_tokenizer(args.model)
    held = {
        "trace_perplexity": load_calibration(
            str(own_traces(args, "held", _held_prompts(args), HELD_TOKENS)),
            part="completion",
            tokens=HELD_TOKENS,
            tokenizer=tokenizer,
        ).sequences,
        "text_perplexity": load_calibration(
            f"text:{_text(args, 'evaluation')}",
            tokens=HELD_TOKENS,
            tokenizer=tokenizer,
            sequence_length=256,
        ).sequences,
    }
    finished(args.work, "dense", lambda: {"method": "dense", **_worth(args, args.model, "dense", held)})
    for cell in _cells(args):
        finished(args.work, cell.name, functools.partial(_made, args, cell, held))
    cells = [json.loads(path.read_text()) for path in sorted((args.work / "cells").glob("*.json"))]
    cells.sort(key=lambda cell: (cell.get("sparsity", ""), len(_variant(cell)), -cell["accuracy"]))
    print(table(cells))
    for calibration, columns in COLUMNS.items():
        print(f"\n{calibration}:\n\n{overview(cells, columns)}")
    record = {
        "machine": machine(),
        "model": str(args.model),
        "tokens": args.tokens,
        "problems": args.problems,
        "cells": cells,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def _cells(args: argparse.Namespace) -> list[Cell]:
    """All that are asked for, every combination."""
    variants = itertools.product(
        args.reconstruct,
        args.dampings or [None],
        args.token_counts or [None],
        args.without or [None],
        args.efforts or [None],
        args.allocations,
        args.replaced,
    )
    return [
        Cell(method, calibration, sparsity, *variant)
        for variant in variants
        for sparsity in args.sparsities
        for method in args.methods
        for calibration in (args.calibrations if method != "magnitude" else ["none"])
    ]


def _made(args: argparse.Namespace, cell: Cell, held: dict[str, Any]) -> dict[str, Any]:
    """Prune, evaluate and measure a cell."""
    out = args.work / "models" / cell.name
    began = time.monotonic()
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        prune(args.model, out, _recipe(args, cell))
    lines = (out / "rac/metrics.jsonl").read_text().splitlines()
    end = json.loads(lines[-1])
    errors = [e for e in (json.loads(x).get("relative_error") for x in lines) if e is not None]
    found = {
        "method": cell.method,
        "calibration": cell.calibration,
        "sparsity": cell.sparsity,
        "reconstruct": cell.reconstruct,
        "variant": cell.variant,
        "prune_seconds": end["seconds"],
        "solve_seconds": end["phases"].get("solve", 0.0),
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        **_worth(args, out, cell.name, held, cell.without),
    }
    shutil.rmtree(out)
    print(f"{cell.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def _variant(cell: dict[str, Any]) -> list[str]:
    """`Cell.variant` of a finished cell; older records have `reconstruct` alone."""
    plain = cell.get("reconstruct", "auto") == "auto"
    return cell.get("variant", [] if plain else [cell["reconstruct"]])


def _same_settings(args: argparse.Namespace) -> None:
    """Cells that are there were made with the same settings: another kind of cell asks for another WORK."""
    kept = args.work / "settings.json"
    names = ("model", "prompts", "evaluation", "tokens", "samples", "problems", "max_new_tokens")
    settings = {name: str(getattr(args, name)) for name in names}
    if not kept.exists():
        kept.write_text(json.dumps(settings, indent=1) + "\n")
    elif (found := json.loads(kept.read_text())) != settings:
        changed = next(name for name in names if found.get(name) != settings[name])
        raise SystemExit(
            f"{args.work}: its cells were made with {changed} {found.get(changed)}, not {settings[changed]}; "
            "choose another --work"
        )


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table."""
    lines = [
        "| sparsity | method | calibration | accuracy [95%] | decode | cut off | trace ppl | text ppl | prune s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        low, high = cell["ci95"]
        method = ", ".join([cell["method"], *_variant(cell)])
        lines.append(
            f"| {cell.get('sparsity', '0')} | {method} | {cell.get('calibration', '')} | "
            f"{cell['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {cell['mean_tokens']:.0f} | "
            f"{cell['cut_off_share']:.3f} | "
            f"{cell['trace_perplexity']:.3f} | {cell['text_perplexity']:.2f} | {cell.get('prune_seconds', 0):.0f} |"
        )
    return "\n".join(lines)


def overview(cells: list[dict[str, Any]], columns: list[tuple[str, str]]) -> str:
    """Accuracy / mean decode length / share cut off (where any) of the plain cells, a row a sparsity."""
    heads = [method if how == "none" else f"{how} · {method}" for method, how in columns]
    lines = [f"| sparsity | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    plain = {
        (cell["method"], cell["calibration"], cell["sparsity"]): cell
        for cell in cells
        if "sparsity" in cell and not _variant(cell)
    }

    def told(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return ""
        cut = f" / {cell['cut_off_share']:.0%}" if cell["cut_off_share"] >= 0.005 else ""
        return f"{cell['accuracy']:.3f}".removeprefix("0") + f" / {cell['mean_tokens']:.0f}{cut}"

    for sparsity in SPARSITIES:
        lines.append(f"| {sparsity} | " + " | ".join(told(plain.get((*column, sparsity))) for column in columns) + " |")
    return "\n".join(lines)


def finished(work: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell as its file says, made if that is not there."""
    path = work / "cells" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = make()
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(made, indent=1) + "\n")
        staged.replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _recipe(args: argparse.Namespace, cell: Cell) -> Recipe:
    pattern = cell.sparsity if ":" in cell.sparsity else None
    asked: dict[str, Any] = {"method": cell.method, "pattern": pattern}
    if not pattern:
        asked["sparsity"] = float(cell.sparsity)
    if cell.method not in ("wanda", "magnitude"):
        asked["reconstruct"] = cell.reconstruct
    if cell.damping is not None:
        asked["damping"] = cell.damping
    if cell.effort is not None:
        asked |= EFFORTS[cell.effort]
    if not pattern and cell.method != "magnitude":
        asked["allocation"] = cell.allocation
    tokens = cell.tokens or args.tokens
    return Recipe(
        model=args.model,
        calibration=CalibrationSettings(
            source=_source(args, cell), tokens=tokens, sequence_length=256, replaced=cell.replaced
        ),
        prune=PruneSettings.model_validate(asked),
    )


def _worth(
    args: argparse.Namespace, model: Path, name: str, held: dict[str, Any], kind: str | None = None
) -> dict[str, Any]:
    """Accuracy and lengths of a model, on problems of one kind if one is given, and its perplexities."""
    out = args.work / "eval" / f"{name}.json"
    if out.exists():
        summary = json.loads(out.read_text())["summary"]
    else:
        problems = args.evaluation
        if kind is not None:
            problems = args.work / f"evaluation-{kind}.jsonl"
            lines = args.evaluation.read_text().splitlines()[: args.problems]
            problems.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["kind"] == kind))
        settings = EvalSettings(
            problems=problems,
            limit=args.problems,
            max_new_tokens=args.max_new_tokens,
            batch_size=2 * args.batch_size,
        )
        summary = evaluate(model, settings, out).summary
    kept = ("problems", "accuracy", "ci95", "mean_tokens", "p95_tokens", "cut_off_share", "kinds", "seconds")
    perplexities = {key: perplexity(model, sequences) for key, sequences in held.items()}
    return {**{key: summary[key] for key in kept if key in summary}, **perplexities}


@torch.inference_mode()
def perplexity(folder: Path, sequences: list[Any]) -> float:
    """exp of the mean loss over the tokens that count, each given those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True).eval()
    total, count = 0.0, 0.0
    for sequence in sequences:
        ids = torch.as_tensor(sequence.token_ids, dtype=torch.int64)
        if len(ids) < 2:
            continue
        weights = torch.ones(len(ids)) if sequence.weights is None else torch.as_tensor(sequence.weights)
        said = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        losses = -said.gather(1, ids[1:, None])[:, 0]
        total += float((losses * weights[1:]).sum())
        count += float(weights[1:].sum())
    return math.exp(total / count)


def _source(args: argparse.Namespace, cell: Cell) -> str | None:
    """Where a cell's calibration tokens come from, made where they are not there yet."""
    if cell.calibration == "prompt":
        return str(args.prompts)
    if cell.calibration == "text":
        return f"text:{_text(args, 'calibration')}"
    if cell.calibration == "none":
        return None
    if cell.without is not None:
        prompts = args.work / f"prompts-without-{cell.without}.jsonl"
        lines = args.prompts.read_text().splitlines()
        prompts.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["kind"] != cell.without))
        return str(own_traces(args, f"traces-without-{cell.without}", prompts, args.tokens))
    if cell.tokens is not None and cell.tokens > args.tokens:
        most = max(args.token_counts)
        return str(own_traces(args, f"traces-{most}", args.prompts, most))
    return str(own_traces(args, "traces", args.prompts, args.tokens))


def own_traces(args: argparse.Namespace, name: str, prompts: Path, tokens: int, seed: int = 0) -> Path:
    """The dense model's own traces, made where they are not there yet."""
    out: Path = args.work / name
    if not out.exists():
        settings = TraceSettings(
            prompts=prompts,
            tokens=tokens,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            seed=seed,
            batch_size=2 * args.batch_size,
        )
        generate(args.model, settings, out)
    return out


def _held_prompts(args: argparse.Namespace) -> Path:
    """To measure with: evaluation problems beyond those that are answered, or the last of calibration's."""
    out: Path = args.work / "held.jsonl"
    lines = args.evaluation.read_text().splitlines()[args.problems :] or args.prompts.read_text().splitlines()[::-1]
    out.write_text("\n".join(lines) + "\n")
    return out


def _text(args: argparse.Namespace, split: str) -> Path:
    """General text that the example model was not trained on."""
    out: Path = args.work / f"english-{split}.txt"
    if not out.exists():
        command = [sys.executable, str(ROOT / "examples/english.py"), "--split", split, "--out", str(out)]
        subprocess.run(command, check=True)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    problems = ROOT / "examples/problems"
    parser.add_argument("--model", type=Path, default=ROOT / "examples/abacus")
    parser.add_argument("--work", type=Path, required=True, help="folder for traces, cells and models under way")
    parser.add_argument("--out", type=Path, help="JSON record of all cells")
    parser.add_argument("--prompts", type=Path, default=problems / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=problems / "evaluation.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS))
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES), metavar="SHARE|N:M")
    parser.add_argument("--reconstruct", nargs="+", choices=("auto", "residual", "dense", "layer"), default=["auto"])
    parser.add_argument("--dampings", nargs="+", type=float, metavar="SHARE", help="other dampings, cells of their own")
    parser.add_argument("--token-counts", nargs="+", type=parse_size, metavar="N", help="other counts, of traces only")
    parser.add_argument(
        "--efforts",
        nargs="+",
        choices=EFFORTS,
        help="less than the default does at 1:4, or tuning elsewhere",
    )
    parser.add_argument("--allocations", nargs="+", choices=("uniform", "error"), default=["uniform"])
    parser.add_argument("--replaced", nargs="+", type=float, default=[0.0], metavar="SHARE", help="of copies")
    parser.add_argument("--without", nargs="+", metavar="KIND", help="kinds of problem, each left out of the traces")
    parser.add_argument("--tokens", type=parse_size, default=38_000, help="calibration tokens (default 38k)")
    parser.add_argument("--samples", type=int, default=1, help="traces a prompt (default 1)")
    parser.add_argument("--problems", type=int, default=500, help="problems answered in each cell (default 500)")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
