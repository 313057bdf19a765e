"""Recipes in YAML files: read with the line and column of every mistake, written with every default."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rac_engine.base.errors import BadInput
from rac_engine.base.hubnames import hub_name
from rac_engine.recipe.fields import TEXT_PREFIX, Settings
from rac_engine.recipe.settings import CalibrationSettings, CalibrationSource, EvalSettings, Recipe

MAX_RECIPE_BYTES = 1 << 20

Location = tuple[int | str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars only: in YAML 1.1 `2:4` is the number 124, `no` is false and `1e-3` is text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)

_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)

_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])

_Loader.add_constructor("tag:yaml.org,2002:int", _number)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises `BadInput` with one line: file, line and column where known, field, and what was expected.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"recipe {path}: {error.strerror}; give the path of a YAML file") from None
    if len(raw) > MAX_RECIPE_BYTES:
        raise BadInput(f"recipe {path}: larger than 1 MiB; that is no recipe")
    node, data = _parse(path, raw)
    if not isinstance(data, dict):
        raise BadInput(f"{path}:1:1: a recipe is a mapping that starts with `model: FOLDER`")
    try:
        return Recipe.model_validate(data, context={"base": path.absolute().parent})
    except ValidationError as error:

        def locate(location: Location, key: bool) -> str:
            mark = _mark(node, location, key)
            return ": ".join(filter(None, [f"{path}:{mark.line + 1}:{mark.column + 1}", _dotted(location)]))

        raise BadInput(explain(error, Recipe, locate)) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _absolute(source: str | CalibrationSource) -> str | CalibrationSource:
    if isinstance(source, CalibrationSource):
        path = None if source.source is None else _absolute(source.source)
        return source.model_copy(update={"source": path})
    prefix = TEXT_PREFIX if source.startswith(TEXT_PREFIX) else ""
    return prefix + str(Path(source.removeprefix(prefix)).absolute())


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every path absolute, so that its file means the same wherever it lies and is read from."""

    def resolved(value: Any) -> Any:
        if isinstance(value, CalibrationSettings) and value.source is not None:
            made = [_absolute(source) for source in value.sources]
            return value.model_copy(update={"source": made[0] if isinstance(value.source, str) else made})
        if isinstance(value, EvalSettings) and value.perplexity:
            value = value.model_copy(update={"perplexity": [str(_absolute(source)) for source in value.perplexity]})
        if isinstance(value, Settings):
            return value.model_copy(update={name: resolved(getattr(value, name)) for name in value.model_fields_set})
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return value.absolute() if isinstance(value, Path) else value

    made: Recipe = resolved(recipe)
    return made if hub_name(recipe.model) is None else made.model_copy(update={"model": recipe.model})


M = TypeVar("M", bound=BaseModel)


def build(model: type[M], values: Mapping[str, Any], where: Callable[[str], str] = str) -> M:
    """Make `model` from `values`; a mistake becomes a one-line `BadInput` in which `where(field)` names the field."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise BadInput(
            explain(error, model, lambda location, _: where(_dotted(location)) if location else "")
        ) from None


def explain(error: ValidationError, model: type[BaseModel], locate: Callable[[Location, bool], str]) -> str:
    """One line for the first mistake in `error`. `locate(path, at_key)` gives the place in the user's words."""
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    first, others = mistakes[0], len(mistakes) - 1
    location, kind = first["loc"], first["type"]
    known = _fields_at(model, location[:-1])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        text = f"unknown field; {hint}"
    elif kind == "missing":
        text = "is missing"
    else:
        text = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        text = re.sub(r"a valid dictionary or instance of \w+", "a mapping of fields", text).replace(
            "be a valid ", "be a "
        )
        if kind != "value_error" and isinstance(first["input"], str | int | float):
            text += f", got {reprlib.repr(first['input'])}"
    place = locate(location, kind == "extra_forbidden")
    line = f"{place}: {text}" if place else text
    if others:
        line += f" (and {others} more)"
    return " ".join(line.split())


def _parse(path: Path, raw: bytes) -> tuple[yaml.Node | None, Any]:
    try:
        loader = _Loader(raw)
        try:
            node = loader.get_single_node()
            _refuse_duplicates(path, node, set())
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise BadInput(f"{place}: not valid YAML: {' '.join(str(error.problem or error.context).split())}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"recipe {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None


def _refuse_duplicates(path: Path, node: yaml.Node | None, seen: set[int]) -> None:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(path, child, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[str, int] = {}
        for key, child in node.value:
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if not isinstance(key, yaml.ScalarNode):
                raise BadInput(f"{path}:{line}:{column}: a field name should be plain text")
            if key.value in keys:
                raise BadInput(
                    f"{path}:{line}:{column}: field {key.value!r} is given twice (first on line {keys[key.value]})"
                )
            keys[key.value] = line
            _refuse_duplicates(path, child, seen)


def _mark(node: yaml.Node | None, location: Location, key: bool) -> Any:
    """The place in the file of the value at `location` (of its key if `key`), or of the nearest thing around it."""
    assert node is not None
    mark = node.start_mark
    for depth, step in enumerate(location):
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == step), None)
            if found is None:
                break
            name, node = found
            if key and depth == len(location) - 1:
                return name.start_mark
        else:
            break
        mark = node.start_mark
    return mark


def _dotted(location: Location) -> str:
    return ".".join(str(step) for step in location)


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields that may stand at `location` in `model`."""
    for step in location:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(str(step))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _model_in(part))), None)
