"""`rac run`: trace, prune, evaluate and report, as a recipe says."""

from __future__ import annotations

import argparse
from pathlib import Path

from rac_engine.cli.options import (
    Command,
    Parser,
    add_device,
    add_limits,
    add_restart,
    console_of,
    resolved_device,
)
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file that says everything about the job")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned checkpoint and all results")
    add_device(parser)
    add_limits(parser)
    add_restart(parser, "job")


def _run(args: argparse.Namespace) -> int:
    from rac_engine.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    from rac_engine.report import table
    from rac_engine.run import run

    with console_of(args) as console:
        result = run(
            recipe,
            args.out,
            device=resolved_device(args.device),
            restart=args.restart,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            console=console,
        )
    if result.rows:
        emit(table(result.rows))
    emit(f"report  {result.report}")
    return 0


RUN = Command(
    "trace, prune, evaluate and report, as a recipe says",
    ["rac run examples/demo.yaml OUT"],
    _add_options,
    _run,
)
