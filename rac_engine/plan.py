"""What a pruning job will touch and cost, worked out from config and index before anything is read or written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rac_engine.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo, other_files, read_json
from rac_engine.engine import skipped_matrices
from rac_engine.memory import MemoryPlan, Shape, plan_memory
from rac_engine.models import Matrix, Model
from rac_engine.recipe import PruneSettings
from rac_engine.results import percent
from rac_engine.sizes import format_bytes, format_count, format_seconds
from rac_engine.solve import METHODS, alps, rac
from rac_kernels import roofline
from rac_kernels.admm import CHECK, inversions
from rac_kernels.roofline import Peaks

# Of an H200, as measured by `rac_kernels.roofline`: for plans of jobs on a GPU where there is none.
H200 = {"bf16": 790e12, "fp16": 790e12, "fp32": 67e12, "bytes": 4.3e12}
REACHED = 0.5  # of such peaks, by a whole job
DISK = 1e9  # bytes a second, read or written


@dataclass(frozen=True)
class Stage:
    """Matrices of a layer that share their input, pruned together: they share a Hessian [columns, columns]."""

    modules: list[str]
    rows: int
    columns: int
    bytes: int
    """Of the Hessian, or of the norms where the method needs no more."""


@dataclass(frozen=True)
class Work:
    """A kind of arithmetic over the whole job."""

    name: str
    flops: float
    rule: str


@dataclass(frozen=True)
class Plan:
    """What is pruned and what it takes. Bytes and FLOPs are for the whole job with `tokens` calibration tokens."""

    model: str
    model_type: str
    layers: int
    parameters: int
    weights: int
    """Elements of all matrices to be pruned."""
    matrices: int
    left_dense: dict[str, str]
    """On-disk names of decoder matrices that are not pruned, and why."""
    tokens: int
    stages: list[Stage]
    """Of the first layer, and of the first with experts; the experts' by that of one; and of lm_head if it is one."""
    memory: MemoryPlan
    passes: int
    """Over the tokens of a layer with experts, for these: 2 where all Hessians are gathered together, else more."""
    disk: int
    """Bytes of the output; while the job runs, `memory.disk` more."""
    hessians: bool
    """Whether the method gathers Hessians."""
    work: list[Work]
    seconds: float | None = None
    """About how long it takes, if `peaks` were given."""

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
    *,
    on_gpu: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    peaks: Peaks | None = None,
) -> Plan:
    """Plan a job on the checkpoint in folder `model`; config.json alone is enough, the weights need not be there.

    `length` is the mean length of a calibration sequence (attention's share depends on it), `max_length` the longest.
    Limits are in bytes; `peaks` of the device that computes (see `rac_kernels.roofline`) give the time. Raises
    `BadInput` for a folder without config, an unknown family, settings that do not fit the model, and limits that
    nothing fits in.
    """
    settings = settings or PruneSettings()
    opened = _open(Path(model))
    left_dense = skipped_matrices(opened, settings)
    layers = [opened.matrices(layer) for layer in range(opened.layers)]
    around = [opened.matrices(part) for part in opened.parts(settings.also) if not 0 <= part < opened.layers]
    pruned = [matrix for layer in [*layers, *around] for matrix in layer if matrix.name not in left_dense]
    infos = opened.checkpoint.tensors
    kinds = {opened.is_mixture(layer): layers[layer] for layer in reversed(range(opened.layers))}
    first = [
        [matrix for matrix in group if matrix.name not in left_dense]
        for kind in sorted(kinds)
        for group in _stages(kinds[kind])
        if not group[0].group.expert and (not kind or group[0].group.block or len(kinds) == 1)
    ]
    head = [m for m in itertools.chain(*around) if m.layer == opened.layers and m.name not in left_dense]
    calibrated = tokens if METHODS[settings.method].needs != "nothing" else 0
    shape = Shape.of(opened, settings, on_gpu)
    memory = plan_memory(
        shape,
        settings,
        calibrated,
        max(length, max_length or 0),
        on_gpu=on_gpu,
        device_limit=device_memory,
        host_limit=host_memory,
    )
    passes = _expert_passes(shape, memory)
    mixtures = sum(opened.is_mixture(layer) for layer in range(opened.layers))
    further = mixtures * max(passes - 2, 0)
    work = _work(opened, settings, layers, head, left_dense, tokens, length)
    if further:
        router = 2.0 * opened.hidden_size * max(found.count for found in shape.inputs) * calibrated * further
        work.append(Work("further passes", router, "2 · hidden · experts · tokens: the router's choice again"))
    disk = sum(info.nbytes for info in infos.values()) + _other_bytes(opened.checkpoint.path)
    return Plan(
        model=str(model),
        model_type=opened.family.model_type,
        layers=opened.layers,
        parameters=sum(_elements(info) for info in infos.values()),
        weights=sum(matrix.rows * matrix.columns for matrix in pruned),
        matrices=len(pruned),
        left_dense=left_dense,
        tokens=tokens,
        stages=[_stage(group, settings.method) for group in [*first, head] if group],
        memory=memory,
        passes=passes,
        disk=disk,
        hessians=METHODS[settings.method].needs == "hessian",
        work=work,
        seconds=None if peaks is None else _seconds(work, disk, memory, opened.layers, further, peaks),
    )


def render(plan: Plan) -> str:
    """The plan as a page of text."""
    share = plan.weights / plan.parameters
    lines = [
        f"{plan.model}: {plan.model_type}, {plan.layers} layers, {format_count(plan.parameters)} parameters",
        f"{plan.matrices} matrices to prune, {format_count(plan.weights)} weights ({percent(share)} of all)",
        "",
        "Matrices of a layer that share an input",
    ]
    rows = [
        (_names(stage.modules), f"{stage.rows} × {stage.columns}", format_bytes(stage.bytes)) for stage in plan.stages
    ]
    lines += _columns([("modules", "rows × columns", "Hessian" if plan.hessians else "norms"), *rows])
    by_reason: dict[str, list[str]] = {}
    for name, why in plan.left_dense.items():
        by_reason.setdefault(why, []).append(name.removesuffix(".weight"))
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"  {why}: {', '.join(names[:3])}{more}")
    lines += ["", *_memory(plan)]
    lines += ["", "Disk", f"  output  {format_bytes(plan.disk)}"]
    if plan.memory.disk:
        lines.append(f"  activations, while it runs  {format_bytes(plan.memory.disk)}")
    if plan.work:
        total = Work("all", sum(work.flops for work in plan.work), "")
        lines += ["", "Arithmetic", *_columns([(w.name, _flops(w.flops), w.rule) for w in [*plan.work, total]])]
    if plan.seconds is not None:
        lines += ["", f"Time: about {format_seconds(plan.seconds)}, at half of the peaks of what computes"]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    """What is resident when, and how the job goes about it."""
    memory, choice = plan.memory, plan.memory.choice
    lines = [f"Memory for {format_count(plan.tokens)} calibration tokens"]
    names = ["device", "host"] if memory.on_gpu else ["host"]
    for name in names:
        phases = [(phase.name, phase.device if name == "device" else phase.host) for phase in memory.phases]
        rows = [(phase, format_bytes(sum(parts.values()))) for phase, parts in phases]
        largest, parts = max(phases, key=lambda phase: sum(phase[1].values()))
        limit = memory.device_limit if name == "device" else memory.host_limit
        within = "" if limit is None else f" of {format_bytes(limit)}"
        lines += [f"  {name}, by phase", *_columns([(f"  {phase}", size) for phase, size in rows])]
        lines += [f"  {name}, at its peak ({largest})"]
        peak = format_bytes(sum(parts.values())) + within
        lines += _columns([*((f"  {what}", format_bytes(size)) for what, size in parts.items()), ("  peak", peak)])
    where = {"device": "on the device", "host": "in host memory", "disk": "on disk"}[choice.place]
    meanwhile = "the next layer is read and the last one written meanwhile" if choice.overlap else "one layer at a time"
    if memory.alone:
        meanwhile += f", the latter before {' and '.join(memory.alone.values())}"
    together = f"{format_count(choice.chunk_tokens)} tokens go through a layer together"
    lines.append(f"  {together}; activations live {where}; {meanwhile}")
    if plan.passes:
        together = "all" if choice.hessians is None else f"{choice.hessians} at once"
        lines.append(
            f"  Hessians of a layer's experts are gathered {together}: {plan.passes} passes over the tokens of each"
        )
    return lines


def _expert_passes(shape: Shape, memory: MemoryPlan) -> int:
    """Over the tokens of one layer, in both of the experts' stages; 0 without experts."""
    passes = 0
    for stage in shape.stages:
        for experts in (found for found in stage.inputs if found.count > 1):
            passes += memory.passes(experts.count, experts.entrance or len(stage.inputs) > 1)
    return passes


def _seconds(work: list[Work], disk: int, memory: MemoryPlan, layers: int, further: int, peaks: Peaks) -> float:
    """Arithmetic and disk each at their rate, one beside the other where the plan lets them."""
    dense = ("first pass", "forward", "attention", "Hessian", "norms", "outputs to match")
    computing = sum(each.flops / (peaks["bf16" if each.name in dense else "fp32"] * REACHED) for each in work)
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
    a, best = torch.randn(512, 512), math.inf
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    rate = 2.0 * 512**3 / best
    return {"bf16": rate, "fp16": rate, "fp32": rate, "bytes": DISK}, "this CPU, in fp32"


def _names(modules: list[str]) -> str:
    """`self_attn.q_proj, k_proj, v_proj`"""
    return ", ".join([modules[0], *(module.rpartition(".")[2] for module in modules[1:])])


def _flops(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"


def _open(path: Path) -> Model:
    if not path.is_dir() or (path / INDEX).exists() or (path / SINGLE).exists():
        return Model.open(Checkpoint.open(path))
    return Model.of_config(path, read_json(path / "config.json"))


def _stages(layer: list[Matrix]) -> list[list[Matrix]]:
    return [list(group) for _, group in itertools.groupby(layer, key=lambda matrix: matrix.group)]


def _stage(matrices: list[Matrix], method: str) -> Stage:
    return Stage(
        modules=[matrix.module for matrix in matrices],
        rows=sum(matrix.rows for matrix in matrices),
        columns=matrices[0].columns,
        bytes=_statistic_bytes(method, matrices[0].columns),
    )


def _statistic_bytes(method: str, columns: int) -> int:
    """What is gathered from an input of that many columns, in fp32."""
    return {"hessian": 4 * columns**2, "norms": 4 * columns, "nothing": 0}[METHODS[method].needs]


def _work(
    model: Model,
    settings: PruneSettings,
    layers: list[list[Matrix]],
    head: list[Matrix],
    left_dense: dict[str, str],
    tokens: int,
    length: int,
) -> list[Work]:
    """FLOPs of the whole job; the triangle, the factor and the sweep by `rac_kernels.roofline`."""
    weights = sum(matrix.rows * matrix.columns * matrix.group.share for layer in layers for matrix in layer)
    width = [matrix.columns for matrix in layers[0] if matrix.group.block == 0][-1]  # what attention gives
    matched = settings.reconstructs != "layer"
    passes = 2 if settings.order == "layer" or matched else 1
    groups = [
        [matrix for matrix in stage if matrix.name not in left_dense]
        for layer in [*layers, head]
        for stage in _stages(layer)
    ]
    stages = [(group[0].columns, sum(matrix.rows for matrix in group)) for group in groups if group]
    shares = [group[0].group.share for group in groups if group]
    routed = ", by the router's share" if min(shares, default=1) < 1 else ""
    work: list[Work] = []
    needs = METHODS[settings.method].needs
    if settings.allocation != "uniform":
        first = (2.0 * weights + 2.0 * width * length * len(layers)) * tokens
        first += sum(s * roofline.column_norm_flops(tokens, n) for (n, _), s in zip(stages, shares, strict=True))
        work.append(Work("first pass", first, "2 · weights · tokens, attention and norms, for the allocation"))
    if needs != "nothing":
        times = " · 2 models" if matched else " · 2 passes" if passes == 2 else ""
        work += [
            Work("forward", 2.0 * weights * tokens * passes, "2 · weights · tokens" + routed + times),
            Work("attention", 2.0 * width * length * tokens * len(layers) * passes, f"sequences of {length} tokens"),
        ]
    if needs == "norms":
        flops = sum(share * roofline.column_norm_flops(tokens, n) for (n, _), share in zip(stages, shares, strict=True))
        work.append(Work("norms", flops, "2 · n · tokens"))
    if needs == "hessian":
        hessian = sum(share * roofline.hessian_flops(tokens, n) for (n, _), share in zip(stages, shares, strict=True))
        work += [
            Work("Hessian", hessian, "n(n + 1) · tokens: one triangle" + routed),
            Work("factor", sum(roofline.factor_flops(n) for n, _ in stages), "n³/3"),
        ]
        if matched:
            alone = [len(group[0].group.modules) == 1 for group in groups if group]
            tied = [n * min(n, rows if one else n) for (n, rows), one in zip(stages, alone, strict=True)]
            cross = sum(share * 4.0 * size * tokens for size, share in zip(tied, shares, strict=True))
            rule = "4 · n² · tokens at most, of a single matrix 4 · n · min(n, rows)"
            work.append(Work("outputs to match", cross, rule + routed))
        if settings.epochs:
            passes = 3 * settings.epochs + 2  # a gradient costs two; before and after the error is measured
            whole = [m for layer in layers for m in layer if model.plans(m.layer)[m.group.block].experts is None]
            flops = 2.0 * sum(matrix.rows * matrix.columns for matrix in whole) * tokens
            flops += 2.0 * width * length * tokens * len(layers)
            work.append(Work("tuning", passes * flops, f"{passes} forward passes through the blocks without experts"))
        if settings.method == "rac":
            inverses = inversions(rac.STEPS)
            products = rac.STEPS - 1 + rac.REFINING_STEPS + 2  # none in the first step; two of refine measure
            flops = sum(2.0 * rows * n * n * products + n**3 * inverses for n, rows in stages)
            work.append(Work("mask and weights", flops, f"{products} · 2 · rows · n² + {inverses} · n³"))
        elif settings.method == "alps":
            flops = sum(
                roofline.refine_flops(rows, n, alps.REFINING_STEPS)
                + alps.STEPS * (2.0 * rows * n * n + 2.0 * n**3 / CHECK)
                for n, rows in stages
            )
            work.append(Work("mask and weights", flops, f"{alps.STEPS} · (2 · rows · n² + 2 · n³ / {CHECK}) at most"))
        else:
            work.append(Work("sweep", sum(roofline.sweep_flops(rows, n) for n, rows in stages), "rows · n²"))
    return work


def _elements(info: TensorInfo) -> int:
    return math.prod(info.shape)


def _other_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in other_files(folder))


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of text, aligned: the first column to the left, the others to the right, a third and last to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), *(cell for cell in row[2:])]).rstrip()
        for row in rows
    ]
