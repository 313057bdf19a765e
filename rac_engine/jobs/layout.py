"""Where everything lies in an output folder: the one list of its paths.

OUT of `rac prune` and `rac run` is a checkpoint with a folder `rac` beside the weights; OUT of `rac trace` is a folder
of Parquet files. While a job works, all of it is in OUT.partial.
"""

from __future__ import annotations

from pathlib import Path

RAC = "rac"
"""The folder beside the weights that holds all else."""

# In the folder `rac`.
METRICS = "metrics.jsonl"
"""The run, a line a matrix, and how it ended."""
MANIFEST = "manifest.json"
"""SHA-256 and size of every file that is final."""
JOURNAL = "journal.jsonl"
"""The pruning job's records."""
STEPS = "steps.jsonl"
"""The records of a whole run."""
RECIPE = "recipe.yaml"
"""The resolved recipe."""
REPORT = "report.html"
TRACES = "traces"
"""The traces that a run has sampled."""
EVAL = "eval"
"""Results of evaluations: a file a model."""
VARIANTS = "variants"
"""Recipe and metrics of the models that a run compares with, a folder each."""
WORK = "work"
"""What a run needs only while it works."""

# From OUT on.
CARD = "README.md"
"""The model card."""
MANIFEST_PATH = f"{RAC}/{MANIFEST}"
PRUNE_JOURNAL = f"{RAC}/{JOURNAL}"
ALLOCATION = f"{RAC}/allocation.json"
"""What a first pass over the model has found."""
NOT_IN_MANIFEST = (MANIFEST_PATH, *(f"{RAC}/{name}" for name in (REPORT, f"{EVAL}/", f"{TRACES}/", f"{VARIANTS}/")))
"""Beginnings of paths that are written into a finished folder later, by `rac eval` and `rac report`."""

# In a folder of traces.
TRACES_SUMMARY = "traces.json"
TRACES_JOURNAL = "journal.jsonl"


def partial_of(out: Path) -> Path:
    """Where a job works whose result will be `out`."""
    return out.with_name(out.name + ".partial")
