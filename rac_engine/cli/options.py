"""Options: those that set a field of a recipe take their help, type and default from the field."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from rac_engine.base.errors import BadInput

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rac_engine.base.console import Console

    M = TypeVar("M", bound=BaseModel)


def _kind(annotation: Any) -> Any:
    """The plain type (or Literal) under Annotated, Optional and list."""
    if get_origin(annotation) is Literal:
        return annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _kind(parts[0]) if parts else annotation


def size(text: str) -> int:
    from rac_engine.base.sizes import parse_size

    try:
        return parse_size(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def add_fields(parser: argparse.ArgumentParser, title: str, model: type[BaseModel], *names: str) -> None:
    """An option for each of the model's fields `names`; one that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group(title)
    for name in names:
        field = model.model_fields[name]
        kind = _kind(field.annotation)
        if hasattr(field.default, "model_fields_set") or hasattr(kind, "model_fields"):
            continue  # sections of their own, in recipes only
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = {int: size, float: float, Path: Path}.get(kind, str)
            options["metavar"] = {int: "N", float: "X", Path: "FILE"}.get(
                kind, "N:M" if name == "pattern" else name.upper()
            )
        if get_origin(field.annotation) is list and name == "weight_positions":
            options |= {"type": str, "metavar": "S:W,…"}
        elif get_origin(field.annotation) is list:
            options |= {"action": "append"} if "choices" in options else {"action": "append", "metavar": "NAME"}
        shown = field.description or ""
        if field.is_required():
            options["required"] = True
        elif field.default not in (None, []):
            default = f"{field.default:,}" if isinstance(field.default, int) else field.default
            shown += f" (default: {default})"
        group.add_argument(_flag(name), dest=name, help=shown.replace("%", "%%"), **options)


def _given(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in model.model_fields if hasattr(args, name)}


def settings_of(args: argparse.Namespace, model: type[M], **base: Any) -> M:
    """`model` from the options given, on top of `base`."""
    from rac_engine.recipe import build

    return build(model, {**base, **_given(args, model)}, _flag)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory that pruning keeps to")
    for name, what in (("device", "of the GPU"), ("host", "of this machine, the program itself included")):
        group.add_argument(f"--{name}-memory", type=size, metavar="BYTES", help=f"at most so much {what}, like 6GiB")


def add_restart(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--restart", action="store_true", help=f"start afresh where an unfinished {what} would go on")


def resolved_device(name: str) -> str:
    """The device to use; `BadInput` for one that this machine does not have."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device {name}: {reason}; `rac doctor` shows what there is") from None
    return name


def console_of(args: argparse.Namespace) -> Console:
    from rac_engine.base.console import Console

    return Console(args.verbosity)


def add_verbosity(parser: argparse.ArgumentParser, default: Any) -> None:
    options = {"dest": "verbosity", "action": "store_const", "default": default}
    parser.add_argument("-q", "--quiet", const=-1, help="show no progress, only results and errors", **options)
    parser.add_argument(
        "-v", "--verbose", const=1, help="show more on the way, and where an error comes from", **options
    )
