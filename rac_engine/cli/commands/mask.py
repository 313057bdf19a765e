"""`rac mask apply`: put the zeros of a pruned checkpoint back into one that was trained on from it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rac_engine.cli.options import Command, Parser, add_restart, console_of
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    parser.add_argument("action", choices=["apply"], help="write TARGET to OUT with the zeros of SOURCE")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="output folder of `rac prune` or `rac run`")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder of the checkpoint trained on from it")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder; nothing is changed in SOURCE or TARGET")
    add_restart(parser, "job")


def _mask(args: argparse.Namespace) -> int:
    from rac_engine.base.sizes import percent
    from rac_engine.engine import apply_masks

    with console_of(args) as console:
        made = apply_masks(args.source, args.target, args.out, restart=args.restart, progress=console.progress)
    share = percent(made.zeros / made.weights, 2)
    emit(f"{made.out}: {share} zeros in {made.matrices} matrices, {made.lost:,} of them put back")
    return 0


MASK = Command(
    "put the zeros of a pruned checkpoint back into one that was trained on from it",
    ["rac mask apply OUT TRAINED OUT2"],
    _add_options,
    _mask,
)
