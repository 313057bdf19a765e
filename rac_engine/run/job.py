"""`rac run`: traces → dense answers → prune → its answers → variants → report, in one folder that appears at the end.

Everything happens in OUT.partial. A journal there says which steps are finished, with the SHA-256 of every file that
they left; a job started again skips those whose files are still so, does the first one that is not and all behind it
once more, and the step at hand goes on where it stopped as far as it can (see traces, engine and evaluate).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rac_engine.base.console import Console
from rac_engine.base.errors import BadInput, Damaged
from rac_engine.base.files import disk_errors, require_space, sha256_files
from rac_engine.checkpoint import Checkpoint, local_folder
from rac_engine.engine import calibration_of, require_memory, verify
from rac_engine.evaluation import load_problems
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.layout import PRUNED, RAC, REPORT, RUN_JOURNAL
from rac_engine.jobs.surroundings import surroundings
from rac_engine.models import Model
from rac_engine.plan import not_finite, skipped_matrices
from rac_engine.recipe import TEXT_PREFIX, Recipe, dump
from rac_engine.report import Row
from rac_engine.run.steps import Limits, Run, models_of
from rac_engine.solve import find_method
from rac_engine.traces import TRACE_TOKEN_BYTES, dated, has_date, load_tokenizer, moment_of, prompts_of, source_of


@dataclass(frozen=True)
class RunResult:
    """The result of `rac run`: the folder, its comparison table, and its report."""

    out: Path
    rows: list[Row]
    report: Path


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "cpu",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    console: Console | None = None,
) -> RunResult:
    """Do the whole job of `recipe` into the new folder `out`.

    Goes on with a job found unfinished in OUT.partial, unless `restart`. It keeps to `device_memory` and `host_memory`
    (see `prune`); a job may go on with others, where a step that has begun keeps its chunks. Raises
    `BadInput` for what cannot work, before anything is sampled where it can be known, and `Interrupted` on SIGINT,
    after which the same call goes on.
    """
    out, console = Path(out), console or Console(quiet=True)
    limits = Limits(device, device_memory, host_memory)
    with FolderJob(out, model=recipe.model) as job:  # before anything is read: a second process is refused at once
        folder = job.partial
        for note in job.notes:
            console.say(f"note: {note}")
        recipe = recipe.model_copy(update={"model": local_folder(recipe.model, console.progress)})
        moment = moment_of(folder / RUN_JOURNAL, restart)
        with dated(moment) as dating:
            checked = _check(recipe, limits)
            if recipe.trace or recipe.evaluate:
                dating.used |= has_date(load_tokenizer(recipe.model))
        identity = {**_flat(yaml.safe_load(dump(recipe))), **checked, **surroundings(device)}
        journal = job.open_journal(
            RUN_JOURNAL,
            identity,
            restart=restart,
            beside=dating.record(),
            stopped=lambda: "stopped between two steps",
            worthwhile=lambda: _worth_keeping(job),
        )
        _require_space(recipe, folder)
        steps = Run(recipe, folder, journal, limits, console)
        with dated(moment):
            steps.do()
        rows = steps.finish()
        if problems := verify(folder, recipe.model, console.progress).problems:
            raise Damaged(f"{folder}: the finished output is damaged: {problems[0]}; run this again")
        job.publish()
    return RunResult(out, rows, out / RAC / REPORT)


def _require_space(recipe: Recipe, folder: Path) -> None:
    """`BadInput` unless the traces, the pruned model and a variant beside it fit on the disk with what is there."""
    model = Checkpoint.open(recipe.model)
    copies = 2 if recipe.compare else 1
    if any(settings.pack for _, _, settings in models_of(recipe)):
        copies += 1  # for a moment it is there in both forms
    wanted = copies * sum(info.nbytes for info in model.tensors.values())
    wanted += TRACE_TOKEN_BYTES * recipe.trace.tokens if recipe.trace else 0
    taken = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    with disk_errors(folder):
        require_space(folder, max(wanted - taken, 0))


def _worth_keeping(job: FolderJob) -> bool:
    """Whether a run has something that took time: a finished step, or what an unfinished one has left.

    The jobs within it remove what is not worth going on with themselves.
    """
    return bool(job.done) or any(file.is_file() and file != job.journal.path for file in job.partial.rglob("*"))


def _check(recipe: Recipe, limits: Limits) -> dict[str, str]:
    """Find what can be known to fail before hours of sampling. Returns the SHA-256 of all that the job starts from."""
    model = Model.open(Checkpoint.open(recipe.model))
    digests = {"model": model.checkpoint.sha256()}
    for name, calibration, settings in models_of(recipe):
        label = recipe.name if name == PRUNED else name
        try:
            skipped_matrices(model, settings)
            not_finite(model, settings)
            require_memory(model, settings, **vars(limits))
        except BadInput as error:
            raise BadInput(f"{label}: {error}") from None
        if find_method(settings.method).needs == "nothing":
            continue
        if calibration.takes_own_traces and recipe.trace is None:
            raise BadInput(f"{label}: give the recipe a `trace` section, or `calibration` a source")
        if not calibration.takes_own_traces:
            known = calibration_of(recipe.model_copy(update={"calibration": calibration}))
            digests[f"calibration of {label}"] = known.sha256
            continue
        # Shares are of the whole, which is not there yet: what stands beside this job's traces is read alone.
        for number, given in enumerate(map(source_of, calibration.sources), 1):
            if given.source is not None:
                alone = calibration.model_copy(update={"source": [given.model_copy(update={"share": None})]})
                known = calibration_of(recipe.model_copy(update={"calibration": alone}))
                digests[f"source {number} of the calibration of {label}"] = known.sha256
    if recipe.trace:
        prompts_of(recipe.trace)
        sources = recipe.trace.sources
        for source in sources:
            digests["prompts" if len(sources) == 1 else f"prompts {source.file}"] = _sha256(source.file)
    if recipe.evaluate and recipe.evaluate.problems:
        load_problems(recipe.evaluate.problems, recipe.evaluate.column)
        digests["problems"] = _sha256(recipe.evaluate.problems)
        for predicted in recipe.evaluate.perplexity:
            file = Path(predicted.removeprefix(TEXT_PREFIX))
            if not file.exists():
                raise BadInput(
                    f"perplexity {predicted}: not found; give a traces folder or file, a .jsonl or text:FILE"
                )
            digests[f"perplexity {predicted}"] = _sha256(file)
    return digests


def _sha256(source: Path) -> str:
    """SHA-256 of a file, or of the digests of a folder's files."""
    if not source.is_dir():
        return sha256_files(source.parent, [source.name])[source.name]
    names = sorted(str(file.relative_to(source)) for file in source.rglob("*") if file.is_file())
    return hashlib.sha256(json.dumps(sha256_files(source, names)).encode()).hexdigest()


def _flat(value: Any, at: str = "recipe") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(value, dict):
        children: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return {at: value}
    return {name: leaf for key, child in children for name, leaf in _flat(child, f"{at}.{key}").items()}
