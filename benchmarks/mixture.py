"""Which tokens tie the experts of a mixture to the dense model: none, or those that the one router or the other sends.

    python examples/problems.py --split calibration --count 400 --out prompts.jsonl     # or what the model answers
    python examples/problems.py --split evaluation --count 900 --out problems.jsonl
    python benchmarks/mixture.py --model MIXTURE --prompts prompts.jsonl --evaluation problems.jsonl --work WORK

The default method, attention and all else as by default, three times:

- `none`: an expert reconstructs what its dense matrices make of the pruned model's inputs;
- `dense router`: an expert's outputs are matched at the tokens that the dense model sends to it;
- `pruned router`: at those that the pruned model sends to it, as the engine does.

Each is pruned with `--traces` independent sets of the dense model's traces; each pruned model answers the first
`--problems` problems once, and its perplexity is that of the traces of the problems behind these, completions only.
Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import machine
from quality import HELD_TOKENS, finished, own_traces, perplexity
from torch import Tensor

from rac_engine import prune
from rac_engine.base.sizes import parse_size
from rac_engine.calibrate import DenseOutputs, DenseReference, Drift, Statistic, Stream
from rac_engine.calibrate.observers import recording
from rac_engine.engine import experts, stages
from rac_engine.engine.layer import Layer
from rac_engine.evaluation import evaluate, wilson
from rac_engine.models import Block
from rac_engine.recipe import CalibrationSettings, EvalSettings, PruneSettings, Recipe
from rac_engine.traces import load_calibration, load_tokenizer

WAYS = ("none", "dense router", "pruned router")


def at_the_dense_routers_tokens(
    self: Stream,
    block: Block,
    statistics: Mapping[str, Statistic],
    beside: DenseReference,
    drift: Drift | None = None,
) -> None:
    """`Stream.observe_experts` with the dense block going first, and the pruned one asked for the same tokens."""
    for (chunk, hidden), (_, original) in zip(self.chunks(), beside.stream.chunks(), strict=True):
        weights, x, of_all = self._weights(chunk), block.norm(hidden), dict[str, Tensor]()
        counted = self._own(statistics, chunk)
        if drift is not None:
            drift.add(chunk, hidden, original, weights)
        block.observe(x, chunk, recording(of_all, [name for name in counted if not block.is_routed(name)]))

        def add(
            name: str,
            theirs: Tensor,
            tokens: Tensor | None,
            x: Tensor = x,
            weights: Tensor | None = weights,
            of_all: dict[str, Tensor] = of_all,
            counted: Mapping[str, Statistic] = counted,
        ) -> None:
            given = of_all[name] if tokens is None else block.expert_input(name, x[tokens])
            own = weights if weights is None or tokens is None else weights[tokens]
            by_outputs = isinstance(counted[name].match, DenseOutputs)
            others = [beside.block.expert_output(name, theirs)] * 2 if by_outputs else [theirs]
            counted[name].add_matched(given, others, own)

        observers = {name: functools.partial(add, name) for name in counted}
        beside.block.observe(beside.block.norm(original), chunk, observers)


@contextmanager
def way(name: str) -> Iterator[None]:
    """The engine, going that way."""
    if name == "dense router":
        with patch.object(Stream, "observe_experts", at_the_dense_routers_tokens):
            yield
    elif name == "none":
        matched = experts.prune_experts

        def alone(layer: Layer, stream: Stream, block: Block, groups: Any, beside: Any) -> None:
            matched(layer, stream, block, groups, None)

        with patch.object(stages, "prune_experts", alone):
            yield
    else:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a mixture of experts that reasons")
    parser.add_argument("--prompts", type=Path, required=True, help="to calibrate with, a jsonl")
    parser.add_argument("--evaluation", type=Path, required=True, help="problems with answers, a jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder for traces, cells and models under way")
    parser.add_argument("--out", type=Path, help="JSON record of all cells")
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.6", "0.7"], metavar="SHARE|N:M")
    parser.add_argument("--traces", type=int, default=2, help="sets of traces, each pruned with (default 2)")
    parser.add_argument("--tokens", type=parse_size, default=38_000, help="in a set (default 38k)")
    parser.add_argument("--problems", type=int, default=300, help="answered by each model (default 300)")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    args.samples = 1  # of each prompt in a set of traces
    args.work.mkdir(parents=True, exist_ok=True)
    behind = args.work / "held.jsonl"
    behind.write_text("".join(f"{line}\n" for line in args.evaluation.read_text().splitlines()[args.problems :]))
    source = str(own_traces(args, "held", behind, HELD_TOKENS))
    calibration = load_calibration(source, part="completion", tokens=HELD_TOKENS, tokenizer=load_tokenizer(args.model))
    worth = functools.partial(_worth, args, calibration.sequences)
    cells = [finished(args.work, "dense", lambda: worth(args.model))]
    for sparsity, number, name in itertools.product(args.sparsities, range(args.traces), WAYS):
        source = str(own_traces(args, f"traces-{number}", args.prompts, args.tokens, number))

        def made(sparsity: str = sparsity, source: str = source, name: str = name) -> dict[str, Any]:
            asked = {"pattern": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
            recipe = Recipe(
                model=args.model,
                calibration=CalibrationSettings(source=source, tokens=args.tokens),
                prune=PruneSettings.model_validate(asked),
            )
            out = args.work / "model"
            shutil.rmtree(out, ignore_errors=True)
            with way(name):
                prune(args.model, out, recipe, restart=True)
            return {"sparsity": sparsity, "way": name, **worth(out)}

        cells.append(finished(args.work, f"{sparsity.replace(':', 'of')}-{name.replace(' ', '-')}-{number}", made))
    print(table(cells))
    record = {"machine": machine(), "model": args.model.name, "tokens": args.tokens, "cells": cells}
    print(json.dumps(record["machine"]))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def table(cells: list[dict[str, Any]]) -> str:
    """Accuracy of all sets of traces together with its 95% interval, and their mean loss on held-out traces."""
    lines = ["| sparsity | " + " | ".join(WAYS) + " |", "|---" * (1 + len(WAYS)) + "|"]
    dense, *pruned = cells
    for sparsity in dict.fromkeys(cell["sparsity"] for cell in pruned):
        told = []
        for name in WAYS:
            these = [cell for cell in pruned if (cell["sparsity"], cell["way"]) == (sparsity, name)]
            right, asked = (sum(cell[key] for cell in these) for key in ("correct", "problems"))
            low, high = wilson(right, asked)
            losses = [math.log(cell["trace_perplexity"]) for cell in these]
            told.append(f"{right / asked:.3f} [{low:.3f}, {high:.3f}], {1000 * sum(losses) / len(losses):.2f}")
        lines.append(f"| {sparsity} | " + " | ".join(told) + " |")
    own = f"{dense['correct'] / dense['problems']:.3f}, {1000 * math.log(dense['trace_perplexity']):.2f}"
    return "\n".join([*lines, "", f"accuracy [95%], loss on held-out traces in 1/1000 nats; the dense model: {own}"])


def _worth(args: argparse.Namespace, held: list[Any], model: Path) -> dict[str, Any]:
    settings = EvalSettings(
        problems=args.evaluation,
        limit=args.problems,
        max_new_tokens=args.max_new_tokens,
        batch_size=2 * args.batch_size,
    )
    answers = args.work / "answers.json"
    answers.unlink(missing_ok=True)
    summary = evaluate(model, settings, answers).summary
    kept = ("problems", "correct", "mean_tokens", "cut_off_share")
    return {**{key: summary[key] for key in kept}, "trace_perplexity": perplexity(model, held)}


if __name__ == "__main__":
    main()
