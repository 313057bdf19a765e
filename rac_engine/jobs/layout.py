"""The one list of paths in an output folder.

OUT of `rac prune` and `rac run` is a checkpoint with a folder `rac` beside the weights; OUT of `rac trace` is a folder
of Parquet files; OUT of `rac eval` is a file. While a job works, all of it is in OUT.partial.
"""

from __future__ import annotations

from pathlib import Path

PARTIAL = ".partial"
"""The ending that the name of OUT has while a job works on it."""

# From OUT on.
CARD = "README.md"
"""The model card."""
RAC = "rac"
"""The folder beside the weights that holds all else."""

# Names in the folder `rac`.
METRICS = "metrics.jsonl"
"""The run, a line a matrix, and how it ended."""
MANIFEST = "manifest.json"
"""SHA-256 and size of every file that is final."""
RECIPE = "recipe.yaml"
"""The resolved recipe."""
REPORT = "report.html"
PACK = "pack.json"
"""How a packed folder was packed, and the sizes."""
TRACES = "traces"
"""The traces that a run has sampled."""
EVAL = "eval"
"""Results of evaluations: a file a model."""
VARIANTS = "variants"
"""Recipe and metrics of the models that a run compares with, a folder each."""
WORK = "work"
"""Models that a run needs only while it works."""

# Names of models among the results of evaluations; a variant has its own.
DENSE = "dense"
PRUNED = "pruned"

# Paths from OUT on, of what a job needs to go on.
PRUNE_JOURNAL = f"{RAC}/journal.jsonl"
"""The finished layers of a pruning job."""
PACK_JOURNAL = f"{RAC}/pack.jsonl"
"""The identity of a packing or unpacking; never part of the result."""
PACKING = f"{RAC}/packing"
"""Where a pruning job packs its output; never part of the result."""
PACKED = f"{RAC}/packed"
"""The packed output, whole, while its files take the places of the plain ones; never part of the result."""
RUN_JOURNAL = f"{RAC}/steps.jsonl"
"""The finished steps of a whole run."""
ALLOCATION = f"{RAC}/allocation.json"
"""The sparsities that a first pass over the model has found."""

RECOVERY = f"{RAC}/recovery"
"""The weights of a model that learns, as they were after a pass; removed when it has."""

UNDER_WAY = "under-way"
"""What a sampling has begun and not yet finished, in OUT.partial or, where that is a file, behind its name."""

NOT_IN_MANIFEST = tuple(f"{RAC}/{name}" for name in (MANIFEST, REPORT, f"{EVAL}/", f"{TRACES}/", f"{VARIANTS}/"))
"""Beginnings of paths that are written into a finished folder later, by `rac eval` and `rac report`."""

# In a folder of traces.
TRACES_SUMMARY = "traces.json"
TRACES_JOURNAL = "journal.jsonl"
"""The finished files of a sampling."""


def partial_of(out: Path) -> Path:
    """The place where a job works whose result will be `out`."""
    return out.with_name(out.name + PARTIAL)


def results_of(out: Path, name: str) -> Path:
    """The results of an evaluation of the model `name` (`DENSE`, `PRUNED` or a variant's) in the folder `out`."""
    return out / RAC / EVAL / f"{name}.json"
