"""The names of models on the Hugging Face hub, and of their folders in its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"[A-Za-z0-9][\w.-]*"

_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][\w./+-]*))?", re.ASCII)

_LONGEST = 96  # characters of a name, by the hub's own rule


@dataclass(frozen=True)
class HubName:
    """A model on the hub, `org/name` or `org/name@revision`."""

    name: str
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_name(model: str | Path) -> HubName | None:
    """The model on the hub that `model` names; None where it cannot be a name there, or where a file has that path."""
    found = _NAME.fullmatch(str(model))
    if found is None or os.path.lexists(model):
        return None
    name, revision = found.groups()
    if len(name) > _LONGEST or re.search(r"--|\.\.|[-.]/|[-.]$|\.git$", name) or ".." in (revision or ""):
        return None
    return HubName(name, revision)


def cached_name(folder: Path) -> HubName | None:
    """The name and commit of a model whose folder is in the hub's cache; None for any other folder."""
    for place in (folder.absolute(), folder.resolve()):
        repository, snapshots = place.parent.parent.name, place.parent.name
        if snapshots == "snapshots" and repository.startswith("models--"):
            return HubName(repository.removeprefix("models--").replace("--", "/", 1), place.name)
    return None


def shown_model(folder: str | Path) -> str:
    """What records call a model: `org/name@commit` if its folder is in the hub's cache, else the path as it is."""
    return str(cached_name(Path(folder)) or folder)
