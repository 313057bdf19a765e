"""The whole job of a recipe: traces, dense answers, pruning, its answers, variants and the report."""

from __future__ import annotations

from rac_engine.run.job import run

__all__ = [
    "run",
]
