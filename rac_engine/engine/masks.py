"""The zeros of a pruned checkpoint, put back into one that was trained on from it: files alone, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import rac_engine
from rac_engine.base.errors import BadInput, Damaged
from rac_engine.base.files import copy_file, disk_errors, write_file
from rac_engine.checkpoint import Checkpoint, CheckpointWriter, inside, origin_of
from rac_engine.engine.metrics import Metrics, load_metrics, tensor_of
from rac_engine.engine.verify import verify
from rac_engine.jobs.claim import refuse_place
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.layout import CARD, METRICS, PRUNE_JOURNAL, RAC, RECIPE
from rac_engine.jobs.publish import write_manifest
from rac_engine.jobs.surroundings import versions
from rac_engine.models import EMBEDDINGS, Model
from rac_engine.recipe import load_recipe
from rac_kernels import count_zeros

_KEPT = (
    *("type", "layer", "module", "name", "rows", "columns", "target", "expert", "tensor", "transposed"),
    *("skipped", "skipped_code", "zeros", "sparsity"),
)


@dataclass(frozen=True)
class MaskReport:
    """What `apply_masks` made. `weights` and `zeros` are those of the pruned matrices."""

    out: Path
    matrices: int
    weights: int
    zeros: int
    lost: int
    """Zeros that the trained checkpoint had no more, and that are there again."""


def apply_masks(
    source: str | Path,
    target: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> MaskReport:
    """Write the checkpoint `target` to the new folder `out` with the zeros of the pruned checkpoint `source` put back.

    Every element of a pruned matrix that is zero in `source` becomes +0.0, and so does a −0.0 in it. All other bytes of
    all tensors, and the files beside the weights, are those of `target`, whose dtypes may differ from the source's. The
    folder `rac` is made anew, without errors of matrices, which are the source's no more. `verify` passes on the result
    before it appears, by one rename; a stopped call leaves nothing. With `restart`, what an unfinished job has left in
    OUT.partial is removed.

    Raises `BadInput` where `source` is no output of this engine, where a pruned matrix is missing in `target` or has
    another shape there, and where `target` has matrices that `source` says nothing of.
    """
    source, target, out = Path(source), Path(target), Path(out)
    refuse_place(out, source)
    with FolderJob(out, model=target) as job:
        pruned, metrics = Checkpoint.open(source), load_metrics(source / RAC)
        trained = Checkpoint.open(target)
        names = _masked_tensors(pruned, trained, metrics)
        _refuse_unknown(pruned, trained, metrics)
        run = _run(metrics, pruned, trained)
        job.open_journal(
            PRUNE_JOURNAL,
            {"masks of": run["masks"]["sha256"], "weights of": run["model"]["sha256"]},
            restart=restart,
            stopped=lambda: "stopped",
            worthwhile=lambda: False,
        )
        job.journal.cut(1)
        writer, digests = CheckpointWriter(trained, job.partial), dict[str, str]()
        rows = [_row(row) for row in metrics.matrices]
        inside_of: dict[str, list[dict[str, Any]]] = {}
        for row in Metrics(run, rows).pruned:
            inside_of.setdefault(tensor_of(row), []).append(row)
        for name, masked_by in names.items():
            progress(name)
            given = trained.read(name)
            masked = _masked(given, pruned.read(masked_by))
            digests[name] = writer.write(name, masked)
            for row in inside_of.get(name, ()):
                row |= _counts(row, given, masked)
        job.journal.append({"tensors": digests | writer.finish(), "matrices": []})
        _write_beside(job.partial, pruned, trained, run, rows)
        if problems := verify(job.partial, trained, progress).problems:
            raise Damaged(f"{job.partial}: the finished output is damaged: {problems[0]}")
        job.publish()
    made = Metrics(run, rows)
    return MaskReport(out, len(made.pruned), made.weights, made.zeros, sum(row.get("lost", 0) for row in rows))


def _masked_tensors(pruned: Checkpoint, trained: Checkpoint, metrics: Metrics) -> dict[str, str]:
    """The tensors of `trained` that get zeros, each with the tensor of `pruned` that has them."""
    names = {}
    for row in metrics.pruned:
        name = tensor_of(row)
        if name not in pruned.tensors:
            raise BadInput(f"{pruned.path}: {name}, pruned by its {METRICS}, is not there; the checkpoint is damaged")
        if name not in trained.tensors:
            raise BadInput(
                f"{trained.path}: has no {name}; give a checkpoint with the tensor names of {pruned.path}, such as "
                "save_pretrained of the model that was loaded from it"
            )
        here, there = pruned.tensors[name].shape, trained.tensors[name].shape
        if here != there:
            raise BadInput(
                f"{trained.path}: {name} is {list(there)}, in {pruned.path} it is {list(here)}; give a checkpoint that "
                "was trained on from that one"
            )
        names[name] = name
        if row["layer"] == EMBEDDINGS:
            names |= dict.fromkeys(Model.open(trained).tied_copies, name)
    if not names:
        raise BadInput(f"{pruned.path}: its {METRICS} names no pruned matrix; give the output of `rac prune`")
    return names


def _refuse_unknown(pruned: Checkpoint, trained: Checkpoint, metrics: Metrics) -> None:
    """`BadInput` for a trained checkpoint whose output could not be verified: with other matrices, or not finite."""
    settings = load_recipe(pruned.path / RAC / RECIPE).prune
    known = {row["name"] for row in metrics.matrices}
    for matrix in Model.open(trained).prunable(settings.also):
        if matrix.name not in known:
            raise BadInput(
                f"{trained.path}: has a {matrix.name} that {pruned.path} says nothing of; it is another model"
            )
    broken = set(trained.nonfinite()) if settings.nonfinite != "dense" else set()
    if broken:
        raise BadInput(f"{trained.path}: {min(broken)} holds NaN or Inf; the training has diverged")


def _masked(tensor: Tensor, by: Tensor) -> Tensor:
    """A tensor with +0.0 where `by`, of its shape, is zero, and where it is ±0.0 itself."""
    return tensor.masked_fill((by == 0) | (tensor == 0), 0.0)


def _run(metrics: Metrics, pruned: Checkpoint, trained: Checkpoint) -> dict[str, Any]:
    """The "run" object of the result: the weights of one checkpoint, the zeros and settings of another."""
    origin, model = origin_of(trained.path), metrics.run.get("model", {})
    return {
        "type": "run",
        "versions": {"rac_engine": rac_engine.__version__, **versions()},
        "model": {
            **{name: model[name] for name in ("model_type", "layers", "parameters") if name in model},
            "name": origin.name,
            "revision": origin.revision,
            "declared": origin.declared,
            "sha256": trained.sha256(),
        },
        "masks": {"name": origin_of(pruned.path).name, "sha256": pruned.sha256()},
        "settings": metrics.run["settings"],
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """What a matrix's row of the pruned checkpoint says of the result too."""
    kept = {name: row[name] for name in _KEPT if name in row}
    return kept | {"zeros_before": row.get("zeros_before", 0), "notes": []}


def _counts(row: dict[str, Any], given: Tensor, masked: Tensor) -> dict[str, Any]:
    """The zeros of a row's matrix in the tensor that has it, before and after, and those that had been lost."""
    span = slice(row["expert"], row["expert"] + 1) if "tensor" in row else slice(None)
    before, zeros = count_zeros(given[span]), count_zeros(masked[span])
    return {
        "zeros": zeros,
        "zeros_before": before,
        "sparsity": zeros / (row["rows"] * row["columns"]),
        "lost": zeros - before,
    }


def _write_beside(
    folder: Path, pruned: Checkpoint, trained: Checkpoint, run: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Recipe, metrics, manifest and the trained model's card beside the finished weights."""
    lost, zeros = sum(row.get("lost", 0) for row in rows), Metrics(run, rows).zeros
    note = f"zeros of {run['masks']['name']} were put back: {lost:,} of {zeros:,} had been lost"
    with disk_errors(folder):
        copy_file(pruned.path / RAC / RECIPE, folder / RAC / RECIPE)
        if (trained.path / CARD).is_file():
            copy_file(inside(trained.path, CARD), folder / CARD)
        lines = [run, *rows, {"type": "end", "notes": [note]}]
        write_file(folder / RAC / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_manifest(folder)
