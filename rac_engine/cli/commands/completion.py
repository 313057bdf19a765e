"""`rac completion`: print a script by which a shell completes commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rac_engine.cli.options import Command, Parser
from rac_engine.cli.output import emit

SHELLS = ("bash", "zsh", "fish")


def _add_options(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def _completion(args: argparse.Namespace) -> int:
    import shtab

    for action in _actions(args.whole):
        if action.type is Path:
            vars(action)["complete"] = shtab.FILE
    emit(shtab.complete(args.whole, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


COMPLETION = Command(
    "print a script by which a shell completes commands and options",
    ["rac completion bash > rac.bash"],
    _add_options,
    _completion,
)
