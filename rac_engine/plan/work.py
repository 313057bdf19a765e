"""Arithmetic of a whole job, and the time that it takes at given peaks."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rac_engine.models import Matrix, Model, working_dtype
from rac_engine.plan.costs import chooses_damping
from rac_engine.plan.memory import MemoryPlan
from rac_engine.plan.shapes import Shape
from rac_engine.recipe import PruneSettings
from rac_engine.solve import CHOOSING, choosing_flops
from rac_kernels.measure import roofline
from rac_kernels.measure.roofline import Peaks
from rac_kernels.ops import column_norm, factor, hessian
from rac_kernels.solvers import grid

# Of an H200, as measured by `rac_kernels.measure.roofline`: for plans of jobs on a GPU where there is none.
H200 = {"bf16": 790e12, "fp16": 790e12, "fp32": 67e12, "bytes": 4.3e12}

REACHED = 0.5  # of such peaks, by a whole job

DISK = 1e9  # bytes a second, read or written

_MEASURING = 0.2  # seconds in which products are timed, at least

_BUSY = 1.25  # times as long as on an idle machine: what is said of


@dataclass(frozen=True)
class Work:
    """A kind of arithmetic over the whole job."""

    name: str
    flops: float
    rule: str
    of_activations: bool = False
    """Whether it multiplies activations, in their number format; else it computes in fp32."""


def expert_passes(shape: Shape, memory: MemoryPlan) -> int:
    """Passes over the tokens of one layer in both of the experts' stages; 0 without experts."""
    passes = 0
    for stage in shape.stages:
        for experts in (found for found in stage.inputs if found.count > 1):
            passes += memory.passes(experts.count, experts.entrance or len(stage.inputs) > 1)
    return passes


def job_seconds(
    work: list[Work], dtype: torch.dtype, disk: int, memory: MemoryPlan, layers: int, further: int, peaks: Peaks
) -> float:
    """Arithmetic and disk each at their rate, one beside the other where the plan lets them.

    `dtype` is the number format of activations, `disk` the bytes of the model, `further` the passes for experts beyond
    those that every layer takes.
    """
    given = roofline.NAMES[dtype]
    computing = sum(each.flops / (peaks[given if each.of_activations else "fp32"] * REACHED) for each in work)
    reads = 2 if any(each.name == "first pass" for each in work) else 1  # of the model; it is written once
    # In a layer all activations are read four times and written twice; a further pass for experts reads them once more.
    moving = ((reads + 1) * disk + (6 * layers + further) * memory.disk) / DISK
    return max(computing, moving) if memory.choice.overlap else computing + moving


def device_peaks(on_gpu: bool) -> tuple[Peaks, str]:
    """The peaks to plan with, and in words whose they are: this machine's, as far as a moment's measuring tells."""
    if on_gpu:
        if torch.cuda.is_available():
            return roofline.measure_peaks("cuda", seconds=0.05), torch.cuda.get_device_name()
        return H200, "an H200, for want of a GPU here"
    rates = dict[torch.dtype, float]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        quick = working_dtype(dtype, on_gpu=False)  # what the engine computes in, where this one is slow here
        if quick not in rates:
            rates[quick] = _product_rate(quick)
        rates[dtype] = rates[quick]
    peaks = {**{name: rates[dtype] for dtype, name in roofline.NAMES.items()}, "bytes": DISK}
    return peaks, f"this CPU with {torch.get_num_threads()} threads{_load()}"


def _load() -> str:
    """What other work on the machine does to the times, in words that go on with a sentence."""
    load, threads, cores = os.getloadavg()[0], torch.get_num_threads(), len(os.sched_getaffinity(0))
    longer = (load + threads) / cores
    if longer <= _BUSY:
        return ""
    return (
        f", as if it had nothing else to do; its load is {load:.1f} on {cores} cores now: with that it takes "
        f"{longer:.1f} × as long"
    )


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the CPU's products of square matrices, the best of some.

    By processor time, of which all threads have an equal share: that says what an idle machine would do, where the time
    that passes says how busy this one is at the moment.
    """
    size, best, until = 512, math.inf, time.monotonic() + _MEASURING
    a = torch.randn(size, size).to(dtype)
    a @ a
    for number in itertools.count():
        if number >= 8 and time.monotonic() > until:
            break
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    return 2.0 * size**3 * torch.get_num_threads() / max(best, 1e-9)


def _attention_width(model: Model, layer: list[Matrix]) -> int:
    """Columns of what the attention of a layer gives; 0 for a layer without one, such as a recurrent one."""
    columns = [matrix.columns for matrix in layer if model.plans(matrix.layer)[matrix.group.block].attention]
    return columns[-1] if columns else 0


def job_work(
    model: Model,
    settings: PruneSettings,
    layers: list[list[Matrix]],
    head: list[Matrix],
    left_dense: Mapping[str, str],
    tokens: int,
    length: int,
    judged: bool = False,
) -> list[Work]:
    """FLOPs of the whole job; those of an operation by its ``limit()``. `judged`: whether tokens are held out."""
    weights = sum(matrix.rows * matrix.columns * matrix.group.share for layer in layers for matrix in layer)
    mixed = sum(_attention_width(model, layer) for layer in layers)
    matched = settings.reconstructs != "layer"
    passes = 2 if settings.order == "layer" or matched else 1
    groups = [
        [matrix for matrix in stage if matrix.name not in left_dense]
        for layer in [*layers, head]
        for stage in stages_of(layer)
    ]
    stages = [(group[0].columns, sum(matrix.rows for matrix in group)) for group in groups if group]
    shares = [group[0].group.share for group in groups if group]
    routed = ", by the router's share" if min(shares, default=1) < 1 else ""
    work: list[Work] = []
    needs, arithmetic = settings.solver.needs, settings.solver.arithmetic
    if settings.allocation != "uniform":
        first = (2.0 * weights + 2.0 * mixed * length) * tokens
        first += sum(s * column_norm.limit(tokens, n).flops for (n, _), s in zip(stages, shares, strict=True))
        work.append(Work("first pass", first, "2 · weights · tokens, attention and norms, for the allocation", True))
    if needs != "nothing":
        times = " · 2 models" if matched else " · 2 passes" if passes == 2 else ""
        work += [
            Work("forward", 2.0 * weights * tokens * passes, "2 · weights · tokens" + routed + times, True),
            Work("attention", 2.0 * mixed * length * tokens * passes, f"sequences of {length} tokens", True),
        ]
    if needs == "norms":
        flops = sum(share * column_norm.limit(tokens, n).flops for (n, _), share in zip(stages, shares, strict=True))
        work.append(Work("norms", flops, "2 · n · tokens", True))
    if needs == "hessian":
        triangles = sum(share * hessian.limit(tokens, n).flops for (n, _), share in zip(stages, shares, strict=True))
        work += [
            Work("Hessian", triangles, "n(n + 1) · tokens: one triangle" + routed, True),
            Work("factor", sum(factor.limit(n).flops for n, _ in stages), "n³/3"),
        ]
        if matched:
            alone = [len(group[0].group.modules) == 1 for group in groups if group]
            tied = [n * min(n, rows if one else n) for (n, rows), one in zip(stages, alone, strict=True)]
            cross = sum(share * 4.0 * size * tokens for size, share in zip(tied, shares, strict=True))
            rule = "4 · n² · tokens at most, of a single matrix 4 · n · min(n, rows)"
            work.append(Work("outputs to match", cross, rule + routed, True))
        if settings.epochs:
            passes = 3 * settings.epochs + 2  # a gradient costs two; before and after the error is measured
            whole = [m for layer in layers for m in layer if model.plans(m.layer)[m.group.block].experts is None]
            flops = 2.0 * sum(matrix.rows * matrix.columns for matrix in whole) * tokens
            flops += 2.0 * mixed * length * tokens
            work.append(Work("tuning", passes * flops, f"{passes} forward passes through the blocks without experts"))
    if settings.recover and needs != "nothing":
        readout = 2.0 * model.hidden_size * model.checkpoint.tensors[model.family.embedding].shape[0]
        through = 2.0 * weights + 2.0 * mixed * length
        forward = 4 * settings.recover + 1  # forward twice, and a gradient costs two
        learned = (forward * through + (2 * settings.recover + 1) * readout) * tokens
        work.append(Work("recovery", learned, f"{forward} forward passes, and lm_head", True))
    if arithmetic is not None:
        solving = sum(arithmetic.flops(rows, n) for n, rows in stages)
        work.append(Work(arithmetic.name, solving, arithmetic.rule))
        if judged and chooses_damping(settings):
            trying = sum(choosing_flops(rows, n, arithmetic) for n, rows in stages)
            work.append(Work("damping", trying, CHOOSING))
    if settings.values != "same" and needs == "hessian":
        rounding = sum(grid.flops(rows, n) for n, rows in stages)
        work.append(Work("rounding", rounding, f"{grid.PASSES + 2} · 2 · rows · n²"))
    return work


def stages_of(layer: list[Matrix]) -> list[list[Matrix]]:
    """The matrices of a layer, those that share an input together."""
    return [list(group) for _, group in itertools.groupby(layer, key=lambda matrix: matrix.group)]
