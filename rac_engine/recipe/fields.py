"""The kinds of values in a recipe."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo

from rac_engine.base.errors import BadInput
from rac_engine.base.hubnames import hub_name, shown_model
from rac_engine.base.names import is_utf8
from rac_engine.base.sizes import parse_size
from rac_engine.solve import why_unknown

TEXT_PREFIX = "text:"

MOST_SOURCES = 100

_SHARE = re.compile(r"(.+):((?:0?\.[0-9]+|1(?:\.0*)?|0\.[0-9]*))", re.DOTALL)

_GLOB = re.compile(r"[\w.*?\[\]!-]+")  # that no regular expression needs to be

COLUMN_ROLES = ("problem", "answer", "completion", "reasoning_content", "text", "id", "kind")
"""What a column of a stranger's file can be told to hold."""


def _size(value: Any) -> Any:
    """Turn "1M" or "8k" into a number; what is not text is left for the type check."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except BadInput as error:
        raise ValueError(str(error)) from None


def _require_utf8(path: str | Path) -> None:
    if not is_utf8(path):  # it stands in files of text later
        raise ValueError(f"{str(path)!r} has bytes that are not UTF-8; rename it")


def _resolve(path: str, info: ValidationInfo) -> Path:
    _require_utf8(path)
    base = (info.context or {}).get("base")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path.split('/')[0]} is nobody's home folder") from None
    return expanded if base is None else Path(base) / expanded


def resolved_path(value: Any, info: ValidationInfo) -> Any:
    """A path that is text, from the recipe's folder on and with ~ in full; what is neither text nor path stays."""
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("should be the path of a file or folder")
        return _resolve(value, info)
    if isinstance(value, Path):
        _require_utf8(value)
    return value


def _model(value: Any, info: ValidationInfo) -> Any:
    """A folder's path, or a model's name on the hub as it is, unless it is also a path from the recipe's folder."""
    path = resolved_path(value, info)
    named = isinstance(value, str) and hub_name(value) is not None and not os.path.lexists(path)
    return Path(value) if named else path


def resolved_source(value: str, info: ValidationInfo) -> str:
    """A source with its path resolved as all paths of a recipe are; a share behind it stays."""
    prefix, path = (TEXT_PREFIX, value[len(TEXT_PREFIX) :]) if value.startswith(TEXT_PREFIX) else ("", value)
    if not path or "\0" in path:
        raise ValueError("should be a traces folder or file, a .jsonl file, or text:FILE")
    return prefix + str(_resolve(path, info))


def _server(value: str) -> str:
    """Check the URL of a server, and take off what its API adds to it."""
    try:
        parts = urlsplit(value)
        named = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        named = None
    if not named or parts.scheme not in ("http", "https"):
        raise ValueError(f"{value!r} is no server's URL; write for example http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a server's URL holds no key, since it stands in records; put it into RAC_API_KEY")
    if parts.query or parts.fragment:
        raise ValueError(f"{value!r} has more than a host and a path")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


def with_share(text: str) -> tuple[str, float | None]:
    """A source as it is given, without its share, and the share: `TRACES:0.8` is ("TRACES", 0.8).

    A path may hold colons: what exists under the whole name has no share.
    """
    match = _SHARE.fullmatch(text)
    if match is None or Path(text.removeprefix(TEXT_PREFIX)).exists():
        return text, None
    share = float(match[2])
    return (match[1], share) if 0 < share <= 1 else (text, None)


def _pattern(value: str) -> str:
    try:
        pruning_pattern(value)
    except BadInput as error:
        raise ValueError(str(error)) from None
    return value


def _method(value: str) -> str:
    if why := why_unknown(value):
        raise ValueError(why)
    return value


def _arguments(value: Any) -> Any:
    """Check names and values, and turn the command line's ["enable_thinking=false"] into a mapping.

    A value there is read as JSON, if it is that.
    """
    if isinstance(value, list):
        pairs = [str(each).partition("=") for each in value]
        if wrong := [name for name, sign, _ in pairs if not sign]:
            raise ValueError(f"{wrong[0]!r} is not NAME=VALUE")
        value = {name: _json_or_text(text) for name, _, text in pairs}
    for name, each in value.items() if isinstance(value, dict) else ():
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"{name!r} is no name of an argument")
        if not isinstance(each, bool | int | float | str) or each in (math.inf, -math.inf) or each != each:
            raise ValueError(f"{name} should be true or false, a number or text")
    return value


def _columns(value: Any) -> Any:
    """Check roles, and turn "Frage" or the command line's ["problem=Frage"] into {"problem": "Frage"}."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        pairs = [str(each).partition("=") for each in value]
        value = {(role if sign else "problem"): (name if sign else role) for role, sign, name in pairs}
    for role, name in value.items() if isinstance(value, dict) else ():
        if role not in COLUMN_ROLES:
            raise ValueError(f"{role!r} is none of {', '.join(COLUMN_ROLES)}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{role} should be the name of a column")
    return value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _module(value: str) -> str:
    if _GLOB.fullmatch(value):
        return value
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{value!r} is not a valid regular expression ({error})") from None
    return value


@functools.cache
def _expression(entry: str) -> re.Pattern[str] | None:
    """The regular expression that an entry is; None for one that is a glob only, like `*.down_proj`."""
    try:
        return re.compile(entry)
    except re.error:
        return None


def names_matrix(entry: str, *names: str) -> bool:
    """Whether an entry of `dense` or of an override's `modules` means the matrix that is called any of these.

    An entry is a name, a glob or a regular expression. It has to fit a whole name, or the last part of one, by which
    `rac plan` calls those that share an input: `mlp.gate_proj, up_proj`.
    """
    expression = _expression(entry)
    return any(
        fnmatchcase(name, entry) or (expression is not None and expression.fullmatch(name))
        for name in {*names, *(name.rpartition(".")[2] for name in names)}
    )


Count = Annotated[int, BeforeValidator(_size), Field(gt=0, le=1 << 53)]

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]

FilePath = Annotated[Path, BeforeValidator(resolved_path), PlainSerializer(str, return_type=str)]

ModelPath = Annotated[Path, BeforeValidator(_model), PlainSerializer(shown_model, return_type=str)]

PatternText = Annotated[str, AfterValidator(_pattern)]

MethodName = Annotated[str, AfterValidator(_method)]

ModuleName = Annotated[str, AfterValidator(_module)]

TemplateArguments = Annotated[dict[str, Any], BeforeValidator(_arguments)]

Columns = Annotated[dict[str, str], BeforeValidator(_columns)]

ServerURL = Annotated[str, AfterValidator(_server)]

JobName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]


def pruning_pattern(pattern: str) -> tuple[int, int]:
    """Read "N:M" as `rac_kernels` does, for a pattern that prunes something: `(N, M)` with 0 < N < M.

    Raises `BadInput` for anything else. Imports torch.
    """
    from rac_kernels.ops.pattern import FORM, parse_pattern

    if not FORM.fullmatch(pattern):
        raise BadInput(f"pattern {pattern!r} is not N:M; write for example 2:4 (2 of every 4 weights stay)")
    try:
        found = parse_pattern(pattern)
    except ValueError:
        found = None
    if found is None or found[0] == found[1]:
        raise BadInput(f"pattern {pattern}: N of every M weights stay, so 0 < N < M is needed; write for example 2:4")
    return found


class Settings(BaseModel):
    """A section of a recipe: unknown fields and values of a wrong type are refused, never guessed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
