"""Write docs/recipes.md from the recipe's pydantic models: `python docs/make_recipes.py` (or `--check`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rac_engine.recipe import Recipe
from rac_engine.recipe.fields import FilePath, JobName, MethodName, ModelPath, ModuleName, PatternText
from rac_engine.recipe.settings import PromptFiles, Sources
from rac_engine.solve import method_names

PAGE = Path(__file__).parent / "recipes.md"

HEAD = """\
# Recipes

<!-- Made by `python docs/make_recipes.py` from the models in rac_engine/recipe. Edit those, then run it again. -->

A recipe is a YAML file that says everything about a job. `rac run RECIPE.yaml OUT` does the whole job: trace → prune →
evaluate → report. `rac prune --recipe RECIPE.yaml` takes the sections `calibration` and `prune` from it; options on the
command line win. This is a small one:

```yaml
model: examples/abacus                          # relative paths are relative to the recipe
name: half                                      # what tables call the pruned model
trace:
  prompts: examples/problems/calibration.jsonl
  tokens: 10k
  samples: 1
  max_new_tokens: 400
prune:
  sparsity: 0.5
evaluate:
  problems: examples/problems/evaluation.jsonl
  limit: 50
  max_new_tokens: 400
compare:
  - name: text
    calibration: {source: "text:README.md", tokens: 10k, sequence_length: 256}
  - name: 2-of-4
    prune: {pattern: "2:4"}
```

Saved as `recipe.yaml`, it runs with

```bash
rac run recipe.yaml OUT
```

- An unknown key, a value of a wrong type and a key that is given twice are refused, with file, line and column.
- Sizes may be written `8192`, `8k`, `1M` or `6GiB`.
- YAML 1.2 rules hold: `2:4` is text and `no` is not false.
- The resolved recipe, with every default filled in, is saved as `OUT/rac/recipe.yaml`. It can be run again.
- Every key of `trace`, `calibration`, `prune` and `evaluate` is also an option of `rac trace`, `rac prune` or
  `rac eval`: `max_new_tokens` is `--max-new-tokens`. `overrides` and `experts` can be given in recipes only.

## The whole recipe
"""

SECTIONS = {
    "trace": "Leave the section out if there are traces already, and name them in `calibration: {source: …}`.",
    "trace.prompts[]": "An entry may also be text: `FILE`, or `FILE:SHARE`.",
    "calibration": "",
    "calibration.source[]": "An entry may also be text: `SOURCE`, or `SOURCE:SHARE`.",
    "prune": "",
    "prune.experts": "See [families](families.md#mixtures-of-experts).",
    "prune.overrides[]": "A list; of several entries that fit a matrix the last one wins. "
    "See [methods](methods.md#how-sparse-each-matrix-is).",
    "evaluate": "Leave the section out to skip the evaluation. A recipe has to give `problems`: "
    "models are compared by their answers.",
    "compare[]": "Each entry is pruned and evaluated beside the main model. Its weights are not kept.",
}
NAMES: list[tuple[Any, str]] = [
    (FilePath, "path"),
    (PromptFiles, "path, or a list"),
    (Sources, "path or `text:FILE`, or a list"),
    (ModelPath, "path or name on the hub"),
    (PatternText, "`N:M`"),
    (ModuleName, "regular expression"),
    (JobName, "name"),
    (MethodName, " · ".join(f"`{name}`" for name in method_names())),
]


def main(arguments: list[str]) -> int:
    """Write the page; with --check say whether the one that is there is up to date."""
    text = page()
    if "--check" in arguments:
        fresh = PAGE.is_file() and PAGE.read_text() == text
        print(f"{PAGE}: {'up to date' if fresh else 'out of date; run python docs/make_recipes.py'}")
        return 0 if fresh else 1
    PAGE.write_text(text)
    return 0


def page() -> str:
    """The whole page."""
    parts = [HEAD, table(Recipe, "")]
    for section, remark in SECTIONS.items():
        model = model_at(section)
        said = " ".join((model.__doc__ or "").split())
        parts += [f"\n## `{section}`\n\n{said}{' ' + remark if remark else ''}\n", table(model, section)]
    return "\n".join(parts) + "\n"


def model_at(section: str) -> type[BaseModel]:
    """The settings that stand at a dotted path of the recipe."""
    model: type[BaseModel] = Recipe
    for key in section.replace("[]", "").split("."):
        inner = model_in(model.model_fields[key].annotation)
        assert inner is not None, section
        model = inner
    return model


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings in a field's annotation, if it has any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := model_in(part))), None)


def table(model: type[BaseModel], section: str) -> str:
    """A row a key: name, type with its bounds, default, description."""
    rows = ["| key | type | default | what it says |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        path = f"{section}.{name}".lstrip(".") + ("[]" if get_origin(field.annotation) is list else "")
        target = path if path in SECTIONS else next((s for s in SECTIONS if model_at(s) is inner), "")
        said = field.description or ""
        if inner is not None:
            anchor = "".join(c for c in target.lower() if c.isalnum() or c in "-_ ")
            said = f"{said + '; ' if said else ''}see [`{target}`](#{anchor})"
        cells = (f"`{name}`", kind_of(field), default_of(field), said)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def kind_of(field: FieldInfo) -> str:
    """The type in words, with the bounds that the field has."""
    words = in_words(field.annotation, field.metadata)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {value:g}"
        for part in field.metadata + [m for each in field.metadata for m in getattr(each, "metadata", [])]
        for bound, sign in signs.items()
        if (value := getattr(part, bound, None)) is not None and value < 1 << 50
    ]
    return ", ".join([words, *bounds])


def in_words(annotation: Any, metadata: list[Any]) -> str:
    for known, words in NAMES:
        if annotation == known or (metadata and get_args(known)[1:] == tuple(metadata[: len(get_args(known)) - 1])):
            return words
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " · ".join(f"`{choice}`" for choice in inside)
    if inside and type(None) in inside:
        return in_words(next(part for part in inside if part is not type(None)), [])
    if origin is list:
        return f"list of {in_words(inside[0], [])}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return in_words(inside[0], [])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    assert origin is not Union
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]


def default_of(field: FieldInfo) -> str:
    """The default as YAML has it; a key without one is required."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "its defaults"
    if value in (None, ""):
        return "none"
    return f"`{value}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
