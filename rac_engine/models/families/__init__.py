"""The model families that are known, a file each.

A file is named like its `model_type` in transformers and defines `FAMILY` in the words of `rac_engine.models.plans`.
There is no list: a file that is put here is a family that is known.
"""

from __future__ import annotations

import importlib
import pkgutil

from rac_engine.models.plans import Family


def known_families() -> list[str]:
    """The model_types that there are files for, sorted; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_family(model_type: object) -> Family | None:
    """The family of a config's `model_type`, which may be anything; None if it is not known."""
    if model_type not in known_families():
        return None
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family
