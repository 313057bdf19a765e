"""The model card of a pruned checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from rac_engine.base.sizes import figure, format_bytes, format_count, format_seconds, percent
from rac_engine.engine.metrics import Metrics, layer_of, place_of, rule_text

_TEMPLATES = Path(__file__).parent / "templates"

METHODS = {
    "admm": "ADMM and masked least squares",
    "sparsegpt": "SparseGPT",
    "alps": "ALPS",
    "wanda": "Wanda",
    "magnitude": "magnitude pruning",
}


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
        method=lambda name: METHODS.get(name, name),
    )
    return made


def model_card(run: dict[str, Any]) -> str:
    """The README.md of a pruned checkpoint, in Markdown with the YAML front matter of the Hugging Face hub.

    `run` is the "run" object of metrics.jsonl (`model.path` and `settings` at least), with `matrices` (the matrix
    objects), `end` (the last object) and `evaluation` (rows of the comparison table) where there are such; what is
    missing is left out of the card.
    """
    name = Path(run["model"]["path"]).name or "model"
    return (
        environment(_TEMPLATES, autoescape=False)
        .get_template("model_card.md.j2")
        .render(run=run, name=" ".join(name.split()), totals=Metrics(run, run.get("matrices", [])))
    )
