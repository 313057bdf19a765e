"""`rac trace`: sample the model's own chains of thought."""

from __future__ import annotations

import argparse
from pathlib import Path

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

_COMMON = ("tokens", *SAMPLING)


def _add_options(parser: Parser) -> None:
    from rac_engine.recipe import TraceSettings

    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="TRACES", help="new folder for the traces")
    parser.add_argument(
        "--prompts",
        action="append",
        required=True,
        metavar="FILE[:SHARE]",
        help=f"{TraceSettings.model_fields['prompts'].description}; without shares in equal parts",
    )
    names = [name for name in TraceSettings.model_fields if name != "prompts"]
    add_fields(parser, "sampling", TraceSettings, names, _COMMON)
    add_device(parser)
    add_limits(parser)
    add_restart(parser, "sampling")


def _trace(args: argparse.Namespace) -> int:
    from rac_engine.recipe import TraceSettings

    settings = settings_of(args, TraceSettings)
    from rac_engine.traces import generate

    with console_of(args) as console:
        report = generate(
            args.model,
            settings,
            args.out,
            device=resolved_device(args.device),
            restart=args.restart,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            progress=console.progress,
        )
    emit(f"{report.out}: {report.describe()}")
    for note in report.notes:
        emit(f"note    {note}")
    return 0


TRACE = Command(
    "sample the model's own chains of thought",
    ["rac trace MODEL --prompts prompts.jsonl --tokens 1M --out TRACES"],
    _add_options,
    _trace,
)
