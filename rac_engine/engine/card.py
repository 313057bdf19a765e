"""The model card of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rac_engine.base.sizes import figure, format_bytes, format_count, format_seconds, percent
from rac_engine.engine.metrics import Metrics, layer_of, place_of, rule_text, source_name
from rac_engine.solve import Method, find_method, why_unknown

_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ("rac-engine", "pruned", "sparse", "reasoning")


def method_called(name: str) -> Method | None:
    """The method that a record names; None for one that is not here, as an earlier version's."""
    return None if why_unknown(name) else find_method(name)


def method_title(name: str) -> str:
    """A method's title in sentences, or its bare name where the method is not here."""
    method = method_called(name)
    return method.title if method else name


def code(text: object) -> str:
    """A Markdown code span on one line, whatever `text` holds."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def environment(templates: Path, autoescape: bool) -> jinja2.Environment:
    """A jinja2 environment over a folder, with the filters that card and report use; a missing name is empty."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=autoescape,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=percent,
        figure=figure,
        bytes=format_bytes,
        count=format_count,
        seconds=format_seconds,
        pattern=rule_text,
        code=code,
        layer=layer_of,
        place=place_of,
        capitalize_first=lambda text: text[:1].upper() + text[1:],
        signed=lambda value: f"{value:+.1f}".replace("-", "−"),
        method=method_title,
    )
    return made


def model_card(run: dict[str, Any]) -> str:
    """The README.md of a pruned checkpoint, in Markdown with the YAML front matter of the Hugging Face hub.

    `run` is the "run" object of metrics.jsonl (`model.name` and `settings` at least), with `matrices` (the matrix
    objects), `end` (the last object) and `evaluation` (rows of the comparison table) where there are such; what is
    missing is left out of the card.
    """
    name = source_name(run)
    return (
        environment(_TEMPLATES, autoescape=False)
        .get_template("model_card.md.j2")
        .render(
            run=run,
            name=name,
            front_matter=_front_matter(name, run.get("model", {}).get("declared", {})),
            method=method_called(run["settings"]["method"]),
            totals=Metrics(run, run.get("matrices", [])),
        )
    )


def _front_matter(base_model: str, declared: Mapping[str, str | list[str]]) -> str:
    """The YAML at the head of a card: our own fields, and licence, language and tags as the source's card has them."""
    tags = declared.get("tags", [])
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base_model,
        **declared,
        "tags": list(dict.fromkeys([*_TAGS, *([tags] if isinstance(tags, str) else tags)])),
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)
