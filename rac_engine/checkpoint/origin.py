"""The origin of a checkpoint: its name, on the hub where it comes from there, and what its model card declares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rac_engine.base.errors import BadInput
from rac_engine.base.files import read_small
from rac_engine.base.hubnames import cached_name
from rac_engine.checkpoint.reader import inside
from rac_engine.jobs.layout import CARD

_KEPT = ("license", "license_name", "license_link", "language", "tags")
_MAX_CARD_BYTES = 4 << 20
_MAX_ENTRIES, _MAX_CHARACTERS = 200, 300

Declared = dict[str, str | list[str]]
"""Fields of a card's front matter: text, or a list of it."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that another one was made from, as may be published: no path of a machine is in it."""

    name: str
    """`org/name` for a checkpoint in the hub's cache, else its folder's name."""
    revision: str | None = None
    """The commit, for one in the hub's cache."""
    declared: Declared = field(default_factory=dict)
    """Licence, language and tags, as its card has them."""


def origin_of(folder: Path) -> Origin:
    """Name, revision and declarations of the checkpoint in `folder`. A card that cannot be read declares nothing."""
    declared = _declared(folder)
    if (cached := cached_name(folder)) is not None:
        return Origin(cached.name, cached.revision, declared)
    return Origin(folder.resolve().name or "model", None, declared)


def _declared(folder: Path) -> Declared:
    try:
        text = read_small(inside(folder, CARD), _MAX_CARD_BYTES).decode(errors="replace")
    except (BadInput, OSError):
        return {}
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"]
    try:
        # All scalars as text: in YAML 1.1 Norwegian is false.
        found = yaml.load("\n".join(lines[1 : ends[0]]), yaml.BaseLoader) if ends else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name in _KEPT if (value := _plain(found.get(name)))}


def _plain(value: object) -> str | list[str] | None:
    """Text or a list of it, on one line each and of a sane length; None for anything else."""
    if isinstance(value, str):
        return " ".join(value.split())[:_MAX_CHARACTERS] or None
    if isinstance(value, list):
        return [text for item in value[:_MAX_ENTRIES] if isinstance(item, str) and (text := str(_plain(item) or ""))]
    return None
