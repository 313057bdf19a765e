"""The pruning job: load → calibrate → solve → propagate → write, one decoder layer after the other.

All work happens in OUT.partial, which becomes OUT by one rename at the end. A journal in it names the finished layers
with the SHA-256 of what was written. A job that is started again verifies those, sends the calibration tokens through
them once more, and goes on, to the same bytes as if it had never stopped.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import rac_engine
from rac_engine.base.errors import BadInput, Damaged, Interrupted
from rac_engine.base.process import give_back_freed, peak_memory, resident
from rac_engine.calibrate import Packing
from rac_engine.checkpoint import Checkpoint
from rac_engine.engine.context import PruneReport
from rac_engine.engine.job import Job
from rac_engine.engine.limits import device_name, machine_limits
from rac_engine.engine.survey import allocate, allocated
from rac_engine.engine.verify import verify
from rac_engine.jobs.claim import claimed
from rac_engine.jobs.clock import Clock
from rac_engine.jobs.journal import open_journal, records_of
from rac_engine.jobs.layout import ALLOCATION, PRUNE_JOURNAL
from rac_engine.jobs.publish import publish
from rac_engine.jobs.surroundings import code_sha256, machine, surroundings, versions
from rac_engine.models import Model
from rac_engine.plan import Shape, not_finite, plan_memory, skipped_matrices
from rac_engine.recipe import PruneSettings, Recipe, absolute, dump, load_recipe
from rac_engine.solve import find_method
from rac_engine.traces import Calibration, Weighting, load_calibration, load_tokenizer

REPLAY = "replay: embeddings, then every finished layer in turn, from the tensors that its record vouches for"

"""The rule by which a job that goes on has the activations again, as its journal names it."""


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | PruneSettings | str | Path | None = None,
    calibration: Calibration | None = None,
    *,
    device: str = "cpu",
    restart: bool = False,
    hessians: int | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    finish: Callable[[Path], object] = lambda _: None,
) -> PruneReport:
    """Prune the checkpoint in the folder `model` into the new folder `out`.

    `recipe` is a recipe or its file (the sections `calibration` and `prune` count), or the settings alone;
    `calibration` replaces what the recipe names. A job found unfinished in OUT.partial goes on, unless `restart`.
    At most `hessians` of a stage are gathered in one pass over the tokens, which changes no result; by default as many
    as the memory plan says. `device_memory` and `host_memory` are limits in bytes that the job keeps to (see memory);
    the host's counts the whole process. `progress` is told in words what is being done, and how many seconds are left
    once a layer has shown its pace.
    `finish` is given the whole folder before it becomes `out`, to put a report there.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out, recipe = Path(out), _recipe(Path(model), recipe)
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; choose another output folder, or remove it")
    with claimed(out) as partial:  # before anything is read: a second process is refused at once
        limits, told = (device_memory, host_memory), (progress, finish)
        return _prune(Path(model), out, partial, recipe, calibration, device, restart, hessians, limits, *told)


def _prune(
    model: Path,
    out: Path,
    partial: Path,
    recipe: Recipe,
    calibration: Calibration | None,
    device: str,
    restart: bool,
    hessians: int | None,
    given_limits: tuple[int | None, int | None],
    progress: Callable[[str], None],
    finish: Callable[[Path], object],
) -> PruneReport:
    """`prune`, in the folder `partial`, which is this process's alone."""
    device_memory, host_memory = given_limits
    source, settings = Model.open(Checkpoint.open(model)), recipe.prune
    skipped = {**skipped_matrices(source, settings), **not_finite(source, settings)}
    device = device_name(device)
    packing, begun = None, resident()
    limits = machine_limits(device, device_memory, host_memory, begun)
    shape = Shape.of(source, settings, limits["on_gpu"])
    if host_memory is not None:
        give_back_freed()
    if find_method(settings.method).needs == "nothing":
        calibration, memory = None, plan_memory(shape, settings, 0, 0, **limits)
    else:
        calibration = calibration or calibration_of(recipe)
        longest = max((len(sequence.token_ids) for sequence in calibration.sequences), default=0)
        tokens = sum(len(sequence.token_ids) for sequence in calibration.sequences)  # those that do not count too
        chunk = None if restart else _begun_with(partial)
        weighted = any(sequence.weights is not None for sequence in calibration.sequences)
        memory = plan_memory(shape, settings, tokens, longest, chunk=chunk, weighted=weighted, **limits)
        packing = Packing.of(calibration, memory.choice.chunk_tokens)
    run = _describe(source, settings, calibration, packing, device)
    peak_memory(reset=True)
    if memory.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((device_memory or total) / total, device)
    chunk = memory.choice.chunk_tokens
    identity = _identity(run, device, chunk)
    journal = open_journal(partial, PRUNE_JOURNAL, identity, restart, chunk_tokens=chunk, activations=REPLAY)
    try:
        with torch.inference_mode():
            allocation, clock = None, Clock()
            if packing is not None and any(layers := allocated(source, settings, skipped)):
                with clock("first pass"):
                    choice = memory.choice
                    allocation = allocate(
                        source, settings, layers, packing, choice, device, partial, identity, progress
                    )
            where = (device, partial, journal)
            job = Job(source, settings, skipped, packing, memory, begun, *where, allocation, clock, progress)
            job.hessians = hessians or memory.choice.hessians
            job.run()
            report = job.report(out, run, dump(absolute(recipe)), _short_of(recipe, calibration))
            finish(partial)
            _read_back(partial, source, progress)
        publish(partial, out)
    except KeyboardInterrupt:
        if out.exists() and not partial.exists():
            return report  # too late: it is published
        done = min(len(journal.records) - 1, source.layers)
        raise Interrupted(f"stopped with {done} of {source.layers} layers done") from None
    finally:
        if memory.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)  # what comes after is not this job's
        # Nothing worth going on with, unless a first pass was made.
        if len(journal.records) < 2 and partial.exists() and not (partial / ALLOCATION).exists():
            shutil.rmtree(partial)
    return report


def _read_back(partial: Path, source: Model, progress: Callable[[str], None]) -> None:
    """Refuse to publish what does not read back as it should: a disk that lies is found out here, not by a user."""
    if problems := verify(partial, source.checkpoint, progress).problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Damaged(f"{partial}: the finished output is damaged: {problems[0]}{more}; run this again")


def calibration_of(recipe: Recipe) -> Calibration:
    """What a recipe's `calibration` section names, with its model's tokenizer; `BadInput` where it names nothing."""
    wanted = recipe.calibration
    if wanted.source is None:
        raise BadInput(f"calibration is missing: {recipe.prune.method} needs traces, a .jsonl or text:FILE")
    return load_calibration(
        wanted.source,
        part=wanted.part,
        tokens=wanted.tokens,
        tokenizer=load_tokenizer(recipe.model),
        sequence_length=wanted.sequence_length,
        weighting=Weighting(wanted.weight_completion, wanted.weight_positions, wanted.weight_column),
    )


def _begun_with(partial: Path) -> int | None:
    """Tokens that go through a layer together in the job that was begun there, if one was.

    They decide the last bits of the result, and follow from what memory was free when it began.
    """
    records = records_of(partial / PRUNE_JOURNAL)
    chunk = records[0].get("chunk_tokens") if records else None
    return chunk if isinstance(chunk, int) and chunk > 0 else None


def _recipe(model: Path, recipe: Recipe | PruneSettings | str | Path | None) -> Recipe:
    """A recipe with `model` in it, from all that `prune` takes for one."""
    if recipe is None:
        recipe = PruneSettings()
    if isinstance(recipe, PruneSettings):
        return Recipe(model=model, prune=recipe)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    return recipe.model_copy(update={"model": model})


def _short_of(recipe: Recipe, calibration: Calibration | None) -> list[str]:
    """A remark where the calibration has fewer tokens than were asked for."""
    wanted = recipe.calibration.tokens
    if calibration is None or wanted is None or calibration.tokens >= wanted:
        return []
    return [f"the calibration holds {calibration.tokens:,} tokens, fewer than the {wanted:,} asked for"]


def _describe(
    model: Model, settings: PruneSettings, calibration: Calibration | None, packing: Packing | None, device: str
) -> dict[str, Any]:
    """The "run" object: what decides the result, and on what machine it was made."""
    checkpoint = model.checkpoint
    return {
        "type": "run",
        "versions": {"rac_engine": rac_engine.__version__, **versions()},
        "machine": {
            **machine(device),
            "cores": psutil.cpu_count(logical=False),
            "memory": psutil.virtual_memory().total,
        },
        "model": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.sha256(),
            "model_type": model.family.model_type,
            "layers": model.layers,
            "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        },
        "calibration": calibration
        and packing
        and {
            "label": calibration.label,
            "description": calibration.describe(),
            "source": calibration.source,
            "sha256": calibration.sha256,
            "part": calibration.part,
            "weighting": calibration.weighting,
            "sequences": len(calibration.sequences),
            "tokens": packing.counted,
        },
        "code": code_sha256(),
        "settings": settings.model_dump(mode="json"),
    }


def _identity(run: dict[str, Any], device: str, chunk_tokens: int) -> dict[str, Any]:
    """What has to be the same for an unfinished job to go on, by names a user understands."""
    return {
        "model": run["model"]["sha256"],
        "calibration": run["calibration"] and run["calibration"]["sha256"],
        **surroundings(device),
        **{f"settings.{name}": value for name, value in run["settings"].items()},
        "chunk_tokens by the memory plan": chunk_tokens,
    }
