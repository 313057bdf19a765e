"""`rac pack` and `rac unpack`: a pruned checkpoint in packed form, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from rac_engine.cli.options import Command, Parser, add_json, add_restart, console_of
from rac_engine.cli.output import emit


def _add_pack_options(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="OUT", help="folder of a pruned checkpoint with plain weights")
    parser.add_argument("out", type=Path, metavar="PACKED", help="new folder; nothing is changed in OUT")
    parser.add_argument(
        "--values",
        choices=["same", "int8", "int4"],
        default="same",
        help="how kept values are stored: bit for bit, or as integers with a scale for about 32 of them (same)",
    )
    add_json(parser)
    add_restart(parser, "job")


def _pack(args: argparse.Namespace) -> int:
    from rac_engine.pack import pack

    with console_of(args) as console:
        made = pack(args.source, args.out, args.values, restart=args.restart, progress=console.progress)
    emit(made.to_json().rstrip() if args.json else made.summary())
    return 0


def _add_unpack_options(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="PACKED", help="folder that `rac pack` has written")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder; nothing is changed in PACKED")
    add_restart(parser, "job")


def _unpack(args: argparse.Namespace) -> int:
    from rac_engine.base.sizes import format_bytes
    from rac_engine.pack import unpack

    with console_of(args) as console:
        made = unpack(args.source, args.out, restart=args.restart, progress=console.progress)
    emit(f"{made.out}: {made.tensors} matrices unpacked, {format_bytes(made.packed)} → {format_bytes(made.dense)}")
    return 0


PACK = Command(
    "write a pruned checkpoint in packed form: smaller, and read as it is",
    ["rac pack OUT PACKED"],
    _add_pack_options,
    _pack,
)

UNPACK = Command(
    "write a packed checkpoint with plain weights again",
    ["rac unpack PACKED OUT2"],
    _add_unpack_options,
    _unpack,
)
