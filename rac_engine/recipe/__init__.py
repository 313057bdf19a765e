"""Recipes: everything a job decides, as pydantic models that are written in YAML."""

from __future__ import annotations

from rac_engine.recipe.fields import TEXT_PREFIX, names_matrix, pruning_pattern, with_share
from rac_engine.recipe.files import absolute, build, dump, load_recipe
from rac_engine.recipe.settings import (
    SERVING,
    CalibrationSettings,
    CalibrationSource,
    EvalSettings,
    PromptSource,
    PruneSettings,
    Recipe,
    TraceSettings,
    Variant,
)

__all__ = [
    "SERVING",
    "TEXT_PREFIX",
    "CalibrationSettings",
    "CalibrationSource",
    "EvalSettings",
    "PromptSource",
    "PruneSettings",
    "Recipe",
    "TraceSettings",
    "Variant",
    "absolute",
    "build",
    "dump",
    "load_recipe",
    "names_matrix",
    "pruning_pattern",
    "with_share",
]
