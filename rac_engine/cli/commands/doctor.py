"""`rac doctor`: say what this machine has and lacks for pruning."""

from __future__ import annotations

import argparse

from rac_engine.cli.options import Command, Parser, add_json
from rac_engine.cli.output import emit


def _add_options(parser: Parser) -> None:
    add_json(parser)


def _doctor(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from rac_engine.cli.findings import examine, render

    findings = examine()
    emit(json.dumps([dataclasses.asdict(f) for f in findings], indent=1) if args.json else render(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0


DOCTOR = Command("say what this machine has and lacks for pruning", ["rac doctor"], _add_options, _doctor)
