"""The plan of a pruning job, worked out from config and index before anything is read or written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rac_engine.calibrate import statistic_bytes
from rac_engine.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    is_fetched,
    local_folder,
    other_files,
    read_config,
)
from rac_engine.models import Matrix, Model
from rac_engine.plan.memory import MemoryPlan, plan_memory
from rac_engine.plan.packed import packed_bytes
from rac_engine.plan.phases import Machine, Tokens
from rac_engine.plan.sampling import sampled
from rac_engine.plan.shapes import Shape, dtype_of
from rac_engine.plan.targets import skipped_matrices
from rac_engine.plan.work import Work, expert_passes, job_seconds, job_work, stages_of
from rac_engine.recipe import PruneSettings
from rac_engine.solve import enough_tokens, expected_gap
from rac_engine.traces import FEWEST, SamplingPlan
from rac_kernels.measure.roofline import Peaks


@dataclass(frozen=True)
class PlannedGroup:
    """Matrices of a layer that share their input, pruned together: they share a Hessian [columns, columns]."""

    modules: list[str]
    rows: int
    columns: int
    bytes: int
    """Bytes of the Hessian, or of the norms where the method needs no more."""
    tokens: float = 0.0
    """Calibration tokens that reach it: of experts, in the mean."""
    gap: float | None = None
    """The error on tokens held out over that on tokens seen that is to be expected; None: not known of the method."""
    enough: int | None = None
    """Calibration tokens, of the whole job, with which that is no more than `rac_engine.solve.MOST`."""


@dataclass(frozen=True)
class Plan:
    """The matrices to prune and what that takes: bytes and FLOPs of the whole job with `tokens` calibration tokens."""

    model: str
    model_type: str
    layers: int
    parameters: int
    weights: int
    """Elements of all matrices to be pruned."""
    matrices: int
    left_dense: Mapping[str, str]
    """On-disk names of decoder matrices that are not pruned, and why."""
    tokens: int
    groups: list[PlannedGroup]
    """Groups of the first layer of each kind, one expert for all, and lm_head if it is pruned."""
    memory: MemoryPlan
    passes: int
    """Passes over the tokens of a layer for its experts: 2 where all Hessians are gathered together, else more."""
    disk: int
    """Bytes of the output in plain form; while the job runs, `memory.disk` more."""
    packed: int | None
    """About the bytes of the output where it is packed: they are there beside the plain form before that goes."""
    hessians: bool
    """Whether the method gathers Hessians."""
    work: list[Work]
    notes: list[str]
    """How the checkpoint is read, where that is not plain."""
    seconds: float | None = None
    """About how long it takes, if `peaks` were given."""
    sampling: SamplingPlan | str = ""
    """How as many tokens would be sampled from the model, or why they cannot be."""

    @property
    def peak(self) -> int:
        """Most bytes at a time where the job computes: on the GPU, or resident on the host."""
        return self.memory.device_peak if self.memory.on_gpu else self.memory.host_peak

    def to_json(self) -> str:
        """The plan for programs."""
        made = {**dataclasses.asdict(self), "peak": self.peak, "host_peak": self.memory.host_peak}
        return json.dumps(made, indent=1)


def make_plan(
    model: str | Path,
    settings: PruneSettings | None = None,
    tokens: int = 1_000_000,
    length: int = 1024,
    max_length: int | None = None,
    machine: Machine = Machine(),  # noqa: B008 - it is frozen
    peaks: Peaks | None = None,
) -> Plan:
    """Plan a job on the checkpoint `model`, a folder or `org/name[@revision]` on the hub; config.json alone is enough.

    `length` is the mean length of a calibration sequence (attention's share depends on it), `max_length` the longest.
    `machine` says whether a GPU computes, and the limits in bytes; `peaks` of the device that computes (see
    `rac_kernels.measure.roofline`) give the time. Raises `BadInput` for a folder without config, an unknown family,
    settings that do not fit the model, and limits that nothing fits in.
    """
    settings = settings or PruneSettings()
    opened = _open(model)
    left_dense = skipped_matrices(opened, settings)
    layers = [opened.matrices(layer) for layer in range(opened.layers)]
    around = [opened.matrices(part) for part in opened.parts(settings.also) if not 0 <= part < opened.layers]
    pruned = [matrix for layer in [*layers, *around] for matrix in layer if matrix.name not in left_dense]
    infos = opened.checkpoint.tensors
    first = [
        [matrix for matrix in group if matrix.name not in left_dense] for group in _kinds_of_groups(opened, layers)
    ]
    head = [m for m in itertools.chain(*around) if m.layer == opened.layers and m.name not in left_dense]
    calibrated = tokens if settings.solver.needs != "nothing" else 0
    shape = Shape.of(opened, settings, machine.on_gpu)
    held = calibrated // length >= FEWEST  # as the recipe has it by default
    memory = plan_memory(shape, settings, Tokens(calibrated, max(length, max_length or 0), held=held), machine)
    passes = expert_passes(shape, memory)
    mixtures = sum(opened.is_mixture(layer) for layer in range(opened.layers))
    further = mixtures * max(passes - 2, 0)
    work = job_work(opened, settings, layers, head, left_dense, tokens, length, memory.choice.judged)
    if further:
        router = 2.0 * opened.hidden_size * max(found.count for found in shape.inputs) * calibrated * further
        work.append(Work("further passes", router, "2 · hidden · experts · tokens: the router's choice again"))
    others = _other_bytes(opened.checkpoint.path)
    disk = sum(info.nbytes for info in infos.values()) + others
    seconds = None
    if peaks is not None:
        dtype = dtype_of(opened, settings, machine.on_gpu)
        seconds = job_seconds(work, dtype, disk, memory, opened.layers, further, peaks)
    return Plan(
        model=str(model),
        model_type=opened.family.model_type,
        layers=opened.layers,
        parameters=sum(_elements(info) for info in infos.values()),
        weights=sum(matrix.rows * matrix.columns for matrix in pruned),
        matrices=len(pruned),
        left_dense=left_dense,
        tokens=tokens,
        groups=[_planned(group, settings, calibrated) for group in [*first, head] if group],
        memory=memory,
        passes=passes,
        disk=disk,
        packed=packed_bytes(opened, settings, left_dense) + others if settings.pack else None,
        hessians=settings.solver.needs == "hessian",
        work=work,
        notes=opened.notes(),
        seconds=seconds,
        sampling=sampled(opened, max(length, max_length or 0), machine),
    )


def _open(model: str | Path) -> Model:
    path = local_folder(model, weights=False)
    if path != Path(model) and not is_fetched(path):
        return Model.of_config(path, read_config(path / "config.json"))
    if not path.is_dir() or (path / INDEX).exists() or (path / SINGLE).exists():
        return Model.open(Checkpoint.open(path))
    return Model.of_config(path, read_config(path / "config.json"))


def _kinds_of_groups(model: Model, layers: list[list[Matrix]]) -> list[list[Matrix]]:
    """The groups of the first layer of each kind that no other kind has, one expert for all; mixtures come last."""
    found: dict[tuple[tuple[str, int, int], ...], list[Matrix]] = {}
    for layer in sorted(model.first_layers(), key=lambda layer: (model.is_mixture(layer), layer)):
        for group in stages_of(layers[layer]):
            if not group[0].group.expert:
                found.setdefault(tuple((m.module, m.rows, m.columns) for m in group), group)
    return list(found.values())


def _planned(matrices: list[Matrix], settings: PruneSettings, tokens: int) -> PlannedGroup:
    method, share, columns = settings.solver, matrices[0].group.share, matrices[0].columns
    sparsity = settings.of(matrices[0].path, matrices[0].module).sparsity
    # The constant of the method is that of what it reconstructs by default.
    known = settings.reconstructs == method.reconstruct
    enough = enough_tokens(method, columns, sparsity)
    return PlannedGroup(
        modules=[matrix.module for matrix in matrices],
        rows=sum(matrix.rows for matrix in matrices),
        columns=columns,
        bytes=statistic_bytes(columns, method.needs),
        tokens=tokens * share,
        gap=expected_gap(method, columns, tokens * share, sparsity) if known else None,
        enough=math.ceil(enough / share) if known and enough is not None and share else None,
    )


def _elements(info: TensorInfo) -> int:
    return math.prod(info.shape)


def _other_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in other_files(folder))
