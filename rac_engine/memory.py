"""How much memory a pruning job needs at each of its phases, and the way to do it that fits.

Everything is worked out from shapes: what is resident while a layer's inputs are observed and its matrices solved, on
the device and on the host (one and the same where the CPU computes). From the limits follow how many tokens go through
a layer together, where activations live, whether the next layer is read and the last one written meanwhile, and how
many Hessians are gathered in one pass over the tokens. Results depend on the chunks only, and only by rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rac_engine.activations import AHEAD, Place
from rac_engine.calibrate import KEEP_BYTES
from rac_engine.errors import BadInput
from rac_engine.models import Model
from rac_engine.recipe import PruneSettings
from rac_engine.sizes import format_bytes
from rac_engine.solve import METHODS
from rac_engine.solve.matrices import TOGETHER, WHOLE
from rac_kernels.objective import ROWS_BYTES as OBJECTIVE_BYTES
from rac_kernels.profile import ROWS_BYTES as SCORE_BYTES

# Measured as resident memory: Python, torch and transformers with nothing to do; what libraries keep for themselves as
# soon as they compute; and what CUDA's context and libraries take of the host.
PROGRAM_BYTES = 560 << 20
WORKSPACE_BYTES = 96 << 20
CUDA_HOST_BYTES = 2 << 30
FACTORED_IN_FP64 = 4096  # columns up to which a CPU factors in fp64
MASK_BYTES = 80 << 20  # of an attention's mask, as bool and as what the kernel makes of it
SMALL_CHUNK = 1024  # tokens, fewer than which leave a device idle
SMALLEST_CHUNK = 256
TOKEN_BYTES = 24  # id as it was read and as it is packed, and a weight
SCORES = 6  # fp64 copies of the rows whose scores are counted in the first pass
COPIES = {"rac": 7, "alps": 8}  # of the weights in fp32 that ADMM and what follows it hold at a time
EIGEN = 7  # matrices of H's size that an eigendecomposition takes: H, scaled, vectors, and what LAPACK asks for
MATCHED_ROWS = 4096  # of the weights that match, made at a time


@dataclass(frozen=True)
class Input:
    """An input of a stage that matrices [rows in all, columns] share; a stage may have `count` alike (experts)."""

    name: str
    rows: int
    columns: int
    largest: int
    """Rows of the largest matrix."""
    matrices: int
    attention: bool
    entrance: bool
    """Whether it is the block's own input, behind its norm."""
    last: bool
    """Whether it is that of a block's last matrix, which is kept while that is solved."""
    count: int = 1
    tied: bool = True
    """Whether the dense model's outputs can be matched: not in a mixture."""

    def statistic(self, method: str) -> int:
        """Bytes of what is gathered from one such input, in fp32."""
        return {"hessian": 4 * self.columns**2, "norms": 4 * self.columns, "nothing": 0}[METHODS[method].needs]


def dtype_of(model: Model, settings: PruneSettings) -> torch.dtype:
    """What the tokens go through a model in: its own dtype, unless the settings name one."""
    return model.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)


@dataclass(frozen=True)
class Shape:
    """What a job's memory depends on: the largest layer, in bytes and elements."""

    hidden: int
    layer_bytes: int
    """Of the weights as they are on disk."""
    weight_size: int
    """Bytes of a weight on disk."""
    size: int
    """Bytes of an activation."""
    embedding_bytes: int
    key_values: int
    """Elements of keys and values a token."""
    inputs: tuple[Input, ...]
    head: Input | None = None
    """That of lm_head, if it is to be pruned."""
    head_bytes: int = 0

    @classmethod
    def of(cls, model: Model, settings: PruneSettings) -> Shape:
        """The shape of a model that goes through in the dtype of the settings."""
        infos = model.checkpoint.tensors
        dtype = dtype_of(model, settings)
        # Layers of one kind are alike: those with the most bytes and the most inputs are looked at.
        sizes = [sum(infos[name].nbytes for name in model.tensor_names(layer)) for layer in range(model.layers)]
        largest = sizes.index(max(sizes))
        inputs = list[Input]()
        for layer in dict.fromkeys((largest, 0)):
            inputs += [found for found in _inputs(model, layer) if found not in inputs]
        config = model.config
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or model.hidden_size // heads)
        key_values = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * width
        if latent := getattr(config, "kv_lora_rank", None):
            # The cache holds the latent; keys and (widened) values are made of it for all tokens so far.
            head = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
            key_values = int(latent) + int(config.qk_rope_head_dim) + 3 * heads * head
        last: Input | None = None
        if "lm_head" in settings.also:
            (matrix,) = model.matrices(model.layers)
            run = matrix.rows if matrix.rows * matrix.columns <= WHOLE else TOGETHER // matrix.columns
            last = Input(matrix.module, matrix.rows, matrix.columns, run, 1, False, True, False)
        return cls(
            head=last,
            head_bytes=0 if last is None else infos[model.family.head].nbytes,
            hidden=model.hidden_size,
            layer_bytes=max(sizes),
            weight_size=model.matrices(largest)[0].dtype.itemsize,
            size=dtype.itemsize,
            embedding_bytes=infos[model.family.embedding].nbytes * (2 if "embeddings" in settings.also else 1),
            key_values=key_values,
            inputs=tuple(inputs),
        )


def _inputs(model: Model, layer: int) -> Iterator[Input]:
    plans = model.plans(layer)
    groups = [list(same) for _, same in itertools.groupby(model.matrices(layer), key=lambda matrix: matrix.group)]
    first = {block: min(g[0].stage for g in groups if g[0].group.block == block) for block in range(len(plans))}
    for (stage, routed), alike in itertools.groupby(
        groups, key=lambda group: (group[0].stage, group[0].group.expert is not None)
    ):
        every = list(alike)
        for group in every[:1] if routed else every:
            plan = plans[group[0].group.block]
            yield Input(
                name=", ".join(matrix.module for matrix in group) + (f" and {len(every) - 1} more" if routed else ""),
                rows=sum(matrix.rows for matrix in group),
                columns=group[0].columns,
                largest=max(matrix.rows for matrix in group),
                matrices=len(group),
                attention=plan.attention,
                entrance=stage == first[group[0].group.block],
                last=plan.experts is None and group[0].module == f"{plan.module}.{plan.output}",
                count=len(every) if routed else 1,
                tied=plan.experts is None,
            )


@dataclass(frozen=True)
class Choice:
    """How a job is done within its memory."""

    chunk_tokens: int
    place: Place
    """Where activations live."""
    keep_bytes: int
    """An MLP's inner activations are kept if they are no larger, else computed twice."""
    overlap: bool
    """Whether the next layer is read and the last one written while one is pruned."""
    hessians: int | None
    """How many of a stage are gathered in one pass over the tokens; None: all."""


@dataclass(frozen=True)
class Phase:
    """What is resident at one time, in bytes by purpose."""

    name: str
    device: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """A choice and what it takes. On a CPU everything is the host's."""

    on_gpu: bool
    choice: Choice
    phases: list[Phase]
    device_limit: int | None
    host_limit: int | None
    disk: int
    """Bytes of activations in files while the job runs."""

    @property
    def device_peak(self) -> int:
        """Most bytes on the device at a time."""
        return max(sum(phase.device.values()) for phase in self.phases)

    @property
    def host_peak(self) -> int:
        """Most bytes resident on the host at a time, the program itself included."""
        return max(sum(phase.host.values()) for phase in self.phases)

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most of what computes."""
        return max(self.phases, key=lambda phase: sum((phase.device if self.on_gpu else phase.host).values()))

    def summary(self) -> dict[str, Any]:
        """For reports: choice, limits and peaks."""
        return {
            "on_gpu": self.on_gpu,
            **asdict(self.choice),
            "device_limit": self.device_limit,
            "host_limit": self.host_limit,
            "device_peak": self.device_peak if self.on_gpu else None,
            "host_peak": self.host_peak,
            "peak_phase": self.peak_phase.name,
            "disk": self.disk,
        }


def plan_memory(
    shape: Shape,
    settings: PruneSettings,
    tokens: int,
    longest: int,
    *,
    on_gpu: bool,
    device_limit: int | None = None,
    host_limit: int | None = None,
    spare: int | None = None,
    device_spare: int | None = None,
    program: int = PROGRAM_BYTES,
    chunk: int | None = None,
) -> MemoryPlan:
    """The best way to go within the limits, in bytes: the host's counts the program itself.

    `tokens` are the calibration tokens, `longest` those of the longest sequence. Without a limit the chunks are as the
    settings say, so that results do not depend on the machine, and activations go to disk where the host's `spare`
    bytes do not hold them; only a device whose free `device_spare` bytes are too few makes them smaller. `program` is
    what the process takes before it begins. Raises `BadInput`, naming the phase, where nothing fits. With `chunk`, so
    many tokens go through a layer together, as when the job was begun.
    """
    best: MemoryPlan | None = None
    free = device_limit is None and host_limit is None
    device_room = device_spare if device_limit is None else device_limit
    host_room = spare if host_limit is None else host_limit
    choices = _choices(shape, settings, tokens, on_gpu, fixed=free)
    if free and device_room is not None:
        choices = itertools.chain(choices, _choices(shape, settings, tokens, on_gpu, fixed=False))
    for choice in choices:
        if chunk is not None:
            choice = replace(choice, chunk_tokens=chunk)
        phases, disk = _phases(shape, settings, tokens, longest, choice, on_gpu, program)
        plan = MemoryPlan(on_gpu, choice, phases, device_limit, host_limit, disk)
        over = _excess(plan, device_room, host_room)
        if over <= 0:
            return plan
        best = plan if best is None or over < _excess(best, device_room, host_room) else best
    assert best is not None
    if free and device_room is None:
        return best  # no promise was made: the settings decide
    if on_gpu and device_room is not None and best.device_peak > device_room:
        where = f"--device-memory {format_bytes(device_room)}"
        if device_limit is None:
            where = f"the device has {format_bytes(device_room)} free"
        need, phase = best.device_peak, max(best.phases, key=lambda phase: sum(phase.device.values()))
    else:
        where = f"--host-memory {format_bytes(host_room or 0)}"
        if host_limit is None:
            where = f"the machine has {format_bytes(host_room or 0)} of memory free"
        need, phase = best.host_peak, max(best.phases, key=lambda phase: sum(phase.host.values()))
    raise BadInput(f"{where}: at least {format_bytes(need)} is needed ({phase.name}); `rac plan` shows for what")


def _excess(plan: MemoryPlan, device: int | None, host: int | None) -> int:
    """Bytes by which what there is, of the device and of the host, is passed, in all."""
    over = 0 if host is None else max(plan.host_peak - host, 0)
    return over if device is None else over + max(plan.device_peak - device, 0)


def _choices(shape: Shape, settings: PruneSettings, tokens: int, on_gpu: bool, fixed: bool) -> Iterator[Choice]:
    """All ways, the fastest first: small chunks cost most, then reading twice, then waiting for the disk."""
    most = max(min(settings.chunk_tokens, tokens), 1)
    halves = [settings.chunk_tokens] if fixed else [most]
    while not fixed and halves[-1] > SMALLEST_CHUNK:
        halves.append(max(halves[-1] // 2, SMALLEST_CHUNK))
    experts = max(found.count for found in shape.inputs)
    together: list[int | None] = [None]
    while experts > 1:
        experts = -(-experts // 2)
        together.append(experts)
    places: list[Place] = ["device", "host", "disk"] if on_gpu and not fixed else ["host", "disk"]
    for small in (False, True):  # chunks that waste what computes come after everything else
        for chunk in halves:
            if (chunk < SMALL_CHUNK and chunk != halves[0]) != small:
                continue
            for overlap in (True, False):
                for each in together:
                    for place in places:
                        for keep in (KEEP_BYTES, 0):
                            yield Choice(chunk, place, keep, overlap, each)


def _phases(
    shape: Shape,
    settings: PruneSettings,
    tokens: int,
    longest: int,
    choice: Choice,
    on_gpu: bool,
    program: int,
) -> tuple[list[Phase], int]:
    method, hidden, size = settings.method, shape.hidden, shape.size
    matched = settings.reconstructs != "layer"
    calibrated = METHODS[method].needs != "nothing"
    chunk = min(choice.chunk_tokens, tokens) if calibrated else 0
    converted = shape.layer_bytes // shape.weight_size * size if size != shape.weight_size else 0
    weights_on_device = shape.layer_bytes // shape.weight_size * size
    streams = 2 if matched else 1

    def stores(width: int) -> tuple[dict[str, int], dict[str, int], int]:
        """Of hidden states and a kept input of that width: what is on the device, on the host, and on disk."""
        whole = tokens * (streams * hidden + width) * size
        one = chunk * (streams * hidden + width) * size
        coming, going = AHEAD * one, (AHEAD + 1) * one
        host: dict[str, int] = {}
        device: dict[str, int] = {}
        if choice.place == "device":
            device["activations"] = whole
        elif choice.place == "host":
            host["activations"] = whole
        if on_gpu and choice.place != "device":
            device["chunks of activations moving"] = coming + going
        if choice.place == "disk":
            host["chunks of activations moving"] = coming + (AHEAD * one if on_gpu else going)
        return device, host, whole if choice.place == "disk" else 0

    base_host = {"program": program + (CUDA_HOST_BYTES if on_gpu else 0)}
    if calibrated:
        base_host["calibration tokens"] = tokens * TOKEN_BYTES
    ahead = max(shape.layer_bytes, shape.head_bytes)
    layers_host = {
        "weights of the layer": shape.layer_bytes,
        **({"weights read ahead and written behind": ahead + shape.layer_bytes} if choice.overlap else {}),
    }
    workspace = {"libraries": WORKSPACE_BYTES}
    alone = {"weights of the layer": weights_on_device}
    device_layer = {"weights of the layer": weights_on_device * streams}
    if not on_gpu and (converted or matched):
        layers_host["converted weights"] = converted + (shape.layer_bytes if matched else 0)
    phases: list[Phase] = []
    disk = 0

    def phase(name: str, width: int, work: dict[str, int], dense_too: bool = True, head: bool = False) -> None:
        nonlocal disk
        layer_host, layer_device = layers_host, device_layer if dense_too else alone
        if head:  # of its weights nothing is on the device until they are solved, and no dense ones are beside
            behind = {"weights written behind": shape.layer_bytes} if choice.overlap else {}
            layer_host, layer_device = {"weights of the layer": shape.head_bytes, **behind}, {}
        device, host, file = stores(width) if calibrated else ({}, {}, 0)
        disk = max(disk, file)
        work = {purpose: count for purpose, count in {**work, **workspace}.items() if count}
        phases.append(
            Phase(
                name,
                {**layer_device, **device, **work} if on_gpu else {},
                {**base_host, **layer_host, **host, **({} if on_gpu else work)},
            )
        )

    if calibrated:
        device, host, _ = stores(0)
        phases.append(Phase("embed", device, {**base_host, **host, "embedding table": shape.embedding_bytes}))
    if settings.allocation != "uniform":
        kept = max((i.columns for i in shape.inputs if i.last and _keeps(i, tokens, size, choice)), default=0)
        work = {
            "norms": sum(4 * i.columns * i.count for i in shape.inputs),
            "activations of a chunk": max(_transient(shape, i, chunk) for i in shape.inputs),
            "scores of some rows": SCORES * max(min(8 * i.largest * i.columns, SCORE_BYTES) for i in shape.inputs),
        }
        if longest > chunk and any(i.attention for i in shape.inputs):
            work["keys and values"] = longest * shape.key_values * size
            work["attention mask"] = 0 if on_gpu else MASK_BYTES
        phase("first pass", kept, work)
    for found in (*shape.inputs, *([] if shape.head is None else [shape.head])):
        head = found is shape.head
        statistic = found.statistic(method)
        tied = matched and found.tied and METHODS[method].needs == "hessian"
        gathered = statistic * (3 if tied and not found.last else 1)
        at_once = min(found.count, choice.hessians or found.count)
        if found.count > 1:
            at_once += 1  # that of all tokens, which scarce experts' are blended with
        kept = found.columns if found.last and _keeps(found, tokens, size, choice) else 0
        if calibrated:
            work = {"Hessian" if METHODS[method].needs == "hessian" else "norms": gathered * at_once}
            if tied and found.last:
                work["cross product with the dense outputs"] = 4 * found.columns * found.rows
            work["activations of a chunk"] = streams * _transient(shape, found, chunk)
            if found.attention and found.last and longest > chunk:
                work["keys and values"] = streams * longest * shape.key_values * size
                work["attention mask"] = 0 if on_gpu else MASK_BYTES
            phase(f"observe {found.name}", kept, work, head=head)
        phase(
            f"solve {found.name}",
            kept,
            _solving(found, settings, shape.weight_size, gathered, at_once, tied, on_gpu),
            dense_too=not found.last or found.attention,  # behind an MLP's last input, all of the dense layer is gone
            head=head,
        )
    return phases, disk


def _keeps(found: Input, tokens: int, size: int, choice: Choice) -> bool:
    return found.attention or tokens * found.columns * size <= choice.keep_bytes


def _transient(shape: Shape, found: Input, chunk: int) -> int:
    """Bytes of what exists of a chunk while an input is computed from the hidden states."""
    size, hidden = shape.size, shape.hidden
    norm = chunk * hidden * (8 + size)
    if found.entrance:
        return norm
    if found.attention:
        # Queries and their rotation, attention's output, and its copy in the order of tokens.
        inside = chunk * size * (hidden + 4 * found.columns + 2 * shape.key_values)
    else:
        inside = chunk * size * (hidden * (3 if found.count > 1 else 1) + 3 * found.columns)
    return max(norm, inside)


def _solving(
    found: Input, settings: PruneSettings, size: int, gathered: int, at_once: int, tied: bool, on_gpu: bool
) -> dict[str, int]:
    """Bytes of what exists while the matrices of an input are pruned."""
    rows, n = found.rows, found.columns
    needs = METHODS[settings.method].needs
    # Solved together; `prune_matrices` takes larger ones one after the other.
    some = min(rows, max(found.largest, TOGETHER // n))
    stacked = some * n * size if found.matrices > 1 else 0
    moved = rows * n * size if on_gpu else 0
    pruned = rows * n * size
    if settings.method in COPIES:
        pruned -= some * n * size  # not there yet while these are solved
    if rows > some and found.matrices == 1:
        stacked = rows * n * size  # the runs of its rows as they are joined
    work = {
        "Hessian" if needs == "hessian" else "norms": gathered * at_once,
        "weights, stacked and pruned": stacked + moved + pruned,
    }
    if needs != "hessian":
        work["fp32 working copies"] = rows * n * 13
        return work
    one = 4 * some * n
    # With the dense outputs matched: C, at the last input held all along, and the weights that come nearest to it.
    cross = one if tied else 0
    held = cross if found.last else 0
    chosen = copies = one if tied else 0
    if settings.method in COPIES:
        copies += COPIES[settings.method] * one
    else:
        copies += one * (2 if on_gpu else 1)
    measure = 3 * min(8 * found.largest * n, OBJECTIVE_BYTES) + 2 * 8 * 512 * n
    exact = 20 * n * n if not on_gpu and n <= FACTORED_IN_FP64 else 0
    if settings.method == "alps":
        work["H scaled, its eigenvectors and their workspace"] = EIGEN * 4 * n * n
    matching = cross + chosen + 3 * 4 * min(some, MATCHED_ROWS) * n if tied else 0
    # One after the other: match, solve, and measure what was solved, which is still there in fp32.
    measuring = cross + chosen + one + measure + rows * n * size - pruned
    work["fp32 working copies"] = max(exact + held, matching, held + copies, measuring)
    return work
