"""`rac report`: write the report of a job once more."""

from __future__ import annotations

import argparse

from rac_engine.cli.options import Command, Parser, add_output
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    add_output(parser)


def _report(args: argparse.Namespace) -> int:
    from rac_engine.report import write_report

    emit(str(write_report(args.out)))
    return 0


REPORT = Command("write the report of a job once more", ["rac report OUT"], _add_options, _report)
