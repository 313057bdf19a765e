"""What pruned models are worth: method × calibration × sparsity, each cell pruned, evaluated and measured.

    python benchmarks/quality.py --work build/quality                  # all cells; stopped, it goes on where it was
    python benchmarks/quality.py --work build/quality --methods rac sparsegpt --calibrations rac --sparsities 0.7 2:4

A cell is accuracy with its 95% interval, decode length, share of answers cut off, perplexity on held-out traces of the
dense model (completions only) and on general text, and the time to prune. All cells count the same number of
calibration tokens and answer the same problems with the same random numbers. Every finished cell is a file in WORK, and
so are the dense model's traces; the table and the JSON record are of all the cells that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from transformers import AutoModelForCausalLM

from rac_engine import prune
from rac_engine.decode import load_tokenizer
from rac_engine.evaluate import evaluate
from rac_engine.recipe import CalibrationSettings, EvalSettings, PruneSettings, Recipe, TraceSettings
from rac_engine.sizes import parse_size
from rac_engine.traces import generate, load_calibration

ROOT = Path(__file__).parents[1]
METHODS = ("rac", "sparsegpt", "alps", "wanda", "magnitude")
CALIBRATIONS = ("rac", "prompt", "text")
SPARSITIES = ("0.5", "0.6", "0.7", "0.8", "2:4", "1:4")
HELD_TOKENS = 20_000


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    _same_settings(args)
    sources = _sources(args)
    tokenizer = load_tokenizer(args.model)
    held = {
        "trace_perplexity": load_calibration(
            str(_traces(args, "held", args.problems, HELD_TOKENS)),
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
    _cell(args, "dense", lambda: {"method": "dense", **_worth(args, args.model, "dense", held)})
    for sparsity in args.sparsities:
        for method in args.methods:
            for calibration in args.calibrations if method != "magnitude" else ["none"]:
                for reconstruct in args.reconstruct:
                    name = f"{method}-{calibration}-{sparsity.replace(':', 'of')}"
                    if reconstruct != "auto":
                        name += f"-{reconstruct}"

                    def make(
                        name: str = name,
                        method: str = method,
                        calibration: str = calibration,
                        sparsity: str = sparsity,
                        reconstruct: str = reconstruct,
                    ) -> dict[str, Any]:
                        out = args.work / "models" / name
                        began = time.monotonic()
                        if not out.exists():
                            out.parent.mkdir(exist_ok=True)
                            prune(
                                args.model, out, _recipe(args, method, sources.get(calibration), sparsity, reconstruct)
                            )
                        lines = (out / "rac/metrics.jsonl").read_text().splitlines()
                        end = json.loads(lines[-1])
                        errors = [e for e in (json.loads(x).get("relative_error") for x in lines) if e is not None]
                        found = {
                            "method": method,
                            "calibration": calibration,
                            "sparsity": sparsity,
                            "reconstruct": reconstruct,
                            "prune_seconds": end["seconds"],
                            "solve_seconds": end["phases"].get("solve", 0.0),
                            "mean_relative_error": sum(errors) / len(errors) if errors else None,
                            **_worth(args, out, name, held),
                        }
                        shutil.rmtree(out)
                        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                        return found

                    _cell(args, name, make)
    cells = [json.loads(path.read_text()) for path in sorted((args.work / "cells").glob("*.json"))]
    cells.sort(key=lambda cell: (cell.get("sparsity", ""), -cell["accuracy"]))
    print(table(cells))
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
        method = cell["method"] + ("" if cell.get("reconstruct", "auto") == "auto" else f", {cell['reconstruct']}")
        lines.append(
            f"| {cell.get('sparsity', '0')} | {method} | {cell.get('calibration', '')} | "
            f"{cell['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {cell['mean_tokens']:.0f} | "
            f"{cell['cut_off_share']:.3f} | "
            f"{cell['trace_perplexity']:.3f} | {cell['text_perplexity']:.2f} | {cell.get('prune_seconds', 0):.0f} |"
        )
    return "\n".join(lines)


def _cell(args: argparse.Namespace, name: str, make: Any) -> None:
    """Make a cell unless its file is there."""
    path = args.work / "cells" / f"{name}.json"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    made = make()
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(made, indent=1) + "\n")
    staged.replace(path)


def _recipe(args: argparse.Namespace, method: str, source: str | None, sparsity: str, reconstruct: str) -> Recipe:
    pattern = sparsity if ":" in sparsity else None
    share: dict[str, Any] = {} if pattern else {"sparsity": float(sparsity)}
    if method in ("wanda", "magnitude"):
        reconstruct = "auto"
    return Recipe(
        model=args.model,
        calibration=CalibrationSettings(source=source, tokens=args.tokens, sequence_length=256),
        prune=PruneSettings.model_validate({"method": method, "pattern": pattern, "reconstruct": reconstruct, **share}),
    )


def _worth(args: argparse.Namespace, model: Path, name: str, held: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and lengths of a model, and its perplexities."""
    out = args.work / "eval" / f"{name}.json"
    if out.exists():
        summary = json.loads(out.read_text())["summary"]
    else:
        settings = EvalSettings(
            problems=args.evaluation,
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


def _sources(args: argparse.Namespace) -> dict[str, str]:
    """Where each calibration's tokens come from, made where they are not there yet."""
    made = {}
    if "rac" in args.calibrations:
        made["rac"] = str(_traces(args, "traces", 0, args.tokens))
    if "prompt" in args.calibrations:
        made["prompt"] = str(args.prompts)
    if "text" in args.calibrations:
        made["text"] = f"text:{_text(args, 'calibration')}"
    return made


def _traces(args: argparse.Namespace, name: str, skip: int, tokens: int) -> Path:
    """The dense model's own traces: of the calibration prompts, or to measure with, of evaluation problems beyond
    the first `skip`, which are those that are answered."""
    out: Path = args.work / name
    if not out.exists():
        prompts = args.prompts
        if skip:
            prompts = args.work / "held.jsonl"
            lines = args.evaluation.read_text().splitlines()[skip:] or args.prompts.read_text().splitlines()[::-1]
            prompts.write_text("\n".join(lines) + "\n")
        settings = TraceSettings(
            prompts=prompts,
            tokens=tokens,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            batch_size=2 * args.batch_size,
        )
        generate(args.model, settings, out)
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
    parser.add_argument("--tokens", type=parse_size, default=38_000, help="calibration tokens (default 38k)")
    parser.add_argument("--samples", type=int, default=1, help="traces a prompt (default 1)")
    parser.add_argument("--problems", type=int, default=500, help="problems answered in each cell (default 500)")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
