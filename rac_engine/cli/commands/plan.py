"""`rac plan`: say what a job would touch and cost, without doing it."""

from __future__ import annotations

import argparse

from rac_engine.base.errors import BadInput
from rac_engine.cli.commands.pruning_options import add_pruning
from rac_engine.cli.options import Command, Parser, add_json, add_limits, add_model, settings_of, size
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    add_model(parser, "folder of a checkpoint, of which config.json is enough")
    group = parser.add_argument_group("calibration")
    group.add_argument("--tokens", type=size, default=1_000_000, metavar="N", help="calibration tokens (default: 1M)")
    group.add_argument(
        "--length", type=size, default=1024, metavar="N", help="mean length of a sequence (default: 1024)"
    )
    group.add_argument(
        "--max-length", type=size, metavar="N", help="tokens of the longest sequence (default: the mean length)"
    )
    add_pruning(parser)
    add_limits(parser)
    add_json(parser, "print it for programs: bytes and FLOPs as numbers")


def _plan(args: argparse.Namespace) -> int:
    from rac_engine.plan import Machine, device_peaks, make_plan, render
    from rac_engine.recipe import PruneSettings

    settings = settings_of(args, PruneSettings)
    if not args.tokens or not args.length:
        raise BadInput("--tokens and --length should be at least 1")
    on_gpu = args.device_memory is not None
    peaks, whose = device_peaks(on_gpu)
    plan = make_plan(
        args.model,
        settings,
        args.tokens,
        min(args.length, args.max_length or args.length),
        args.max_length,
        Machine(on_gpu, args.device_memory, args.host_memory),
        peaks,
    )
    emit(plan.to_json() if args.json else f"times after the peaks of {whose}\n\n{render(plan)}")
    return 0


PLAN = Command(
    "say what a job would touch and cost, without doing it",
    [
        "rac plan MODEL --tokens 1M",
        "rac plan MODEL --device-memory 6GiB --host-memory 16GiB --tokens 1M --max-length 32k",
        "rac plan MODEL --pattern 2:4 --json",
    ],
    _add_options,
    _plan,
)
