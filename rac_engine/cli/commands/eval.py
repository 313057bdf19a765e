"""`rac eval`: measure accuracy and decode lengths on problems with answers, and perplexity on traces or text."""

from __future__ import annotations

import argparse
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.cli.options import (
    SAMPLING,
    Command,
    Parser,
    add_device,
    add_fields,
    add_limits,
    add_model,
    add_restart,
    console_of,
    resolved_device,
    settings_of,
)
from rac_engine.cli.output import emit

_COMMON = ("problems", "perplexity", "limit", *SAMPLING)


def _add_options(parser: Parser) -> None:
    from rac_engine.recipe import EvalSettings

    add_model(parser, "folder of a Hugging Face checkpoint, dense or pruned")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS", help="JSON file for the results")
    add_fields(
        parser, "problems and sampling, and what is predicted", EvalSettings, list(EvalSettings.model_fields), _COMMON
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RESULTS0",
        help="results of another model on the same problems or tokens, to compare with",
    )
    add_device(parser)
    add_limits(parser)
    add_restart(parser, "evaluation")


def _eval(args: argparse.Namespace) -> int:
    from rac_engine.recipe import EvalSettings

    if not (hasattr(args, "problems") or hasattr(args, "perplexity")):
        raise BadInput("give --problems or --perplexity, or both; see `rac eval --help`")
    settings = settings_of(args, EvalSettings)
    from rac_engine.base.sizes import percent
    from rac_engine.evaluation import evaluate, perplexity_table

    with console_of(args) as console:
        result = evaluate(
            args.model,
            settings,
            args.out,
            baseline=args.baseline,
            device=resolved_device(args.device),
            restart=args.restart,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            progress=console.progress,
        )
    if figures := result.summary:
        low, high = figures["ci95"]
        emit(
            f"{args.model}: {percent(figures['accuracy'])} of {figures['problems']} right "
            f"[{percent(low)}, {percent(high)}], decode length mean {figures['mean_tokens']:.0f}, "
            f"p95 {figures['p95_tokens']}, {percent(figures['cut_off_share'])} cut off"
        )
    if result.comparison:
        against = result.comparison
        emit(
            f"against {against['baseline']}: {against['lost']} lost, {against['gained']} gained "
            f"(McNemar p = {against['mcnemar_p']:.2g}), {against['length_ratio']:.2f} × as long"
        )
    if result.perplexity:
        emit(perplexity_table(result.perplexity))
    for note in result.notes:
        emit(f"note     {note}")
    emit(f"results  {result.path}")
    return 0


EVAL = Command(
    "measure accuracy and decode lengths on problems with answers, and perplexity",
    [
        "rac eval MODEL --problems problems.jsonl --out dense.json",
        "rac eval OUT --problems problems.jsonl --out pruned.json --baseline dense.json",
        "rac eval OUT --perplexity TRACES --perplexity text:book.txt --out loss.json --host-memory 4GiB",
    ],
    _add_options,
    _eval,
)
