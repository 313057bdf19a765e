"""`rac verify`: prove from the files alone that an output is whole and sparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from rac_engine.cli.options import Command, Parser, add_json, add_output, console_of
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    add_output(parser)
    parser.add_argument(
        "--source",
        type=Path,
        metavar="MODEL",
        help="also prove that what was not pruned is bit-equal to this checkpoint",
    )
    add_json(parser)


def _verify(args: argparse.Namespace) -> int:
    from rac_engine.engine import verify

    with console_of(args) as console:
        result = verify(args.out, args.source, console.progress)
    emit(result.to_json() if args.json else result.summary())
    return 1 if result.problems else 0


VERIFY = Command(
    "prove from the files alone that an output is whole and sparse",
    ["rac verify OUT --source MODEL"],
    _add_options,
    _verify,
)
