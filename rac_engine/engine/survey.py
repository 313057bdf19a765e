"""The first pass of a job that allocates sparsity: what the dense model's weights count for, from norms alone."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.files import disk_errors, replace_file
from rac_engine.base.sizes import percent
from rac_engine.calibrate import Packing, Statistic, Storage, Stream
from rac_engine.jobs.layout import ALLOCATION
from rac_engine.models import Matrix, Model
from rac_engine.plan import Choice, dtype_of
from rac_engine.recipe import PruneSettings
from rac_engine.solve import Reason, levelled, settled, zeros_at
from rac_kernels.ops.profile import ScoreProfile, score_profile


@dataclass(frozen=True)
class Allocation:
    """A sparsity for each matrix, by its on-disk name, that is neither left dense nor has an override's."""

    sparsities: dict[str, float]
    zeros: int
    """Zeros that the method will make of them, dead inputs aside."""
    weights: int

    def describe(self) -> str:
        low, high = min(self.sparsities.values()), max(self.sparsities.values())
        return f"sparsities from {percent(low)} to {percent(high)}, {percent(self.zeros / self.weights, 3)} in all"


@dataclass(frozen=True)
class _Seen:
    """Matrices that share an input, and their profile."""

    layer: int
    matrices: list[Matrix]
    profile: ScoreProfile

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(matrix.rows, matrix.columns) for matrix in self.matrices]


def allocated(model: Model, settings: PruneSettings, skipped: dict[str, Reason]) -> list[list[Matrix]]:
    """The matrices, by layer, whose sparsity is to be found; none if it is the same for all."""
    if settings.allocation == "uniform":
        return []
    return [
        [m for m in model.matrices(layer) if m.name not in skipped and not settings.overridden(m.path, m.module)]
        for layer in range(model.layers)
    ]


@dataclass(frozen=True)
class FirstPass:
    """A pass over the dense model, from which sparsities are found, and how it is made."""

    model: Model
    settings: PruneSettings
    layers: list[list[Matrix]]
    """The matrices, by layer, whose sparsity is to be found (see `allocated`)."""
    packing: Packing
    choice: Choice
    device: str


def allocate(job: FirstPass, partial: Path, identity: dict[str, Any], progress: Callable[[str], None]) -> Allocation:
    """The allocation of a job that works in `partial`: the one left there if it is of the same job, else a new one."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    file = partial / ALLOCATION
    if (known := _read(file, digest)) is not None:
        return known
    made = _allocation(job.settings, _survey(job, partial, progress))
    content = {"identity": digest, **vars(made)}
    with disk_errors(partial):
        file.parent.mkdir(exist_ok=True)
        replace_file(file, (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode())
    return made


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(file: Path, identity: str) -> Allocation | None:
    """The allocation that an earlier try has left, if it is whole and of the job of that identity."""
    try:
        content = json.loads(file.read_bytes())
        if content.pop("sha256") != _digest(content) or content.pop("identity") != identity:
            return None
        return Allocation(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _survey(job: FirstPass, folder: Path, progress: Callable[[str], None]) -> list[_Seen]:
    """Every input of the dense model with its profile."""
    last = max((layer for layer, matrices in enumerate(job.layers) if matrices), default=-1)
    dtype = dtype_of(job.model, job.settings, torch.device(job.device).type == "cuda")
    storage = Storage(job.device, job.choice.place, folder)
    stream = Stream(job.model, job.packing, dtype, storage, job.choice.keep_bytes)
    found: list[_Seen] = []
    try:
        for layer in range(last + 1):
            progress(f"first pass: layer {layer + 1}/{last + 1}")
            found += _survey_layer(job.model, layer, job.layers[layer], stream, layer < last)
    finally:
        stream.close()
    return found


def _survey_layer(model: Model, layer: int, matrices: list[Matrix], stream: Stream, further: bool) -> list[_Seen]:
    """The inputs of a layer; the tokens go `further` through it where another one follows."""
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
    groups = [list(group) for _, group in itertools.groupby(matrices, key=lambda matrix: matrix.group)]
    norms: list[Tensor] = []
    for number, block in enumerate(model.build_layer(layer, tensors, stream.dtype, stream.device)):
        here = [group for group in groups if group[0].group.block == number]
        statistics = {group[0].group.input: Statistic(group[0].columns, False, stream.device) for group in here}
        on = further or any(group[0].group.block > number for group in groups)
        kept = stream.observe(block, statistics, on) if statistics else None
        for group in here:
            own = statistics[group[0].group.input].value
            # What is beyond fp32 says nothing, to the solver neither.
            norms.append(own if bool(own.isfinite().all()) else torch.zeros_like(own))
        if on:
            stream.advance(block, kept)

    def weights(matrix: Matrix) -> Tensor:
        return matrix.of(tensors[matrix.tensor]).to(stream.device)

    seen = list[_Seen]()
    for group, own in zip(groups, norms, strict=True):
        first, *others = (score_profile(weights(matrix), own) for matrix in group)
        seen.append(_Seen(layer, group, sum(others, first)))
    return seen


def _allocation(settings: PruneSettings, inputs: list[_Seen]) -> Allocation:
    most = settings.allocation_reach
    shares = levelled([each.profile for each in inputs], settings.sparsity, most)
    shapes = [each.shapes for each in inputs]
    shares = settled(shares, shapes, settings.method, settings.block_size, settings.sparsity, most)
    pairs = [(matrix, share) for each, share in zip(inputs, shares, strict=True) for matrix in each.matrices]
    return Allocation(
        {matrix.name: share for matrix, share in pairs},
        sum(zeros_at(settings.method, s, m.rows, m.columns, settings.block_size) for m, s in pairs),
        sum(matrix.rows * matrix.columns for matrix, _ in pairs),
    )
