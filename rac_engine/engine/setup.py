"""A pruning job before it begins: what was asked for, checked and planned, with nothing written yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

import rac_engine
from rac_engine.base.errors import BadInput
from rac_engine.base.process import resident
from rac_engine.calibrate import Packing
from rac_engine.checkpoint import Checkpoint, origin_of
from rac_engine.engine.limits import device_name, machine_limits
from rac_engine.engine.packed import Packer
from rac_engine.jobs.journal import first_record
from rac_engine.jobs.layout import PRUNE_JOURNAL
from rac_engine.jobs.surroundings import code_sha256, machine, surroundings, versions
from rac_engine.models import Model
from rac_engine.plan import MemoryPlan, Shape, Tokens, not_finite, plan_memory, skipped_matrices
from rac_engine.recipe import TEXT_PREFIX, CalibrationSource, PruneSettings, Recipe
from rac_engine.solve import DAMPING, Reason, find_method
from rac_engine.traces import (
    Calibration,
    HoldingOut,
    Weighting,
    hold_out,
    load_calibration,
    load_tokenizer,
    mixed,
    ordinary_tokens,
    require_embedding,
    source_of,
    with_replaced,
)


@dataclass(frozen=True)
class PruneRequest:
    """The arguments of `prune`, which explains them."""

    out: Path
    recipe: Recipe
    """With the model's folder in it."""
    calibration: Calibration | None
    device: str
    restart: bool
    hessians: int | None
    device_memory: int | None
    host_memory: int | None
    progress: Callable[[str], None]
    note: Callable[[str], None]
    finish: Callable[[Path], object]
    packer: Packer | None
    """None where the output stays plain."""


@dataclass(frozen=True)
class Setup:
    """A job that can begin."""

    model: Model
    settings: PruneSettings
    skipped: dict[str, Reason]
    """Matrices that stay dense: the reason, by on-disk name."""
    device: str
    """The device's full name, like "cuda:0"."""
    calibration: Calibration | None
    packing: Packing | None
    """The calibration's tokens; both are None for methods that need none."""
    memory: MemoryPlan
    resident: int
    """Bytes that the process has before the job begins."""
    remarks: list[str] = field(default_factory=list)
    """Remarks on the calibration for the report."""


def set_up(request: PruneRequest, partial: Path) -> Setup:
    """Check what was asked for and plan the memory; `BadInput` for what cannot work.

    A job that was begun in the folder `partial` keeps its chunks of tokens, unless it is to restart.
    """
    settings = request.recipe.prune
    model = Model.open(Checkpoint.open(request.recipe.model))
    skipped = {**skipped_matrices(model, settings), **not_finite(model, settings)}
    device, begun = device_name(request.device), resident()
    machine = machine_limits(device, request.device_memory, request.host_memory, begun)
    shape = Shape.of(model, settings, machine.on_gpu)
    if find_method(settings.method).needs == "nothing":
        memory = plan_memory(shape, settings, Tokens(0, 0), machine)
        return Setup(model, settings, skipped, device, None, None, memory, begun)
    calibration = request.calibration or calibration_of(request.recipe)
    highest = max((int(sequence.token_ids.max()) for sequence in calibration.sequences), default=0)
    embedded = model.checkpoint.tensors[model.family.embedding].shape[0]
    require_embedding(highest, embedded, f"calibration {calibration.source}")
    remarks = calibration_remarks(request.recipe, calibration, model.checkpoint)
    if find_method(settings.method).needs == "hessian":  # without one no error is measured
        arranged = arranged_of(request.recipe, calibration)
        calibration = arranged.calibration
        remarks += [] if arranged.remark is None else [arranged.remark]
    lengths = [len(sequence.token_ids) for sequence in calibration.sequences]  # tokens that do not count too
    chunk, judged = (None, None) if request.restart else _begun_with(partial)
    weighted = any(sequence.weights is not None for sequence in calibration.sequences)
    tokens = Tokens(sum(lengths), max(lengths, default=0), weighted, bool(calibration.held_out))
    memory = plan_memory(shape, settings, tokens, machine, chunk=chunk, judged=judged if calibration.held_out else None)
    if calibration.held_out and not memory.choice.judged:
        remarks.append("matrices are not judged by the tokens held out, for want of memory")
    if settings.solver.damped_by_error and settings.damping is None and not memory.choice.judged:
        remarks.append(f"damping {DAMPING:g} throughout: no tokens are held out to choose it by")
    packing = Packing.of(calibration, memory.choice.chunk_tokens)
    return Setup(model, settings, skipped, device, calibration, packing, memory, begun, remarks)


def calibration_of(recipe: Recipe, own: Path | None = None) -> Calibration:
    """The calibration that a recipe names, with its model's tokenizer; `BadInput` where it names none.

    `own` is the folder of this job's own traces, which are called by the last two parts of its path.
    """
    wanted = recipe.calibration
    if wanted.takes_own_traces and own is None:
        raise BadInput(f"calibration is missing: {recipe.prune.method} needs traces, a .jsonl or text:FILE")
    tokenizer = load_tokenizer(recipe.model)
    sources = wanted.sources or [CalibrationSource()]
    several = len(sources) > 1 or source_of(sources[0]) != CalibrationSource(source=source_of(sources[0]).source)

    def load(source: str, tokens: int | None) -> Calibration:
        whole = several and source.startswith(TEXT_PREFIX)  # of text nothing is a prompt's or a completion's
        found = load_calibration(
            source or str(own),
            part="all" if whole else wanted.part,
            tokens=tokens,
            tokenizer=tokenizer,
            sequence_length=wanted.sequence_length,
            weighting=Weighting() if whole else Weighting(wanted.weight_completion, wanted.weight_column),
            columns=wanted.column,
            template_arguments=wanted.template_arguments,
        )
        return found if source or own is None else replace(found, source="/".join(own.parts[-2:]))

    return mixed(sources, wanted.tokens, load) if several else load(source_of(sources[0]).source or "", wanted.tokens)


def arranged_of(recipe: Recipe, calibration: Calibration) -> HoldingOut:
    """A calibration with sequences held out and copies with replaced tokens, as the recipe says."""
    wanted = recipe.calibration
    held = hold_out(calibration, wanted.held_out)
    if not wanted.replaced:
        return held
    ordinary = ordinary_tokens(load_tokenizer(recipe.model))
    return HoldingOut(with_replaced(held.calibration, wanted.replaced, ordinary), held.remark)


def calibration_remarks(recipe: Recipe, calibration: Calibration, checkpoint: Checkpoint) -> list[str]:
    """Remarks on a calibration: without completions, of another model, or with fewer tokens than were asked for."""
    remarks = list(calibration.remarks)
    if others := calibration.models - {checkpoint.sha256()} if calibration.models else None:
        whose = "are" if len(others) == len(calibration.models) else "are in part"
        remarks.append(
            f"the traces {whose} of another model (SHA-256 {min(others)[:12]}…) than {recipe.model}; what a model "
            "writes itself is what it is best calibrated on"
        )
    wanted = recipe.calibration.tokens
    if wanted is not None and calibration.tokens < wanted:
        remarks.append(f"the calibration holds {calibration.tokens:,} tokens, fewer than the {wanted:,} asked for")
    return remarks


def _begun_with(partial: Path) -> tuple[int | None, bool | None]:
    """How the job that was begun in a folder goes about it; None where there is none.

    Tokens that go through a layer together, and whether matrices are judged by those held out: both decide the result,
    and follow from what memory was free when it began.
    """
    first = first_record(partial / PRUNE_JOURNAL)
    chunk, judged = first.get("chunk_tokens"), first.get("judged")
    return chunk if isinstance(chunk, int) and chunk > 0 else None, judged if isinstance(judged, bool) else None


def describe(setup: Setup) -> dict[str, Any]:
    """The "run" object of metrics.jsonl: what decides the result, and on what machine it was made."""
    model, checkpoint = setup.model, setup.model.checkpoint
    calibration, packing = setup.calibration, setup.packing
    origin = origin_of(checkpoint.path)
    return {
        "type": "run",
        "versions": {"rac_engine": rac_engine.__version__, **versions()},
        "machine": {
            **machine(setup.device),
            "cores": psutil.cpu_count(logical=False),
            "memory": psutil.virtual_memory().total,
        },
        "model": {
            "name": origin.name,  # no path: the output may be published
            "revision": origin.revision,
            "declared": origin.declared,
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
            "tokens": calibration.tokens,
            "held_out": {
                "sequences": len(calibration.held_out),
                "tokens": packing.held_counted,
            },
            "sources": [_source_row(calibration, number) for number in range(len(calibration.parts))],
        },
        "code": code_sha256(),
        "settings": setup.settings.model_dump(mode="json"),
    }


def _source_row(calibration: Calibration, number: int) -> dict[str, Any]:
    """One of several sources, for the "run" object."""
    part = calibration.parts[number]
    held = [sequence for sequence in calibration.held_out if sequence.source == number]
    return {
        "source": part.source,
        "label": part.label,
        "tokens": part.tokens,
        "sequences": len(part.sequences),
        "held_out": {"sequences": len(held), "tokens": sum(sequence.counted for sequence in held)},
    }


def identity_of(setup: Setup, run: dict[str, Any]) -> dict[str, Any]:
    """The identity of a job: all that has to be the same for it to go on, by names a user understands."""
    return {
        "model": run["model"]["sha256"],
        "calibration": run["calibration"] and run["calibration"]["sha256"],
        **surroundings(setup.device),
        **{f"settings.{name}": value for name, value in run["settings"].items()},
        "chunk_tokens by the memory plan": setup.memory.choice.chunk_tokens,
    }
