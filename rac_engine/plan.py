"""What a pruning job will touch and cost, worked out from config and index before anything is read or written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.calibrate import KEEP_BYTES
from rac_engine.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo, other_files, read_json
from rac_engine.engine import skipped_matrices
from rac_engine.models import FAMILIES, Family, Matrix, Model
from rac_engine.recipe import PruneSettings
from rac_engine.results import percent
from rac_engine.sizes import format_bytes, format_count
from rac_engine.solve import METHODS
from rac_kernels import roofline

# Measured as resident memory: Python, torch and transformers with nothing to do, and what kernels and libraries keep
# for themselves as soon as activations go through them.
PROGRAM_BYTES = 500 << 20
WORKSPACE_BYTES = 64 << 20


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
    """Of the first layer."""
    memory: dict[str, int]
    """Bytes resident by purpose; the largest of the phases is counted in `peak`."""
    peak: int
    disk: int
    hessians: bool
    """Whether the method gathers Hessians."""
    work: list[Work]

    def to_json(self) -> str:
        """The plan for programs."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def make_plan(
    model: str | Path, settings: PruneSettings | None = None, tokens: int = 1_000_000, length: int = 1024
) -> Plan:
    """Plan a job on the checkpoint in folder `model`; config.json alone is enough, the weights need not be there.

    `length` is the mean length of a calibration sequence (attention's share depends on it). Raises `BadInput` for a
    folder without config, an unknown family, and settings that do not fit the model.
    """
    settings = settings or PruneSettings()
    opened = _open(Path(model))
    left_dense = skipped_matrices(opened, settings)
    layers = [opened.matrices(layer) for layer in range(opened.layers)]
    pruned = [matrix for layer in layers for matrix in layer if matrix.name not in left_dense]
    infos = opened.checkpoint.tensors
    first = [[matrix for matrix in group if matrix.name not in left_dense] for group in _stages(layers[0])]
    memory = _memory(opened, settings, layers, tokens)
    phases = [name for name in memory if name.startswith("phase: ")]
    return Plan(
        model=str(model),
        model_type=opened.family.model_type,
        layers=opened.layers,
        parameters=sum(_elements(info) for info in infos.values()),
        weights=sum(matrix.rows * matrix.columns for matrix in pruned),
        matrices=len(pruned),
        left_dense=left_dense,
        tokens=tokens,
        stages=[_stage(group, settings.method) for group in first if group],
        memory=memory,
        peak=sum(size for name, size in memory.items() if name not in phases) + max(memory[name] for name in phases),
        disk=sum(info.nbytes for info in infos.values()) + _other_bytes(opened.checkpoint.path),
        hessians=METHODS[settings.method].needs == "hessian",
        work=_work(opened, settings, layers, left_dense, tokens, length),
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
    lines += ["", f"Memory for {format_count(plan.tokens)} calibration tokens"]
    sizes = {**plan.memory, "peak, with the larger phase": plan.peak}
    lines += _columns([(name, format_bytes(size)) for name, size in sizes.items()])
    lines += ["", "Disk", f"  output  {format_bytes(plan.disk)}"]
    if plan.work:
        total = Work("all", sum(work.flops for work in plan.work), "")
        lines += ["", "Arithmetic", *_columns([(w.name, _flops(w.flops), w.rule) for w in [*plan.work, total]])]
    return "\n".join(lines)


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
    config = read_json(path / "config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    return Model.open(Checkpoint(path, config, _tensors(path, config, family) if family else {}, {}))


def _tensors(path: Path, config: dict[str, Any], family: Family) -> dict[str, TensorInfo]:
    """The tensors that a checkpoint with this config has, for planning without them."""
    made = CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    with torch.device("meta"):
        state = family.make("DecoderLayer", made, 0).state_dict()
    layer = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {family.embedding: (made.vocab_size, made.hidden_size), family.norm: (made.hidden_size,)}
    for index in range(made.num_hidden_layers):
        shapes.update({f"{family.layers}{index}.{name}": shape for name, shape in layer.items()})
    if not made.tie_word_embeddings:
        shapes[family.head] = (made.vocab_size, made.hidden_size)
    return {
        name: TensorInfo(name, path, dtype, shape, 0, math.prod(shape) * dtype.itemsize)
        for name, shape in shapes.items()
    }


def _stages(layer: list[Matrix]) -> list[list[Matrix]]:
    return [list(group) for _, group in itertools.groupby(layer, key=lambda matrix: matrix.stage)]


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


def _memory(model: Model, settings: PruneSettings, layers: list[list[Matrix]], tokens: int) -> dict[str, int]:
    """Bytes by purpose, as the engine holds them: hidden states throughout, two layers' weights, one stage at work."""
    infos = model.checkpoint.tensors
    dtype = model.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    size, hidden = dtype.itemsize, int(model.config.hidden_size)
    layer_bytes = max(sum(infos[name].nbytes for name in model.tensor_names(layer)) for layer in range(model.layers))
    converted = dtype != infos[layers[0][0].name].dtype
    calibrated = METHODS[settings.method].needs != "nothing"
    chunk = min(settings.chunk_tokens, tokens) if calibrated else 0
    calibrate, solve = 0, 0
    for stage in _stages(layers[0]):
        rows, columns = sum(matrix.rows for matrix in stage), stage[0].columns
        statistic = _statistic_bytes(settings.method, columns)
        kept = tokens * columns * size if calibrated and _kept(model, stage, tokens * columns * size) else 0
        calibrate = max(calibrate, statistic + kept + chunk * (3 * columns + 2 * hidden) * size)
        solve = max(solve, statistic + kept + rows * columns * (2 * stage[0].dtype.itemsize + 8))
    return {
        "program": PROGRAM_BYTES,
        "kernels' workspace": WORKSPACE_BYTES if calibrated else 0,
        "calibration tokens": tokens * (hidden * size + 8) if calibrated else 0,
        "weights of two layers": layer_bytes * (3 if converted else 2),
        "phase: calibrate a stage": calibrate,
        "phase: solve a stage": solve,
    }


def _kept(model: Model, stage: list[Matrix], size: int) -> bool:
    """Whether a block's inner activations of `size` bytes are kept while its last matrix is pruned."""
    block = next((block for block in model.family.blocks if f"{block.module}.{block.output}" == stage[0].module), None)
    return block is not None and (block.attention or size <= KEEP_BYTES)


def _work(
    model: Model,
    settings: PruneSettings,
    layers: list[list[Matrix]],
    left_dense: dict[str, str],
    tokens: int,
    length: int,
) -> list[Work]:
    """FLOPs of the whole job; the triangle, the factor and the sweep by `rac_kernels.roofline`."""
    weights = sum(matrix.rows * matrix.columns for layer in layers for matrix in layer)
    width = next(matrix.columns for matrix in layers[0] if matrix.stage == 1)
    passes = 2 if settings.order == "layer" else 1
    groups = [
        [matrix for matrix in stage if matrix.name not in left_dense] for layer in layers for stage in _stages(layer)
    ]
    stages = [(group[0].columns, sum(matrix.rows for matrix in group)) for group in groups if group]
    work: list[Work] = []
    needs = METHODS[settings.method].needs
    if needs != "nothing":
        times = " · 2 passes" if passes == 2 else ""
        work += [
            Work("forward", 2.0 * weights * tokens * passes, "2 · weights · tokens" + times),
            Work("attention", 2.0 * width * length * tokens * len(layers) * passes, f"sequences of {length} tokens"),
        ]
    if needs == "norms":
        flops = sum(roofline.column_norm_flops(tokens, n) for n, _ in stages)
        work.append(Work("norms", flops, "2 · n · tokens"))
    if needs == "hessian":
        hessian = sum(roofline.hessian_flops(tokens, n) for n, _ in stages)
        work += [
            Work("Hessian", hessian, "n(n + 1) · tokens: one triangle"),
            Work("factor", sum(roofline.factor_flops(n) for n, _ in stages), "n³/3"),
            Work("sweep", sum(roofline.sweep_flops(rows, n) for n, rows in stages), "rows · n²"),
        ]
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
