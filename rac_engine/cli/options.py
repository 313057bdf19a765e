"""Options of commands: those that set a field of a recipe take their help, type and default from the field.

A command has a short help page (`--help`) with what people use, and a full one (`--help-all`) where there is more.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from rac_engine.base.errors import BadInput

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rac_engine.base.console import Console

    M = TypeVar("M", bound=BaseModel)


SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p", "instruction", "template_arguments")
"""Fields of sampling that the short help of a command has."""


class Parser(argparse.ArgumentParser):
    """argparse with mistakes as one line, and options that only the full help page shows."""

    full = False
    """Whether help shows all options."""
    hidden = 0
    """Options that are left out of the short page."""

    def error(self, message: str) -> NoReturn:
        """Raise `BadInput` with argparse's message."""
        raise BadInput(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True)
class Command:
    """A subcommand of `rac`."""

    summary: str
    """Its line in the overview."""
    examples: Sequence[str]
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    """Does it and returns the exit code."""


def _kind(annotation: Any) -> Any:
    """The plain type (or Literal) under Annotated, Optional and list."""
    if get_origin(annotation) is Literal:
        return annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _kind(parts[0]) if parts else annotation


def size(text: str) -> int:
    """Read a size like 8192, 8k or 6GiB, for argparse."""
    from rac_engine.base.sizes import parse_size

    try:
        return parse_size(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def has_option(model: type[BaseModel], name: str) -> bool:
    """Whether a field of a recipe can be an option: not one that is a section of its own."""
    field = model.model_fields[name]
    return not (hasattr(field.default, "model_fields_set") or hasattr(_kind(field.annotation), "model_fields"))


def add_fields(
    parser: Parser, title: str, model: type[BaseModel], names: Sequence[str], common: Collection[str] | None = None
) -> None:
    """Add a group with an option for each of the model's fields `names` that can be one.

    An option that is not given leaves no trace in the namespace. Only those in `common` are on the short help page;
    None: all.
    """
    group = parser.add_argument_group(title)
    for name in filter(functools.partial(has_option, model), names):
        field = model.model_fields[name]
        kind = _kind(field.annotation)
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = {int: size, float: float, Path: Path}.get(kind, str)
            options["metavar"] = {int: "N", float: "X", Path: "FILE"}.get(
                kind, "N:M" if name == "pattern" else name.upper()
            )
        if get_origin(field.annotation) is dict:
            options |= {"action": "append", "metavar": "NAME=VALUE"}
        elif get_origin(field.annotation) is list:
            options |= (
                {"action": "append"}
                if "choices" in options
                else {"action": "append", "metavar": {"server": "URL", "perplexity": "FILE"}.get(name, "NAME")}
            )
        shown = field.description or ""
        if field.is_required():
            options["required"] = True
        elif field.default not in (None, False, [], {}):
            default = f"{field.default:,}" if isinstance(field.default, int) else field.default
            shown += f" (default: {default})"
        shown = shown.replace("%", "%%")
        if common is not None and name not in common:
            parser.hidden += 1
            shown = shown if parser.full else argparse.SUPPRESS
        group.add_argument(_flag(name), dest=name, help=shown, **options)


def _given(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in model.model_fields if hasattr(args, name)}


def settings_of(args: argparse.Namespace, model: type[M], base: dict[str, Any] | None = None) -> M:
    """Settings of class `model` from the options given, on top of the fields in `base`."""
    from rac_engine.recipe import build

    return build(model, {**(base or {}), **_given(args, model)}, _flag)


def add_model(parser: Parser, what: str = "folder of a Hugging Face checkpoint") -> None:
    """Add the positional argument MODEL."""
    what += ", or org/name[@revision] on the hub"
    parser.add_argument("model", type=Path, metavar="MODEL", help=what)


def add_output(parser: Parser) -> None:
    """Add the positional argument OUT of commands that read a job's output."""
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of `rac prune` or `rac run`")


def add_json(parser: Parser, what: str = "print it for programs") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=what)


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)",
    )


def add_limits(parser: Parser) -> None:
    """Add --device-memory and --host-memory."""
    group = parser.add_argument_group("memory that the job keeps to")
    for name, what in (("device", "of the GPU"), ("host", "of this machine, the program itself included")):
        group.add_argument(f"--{name}-memory", type=size, metavar="BYTES", help=f"at most so much {what}, like 6GiB")


def add_restart(parser: Parser, what: str) -> None:
    """Add --restart, of a job that is called `what`."""
    parser.add_argument("--restart", action="store_true", help=f"start afresh where an unfinished {what} would go on")


def add_help(parser: Parser) -> None:
    """Add --help, and --help-all where the short page does not show everything."""
    if not parser.hidden:
        parser.add_argument("-h", "--help", action="help", help="show this page and exit")
        return
    parser.add_argument("-h", "--help", action="help", help="show the options that are used most, and exit")
    parser.add_argument("--help-all", action="help", help=f"show {parser.hidden} more options, and exit")


def add_verbosity(parser: Parser, default: Any) -> None:
    """Add --quiet and --verbose."""
    options = {"dest": "verbosity", "action": "store_const", "default": default}
    parser.add_argument("-q", "--quiet", const=-1, help="show no progress, only results and errors", **options)
    parser.add_argument(
        "-v", "--verbose", const=1, help="show messages of transformers too, and where an error comes from", **options
    )


def resolved_device(name: str) -> str:
    """The device to use; `BadInput` for one that this machine does not have."""
    from rac_engine.jobs.surroundings import usable_device

    try:
        return usable_device(name)
    except BadInput as error:
        raise BadInput(f"--{error}") from None


def console_of(args: argparse.Namespace) -> Console:
    """The console for progress, to be used as a context, silent with --quiet."""
    from rac_engine.base.console import Console

    return Console(quiet=args.verbosity < 0)
