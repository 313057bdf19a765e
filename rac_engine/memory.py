"""How much memory a pruning job needs at each of its phases, and the way to do it that fits.

Everything is worked out from shapes: what is resident while a layer's inputs are observed and its matrices solved, on
the device and on the host (one and the same where the CPU computes). From the limits follow how many tokens go through
a layer together, where activations live, whether the next layer is read and the last one written meanwhile, and how
many Hessians are gathered in one pass over the tokens. Results depend on the chunks only, and only by rounding.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rac_engine.activations import AHEAD, Place
from rac_engine.calibrate import KEEP_BYTES
from rac_engine.checkpoint import fp8_block
from rac_engine.errors import BadInput
from rac_engine.models import Model, attention_bytes, is_fused, working_dtype
from rac_engine.recipe import PruneSettings
from rac_engine.sizes import format_bytes
from rac_engine.solve import METHODS, rac
from rac_engine.solve.matrices import TOGETHER, WHOLE
from rac_engine.tune import BATCH, STEPS
from rac_kernels import native
from rac_kernels.factor import EXACT as FACTORED_IN_FP64
from rac_kernels.inverse import side_of
from rac_kernels.objective import COLUMNS
from rac_kernels.objective import ROWS_BYTES as OBJECTIVE_BYTES
from rac_kernels.profile import ROWS_BYTES as SCORE_BYTES
from rac_kernels.refine import ELEMENTS, EXACT_ELEMENTS, ROWS, solves_exactly

# oneDNN, torch's arithmetic on a CPU, keeps what it has compiled for each of up to a thousand shapes: as an expert has
# another number of tokens in every chunk, memory would grow by a hundred megabytes. Heeded if nothing was computed yet.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
# Where freed memory is given back at once (see `prune`), what is asked for anew comes in pages of 2 MiB: a fifth less
# time for the whole job than with those of 4 KiB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Measured as resident memory: Python, torch and transformers with nothing to do; what libraries and the heap keep for
# themselves as soon as they compute, and for each thread up to eight, with linear algebra and without it, and how much
# less of it where oneDNN multiplies nothing; what CUDA's libraries keep on the device, and its context and libraries of
# the host.
PROGRAM_BYTES = 560 << 20
WORKSPACE_BYTES = {True: (33 << 20, 2 << 20), False: (18 << 20, 1 << 19)}
UNUSED_BYTES = {True: 16 << 20, False: 10 << 20}
FILE_BYTES = 40 << 20  # of libraries' files, as many more pages as the system happens to map at a time
CUDA_WORKSPACE_BYTES = 96 << 20
CUDA_HOST_BYTES = 2 << 30
BEHIND = "weights written behind"
WORTH_WAITING = 1.02  # times the peak without them
SMALL_CHUNK = 1024  # tokens, fewer than which leave a device idle
SMALLEST_CHUNK = 256
TOKEN_BYTES = 24  # id as it was read and as it is packed, a weight, and a checksum
SCORES = 6  # fp64 copies of the rows whose scores are counted in the first pass
PACKED_BYTES = 8 << 20  # of tokens as the CPU's sums take them, at a time, but a run of them at least:
PACKED_RUN = 1024  # bytes a column
MATCHED_ROWS = 4096  # of the weights that match, made at a time
# Bytes a weight in fp32 and bf16, all that a solver holds at a time: the sweep's and ADMM's on a CPU and on a GPU, what
# ADMM leaves beside the refined ones, and in the refinement of some rows, by torch and in native code; of mask and
# scores alone.
SWEEPING = {False: 10, True: 8}
COPIES = {"rac": {False: 23, True: 20}, "alps": {False: 32, True: 32}}
REFINED, REFINING, REFINING_NATIVE, REFINING_EXACTLY = 12, 58, 28, 40
SCORING, MEASURING = 16, 10
EXACT = 20  # of H's elements, where a CPU factors in fp64
EIGENSOLVER = 12  # of H's elements, beside H, scaled H and the vectors, that an eigendecomposition asks for
# Of a block that is tuned: bytes a weight (in fp32 itself, its gradient, two means and more), and fp32 copies of a
# token's hidden states, of queries, keys and values, and of scores where they are in the open.
TUNED_WEIGHTS, TUNED_HIDDEN, TUNED_QUERIES, TUNED_SCORES = 20, 8, 2, 4


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
    inner: int = 3
    """Copies of a block's inner activations that exist while they are made."""
    count: int = 1
    key: tuple[bool, int] = (False, 0)
    """Whether its layer is a mixture, and the number of its stage there."""

    @property
    def weights(self) -> int:
        """Elements of all its matrices."""
        return self.rows * self.columns * self.count

    @property
    def by_outputs(self) -> bool:
        """Whether what ties it to the dense model is its matrix's outputs, not the inputs."""
        return self.last or (self.count > 1 and self.matrices == 1 and self.rows < self.columns)

    def statistic(self, method: str) -> int:
        """Bytes of what is gathered from one such input, in fp32."""
        return {"hessian": 4 * self.columns**2, "norms": 4 * self.columns, "nothing": 0}[METHODS[method].needs]

    def tied(self, method: str) -> int:
        """The same with what ties it to the dense model, but for the outputs of a block's last matrix."""
        own = self.statistic(method)
        if self.by_outputs:
            return own + (0 if self.last else 4 * self.columns * self.rows)
        return 3 * own


def dtype_of(model: Model, settings: PruneSettings, on_gpu: bool) -> torch.dtype:
    """What the tokens go through a model in: its own dtype or what is quicker, unless the settings name one."""
    return working_dtype(model.dtype, on_gpu) if settings.dtype == "auto" else getattr(torch, settings.dtype)


@dataclass(frozen=True)
class Attention:
    """What an attention's memory depends on."""

    queries: int
    """Elements of a token's queries."""
    key_values: int
    """Elements of keys and values a token."""
    group: int
    """Query heads to a key."""
    widths: int
    """Of a key and a value together."""
    head: int
    """Width of a query."""
    open: bool
    """Whether there are soft caps or sinks, which no kernel of PyTorch's knows."""
    window: int | None

    @classmethod
    def of(cls, model: Model) -> Attention:
        config = model.config
        heads = int(config.num_attention_heads)
        key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or model.hidden_size // heads)
        key_values, widths, group = 2 * key_heads * width, 2 * width, heads // key_heads
        if latent := getattr(config, "kv_lora_rank", None):
            # The cache holds the latent; keys and (widened) values are made of it for all tokens so far.
            width = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
            key_values = int(latent) + int(config.qk_rope_head_dim) + 3 * heads * width
            widths, group = 2 * width, 1
        return cls(
            queries=heads * width,
            key_values=key_values,
            group=group,
            widths=widths,
            head=width,
            open=model.scores_in_the_open,
            window=getattr(config, "sliding_window", None),
        )

    def passing(self, shape: Shape, chunk: int, longest: int, on_gpu: bool) -> int:
        """Bytes of a chunk on its way through it: queries, keys and their rotations, norms in fp32, what comes out."""
        size = shape.size
        rotating = shape.hidden + 4 * self.queries + 2 * self.key_values
        normed = (shape.hidden + self.queries) * size + 8 * self.queries
        most = 0
        for window in {None, self.window if self.window is not None and self.window < longest else None}:
            device, dtype = torch.device("cuda" if on_gpu else "cpu"), {2: torch.bfloat16, 4: torch.float32}[size]
            fused = not self.open and is_fused(device, dtype, self.head, window)
            masked = not on_gpu and (window is not None or longest > chunk)
            shares = attention_bytes(fused, self.group, self.widths, chunk, longest, window, masked, size)
            most = max(most, shares)
        attending = chunk * size * (shape.hidden + 3 * self.queries + self.key_values) + most
        return max(chunk * rotating * size, chunk * normed, attending)


@dataclass(frozen=True)
class Stage:
    """Inputs that are looked at in one pass over the tokens, and what has become of the layer before."""

    inputs: tuple[Input, ...]
    before: int
    """Weights of the block that are pruned by then."""
    gone: int
    """Weights of the blocks before it."""

    @property
    def name(self) -> str:
        """Those of its inputs, or of the experts' alone."""
        routed = [found.name for found in self.inputs if found.count > 1]
        return ", ".join(routed or [found.name for found in self.inputs])


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
    fp8_bytes: int
    """Of the largest tensor in FP8 as it lies in the file."""
    attention: Attention
    stages: tuple[Stage, ...]
    """Inputs that are looked at together, of the largest layer and of the first."""

    head: Stage | None = None
    """That of lm_head, if it is to be pruned."""
    head_bytes: int = 0

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Those of all stages."""
        return tuple(found for stage in self.stages for found in stage.inputs)

    @classmethod
    def of(cls, model: Model, settings: PruneSettings, on_gpu: bool) -> Shape:
        """The shape of a model that goes through in the dtype of the settings."""
        infos = model.checkpoint.tensors
        dtype = dtype_of(model, settings, on_gpu)
        # Layers of one kind are alike: the one with the most bytes and the first are looked at.
        sizes = [sum(infos[name].nbytes for name in model.tensor_names(layer)) for layer in range(model.layers)]
        largest = sizes.index(max(sizes))
        stages = list[Stage]()
        for layer in dict.fromkeys((largest, 0)):
            stages += [found for found in _stages(model, layer, settings.order == "layer") if found not in stages]
        head: Stage | None = None
        if "lm_head" in settings.also:
            (matrix,) = model.matrices(model.layers)
            run = matrix.rows if matrix.rows * matrix.columns <= WHOLE else TOGETHER // matrix.columns
            head = Stage((Input(matrix.module, matrix.rows, matrix.columns, run, 1, False, True, False),), 0, 0)
        return cls(
            head=head,
            head_bytes=0 if head is None else infos[model.family.head].nbytes,
            hidden=model.hidden_size,
            layer_bytes=max(sizes),
            weight_size=model.matrices(largest)[0].dtype.itemsize,
            size=dtype.itemsize,
            embedding_bytes=infos[model.family.embedding].nbytes * (2 if "embeddings" in settings.also else 1),
            fp8_bytes=0 if fp8_block(model.checkpoint.config) is None else _largest(model, largest),
            attention=Attention.of(model),
            stages=tuple(stages),
        )


def _largest(model: Model, layer: int) -> int:
    """Elements of the layer's largest matrix."""
    return max(matrix.rows * matrix.columns for matrix in model.matrices(layer))


def _stages(model: Model, layer: int, at_once: bool) -> Iterator[Stage]:
    """Those of a layer; all inputs in one where they are looked at at once."""
    inputs = list(_inputs(model, layer))
    if at_once:
        yield Stage(tuple(found for _, _, found in inputs), 0, 0)
        return
    done = Counter[int]()
    for (block, _), alike in itertools.groupby(inputs, key=lambda entry: entry[:2]):
        own = tuple(found for _, _, found in alike)
        yield Stage(own, done[block], done.total() - done[block])
        done[block] += sum(found.weights for found in own)


def _inputs(model: Model, layer: int) -> Iterator[tuple[int, int, Input]]:
    """Every input with the numbers of its block and stage."""
    plans = model.plans(layer)
    groups = [list(same) for _, same in itertools.groupby(model.matrices(layer), key=lambda matrix: matrix.group)]
    first = {block: min(g[0].stage for g in groups if g[0].group.block == block) for block in range(len(plans))}
    for (stage, routed), alike in itertools.groupby(
        groups, key=lambda group: (group[0].stage, group[0].group.expert is not None)
    ):
        every = list(alike)
        for group in every[:1] if routed else every:
            block = group[0].group.block
            plan = plans[block]
            parts = max(len(g) for g in groups if g[0].stage == first[block])
            found = Input(
                name=", ".join(matrix.module for matrix in group) + (f" and {len(every) - 1} more" if routed else ""),
                rows=sum(matrix.rows for matrix in group),
                columns=group[0].columns,
                largest=max(matrix.rows for matrix in group),
                matrices=len(group),
                attention=plan.attention,
                entrance=stage == first[group[0].group.block],
                last=plan.experts is None and group[0].module == f"{plan.module}.{plan.output}",
                # The gate's, as it comes and activated, and the up's; one matrix for both is taken apart once made.
                inner=3 if parts > 1 else 4 if plan.experts is None else 6,
                count=len(every) if routed else 1,
                key=(model.is_mixture(layer), stage),
            )
            yield block, stage, found


@dataclass(frozen=True)
class Choice:
    """How a job is done within its memory."""

    chunk_tokens: int
    place: Place
    """Where activations live."""
    keep_bytes: int
    """An MLP's inner activations are kept if they are no larger, else computed twice."""
    overlap: bool
    """Whether the next layer is read and the last one written while one is pruned; on a CPU the last one is to be
    written before what takes most memory begins."""
    hessians: int | None
    """How many of a stage are gathered in one pass over the tokens; None: all."""


@dataclass(frozen=True)
class Phase:
    """What is resident at one time, in bytes by purpose."""

    name: str
    device: dict[str, int]
    host: dict[str, int]
    key: tuple[bool, int] | None = None
    """That of the stage, of a decoder layer."""


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
    def alone(self) -> dict[tuple[bool, int], str]:
        """Stages with no room for a layer that is still being written: names of their matrices by their keys."""
        if self.on_gpu or not self.choice.overlap:
            return {}
        return {
            phase.key: phase.name.partition(" ")[2] for phase in self.phases if phase.key and BEHIND not in phase.host
        }

    def passes(self, experts: int, everyone: bool) -> int:
        """How often the tokens are gone through for a stage of so many experts, `everyone`'s statistic among theirs."""
        together = self.choice.hessians
        return 1 if together is None else -(-experts // max(together - everyone, 1))

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
    weighted: bool = False,
) -> MemoryPlan:
    """The best way to go within the limits, in bytes: the host's counts the program itself.

    `tokens` are the calibration tokens, `longest` those of the longest sequence. Without a limit the chunks are as the
    settings say, so that results do not depend on the machine, and activations go to disk where the host's `spare`
    bytes do not hold them; only a device whose free `device_spare` bytes are too few makes them smaller. `program` is
    what the process takes before it begins. Raises `BadInput`, naming the phase, where nothing fits. With `chunk`, so
    many tokens go through a layer together, as when the job was begun. `weighted`: whether not all tokens count.
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
        phases, disk = _phases(shape, settings, tokens, longest, choice, on_gpu, program, weighted)
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
    weighted: bool,
) -> tuple[list[Phase], int]:
    method, hidden, size = settings.method, shape.hidden, shape.size
    matched = settings.reconstructs != "layer"
    calibrated = METHODS[method].needs != "nothing"
    chunk = min(choice.chunk_tokens, tokens) if calibrated else 0
    streams = 2 if matched else 1
    converted = on_gpu or size != shape.weight_size  # the layer computes with weights of its own

    def keeps(found: Input) -> bool:
        # A block that is tuned is another by the time that its tokens move on.
        return not settings.epochs and _keeps(found, tokens, size, choice)

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

    algebra = METHODS[method].needs == "hessian"
    kept_once, by_thread = WORKSPACE_BYTES[algebra]
    if working_dtype(torch.bfloat16, on_gpu) == torch.float32:
        kept_once -= UNUSED_BYTES[algebra]
    base_host = {
        "program": program + (CUDA_HOST_BYTES if on_gpu else 0),
        "libraries and heap": FILE_BYTES + kept_once + by_thread * min(torch.get_num_threads(), 8),
    }
    if calibrated:
        base_host["calibration tokens"] = tokens * TOKEN_BYTES
    layers_host = {"weights of the layer": shape.layer_bytes}
    if choice.overlap:
        ahead = max(shape.layer_bytes, shape.head_bytes)
        layers_host |= {"weights read ahead": ahead, BEHIND: shape.layer_bytes}
    if shape.fp8_bytes:
        layers_host["FP8 being read"] = shape.fp8_bytes
    workspace = {"libraries": CUDA_WORKSPACE_BYTES} if on_gpu else {}
    phases: list[Phase] = []
    disk = 0

    def phase(
        name: str,
        stage: Stage,
        kept: int,
        work: dict[str, int],
        beside: bool,
        done: bool = False,
        key: tuple[bool, int] | None = None,
    ) -> None:
        """Enter a phase, with the dense model `beside` the pruned one but for the block at hand if that is `done`."""
        nonlocal disk
        device, host, file = stores(kept) if calibrated else ({}, {}, 0)
        disk = max(disk, file)
        own = shape.layer_bytes // shape.weight_size
        weights = {}
        layer_host = layers_host
        if stage is shape.head:  # nothing of it is on the device until it is solved, and nothing dense beside it
            behind = {BEHIND: shape.layer_bytes} if choice.overlap else {}
            layer_host = {"weights of the layer": shape.head_bytes, **behind}
        elif calibrated and converted:
            weights["weights of the layer" if on_gpu else "converted weights"] = own * size
        if matched and beside and stage is not shape.head:
            # Where nothing is converted, of what is pruned; the rest is the same memory.
            gone = stage.gone + (stage.before + sum(found.weights for found in stage.inputs) if done else 0)
            # An MLP that gets another order is so before any of it is pruned.
            apart = _mlp(shape, stage.inputs[0]) if settings.reorders and _is_mlp(stage) else stage.before
            dense = (own - gone) * size if converted else 0 if done else apart * shape.weight_size
            weights["weights of the dense layer"] = dense
        work = {purpose: count for purpose, count in {**weights, **work, **workspace}.items() if count}
        host = {**base_host, **layer_host, **host}
        host = host if on_gpu else {**host, **work}
        phases.append(Phase(name, {**device, **work} if on_gpu else {}, host, None if stage is shape.head else key))

    if calibrated:
        device, host, _ = stores(0)
        embedding = {"embedding table": shape.embedding_bytes, "a chunk": 2 * chunk * hidden * size}
        phases.append(Phase("embed", device, {**base_host, **host, **embedding}))
    if settings.allocation != "uniform":
        kept = max((i.columns for i in shape.inputs if i.last and _keeps(i, tokens, size, choice)), default=0)
        work = {
            "norms": sum(4 * i.columns * i.count for i in shape.inputs),
            "activations of a chunk": max(_observing(shape, i, chunk, longest, False, on_gpu) for i in shape.inputs),
            "scores of some rows": SCORES * max(min(8 * i.largest * i.columns, SCORE_BYTES) for i in shape.inputs),
            "keys and values": longest * shape.attention.key_values * size if longest > chunk else 0,
        }
        phase("first pass", shape.stages[0], kept, work, beside=False)
    whole = settings.order == "layer"
    for stage in (*shape.stages, *([] if shape.head is None else [shape.head])):
        tied = matched and METHODS[method].needs == "hessian"
        gathered = {GATHERED[METHODS[method].needs]: _gathered(stage, method, tied, choice.hessians)}
        if tied and stage.inputs[-1].last:
            last = stage.inputs[-1]
            gathered["cross product with the dense outputs"] = 4 * last.columns * last.rows
        kept = 0
        if not whole:
            kept = max((i.columns for i in stage.inputs if i.last and keeps(i)), default=0)
        if calibrated:
            passing = max(_observing(shape, found, chunk, longest, tied, on_gpu) for found in stage.inputs)
            widest = max(found.columns for found in stage.inputs)
            counting = chunk * size * (widest + 4 * hidden if tied else widest)
            if not on_gpu:
                counting += min(max(PACKED_BYTES, PACKED_RUN * widest), 4 * widest * chunk)
            if weighted:  # those that count are taken out of all
                counting += chunk * size * (widest + (max(widest, 2 * hidden) if tied else 0))
            if not on_gpu and choice.place == "host":
                # Of what is asked for to keep activations in, a chunk's share is taken once that has passed.
                passing -= 0 if tied else chunk * kept * size
            work, keeping = dict[str, int](), kept
            before = None if whole else _block_before(shape, stage, choice)
            if before is not None and (keeps(before) or not before.attention):
                # The tokens come out of it on their way.
                leaving = chunk * hidden * size
                if keeps(before):
                    keeping = before.columns
                else:
                    leaving = _observing(shape, before, chunk, longest, False, on_gpu)
                passing = max(passing, leaving) + chunk * hidden * size
                counting += chunk * hidden * size
                if converted and not before.attention:
                    work["weights of the block before"] = _mlp(shape, before) * size
            work["activations of a chunk"] = max(passing, counting)
            if longest > chunk and (whole or any(i.attention and not i.entrance for i in stage.inputs)):
                work["keys and values"] = streams * longest * shape.attention.key_values * size
            key = stage.inputs[0].key
            phase(f"observe {stage.name}", stage, keeping, {**gathered, **work}, beside=True, key=key)
        waiting = 0
        for found in stage.inputs:
            if found.count > 1 and matched and not converted:
                waiting = found.weights * shape.weight_size  # of the other experts, beside the dense ones
            work = _solving(found, settings, shape.weight_size, tied, on_gpu)
            work = {**gathered, "pruned before": waiting, **work}
            phase(f"solve {found.name}", stage, kept, work, beside=True, done=found.last, key=found.key)
            if whole and not converted:
                waiting += found.weights * shape.weight_size  # not in the layer before all are pruned
        if settings.epochs and tied and stage.inputs[-1].last:
            work = _tuning(shape, stage, tokens, chunk, longest)
            phase(f"tune {stage.name}", stage, 0, work, beside=True, done=True, key=stage.inputs[0].key)
    if choice.overlap and not on_gpu:
        # The largest stages wait for the layer before to be written, unless it makes next to no difference.
        sized = [(sum(each.host.values()) - program, each) for each in phases]
        most = max(size - bool(each.key) * each.host.get(BEHIND, 0) for size, each in sized)
        largest = {each.key for size, each in sized if each.key and size > WORTH_WAITING * most}
        for each in phases:
            if each.key in largest:
                each.host.pop(BEHIND, None)
    return phases, disk


def _mlp(shape: Shape, found: Input) -> int:
    """Weights of the MLP in a layer as that of an input."""
    return sum(i.weights for i in shape.inputs if not i.attention and i.key[0] == found.key[0])


def _is_mlp(stage: Stage) -> bool:
    """Whether a stage is of an MLP without experts."""
    return not any(found.attention or found.count > 1 for found in stage.inputs)


def _block_before(shape: Shape, stage: Stage, choice: Choice) -> Input | None:
    """The last input of the block that the tokens come out of in the pass that gathers a stage's statistics, if any."""
    if not stage.inputs[0].entrance or any(found.count > 1 for found in stage.inputs):
        return None  # a mixture's first passes have no room to spare
    attention = stage is not shape.head and not stage.inputs[0].attention
    if not (attention or choice.overlap):
        return None  # one layer at a time
    return max((i for i in shape.inputs if i.last and i.attention == attention), key=lambda i: i.columns, default=None)


GATHERED = {"hessian": "Hessian", "norms": "norms", "nothing": "nothing"}


def _gathered(stage: Stage, method: str, tied: bool, together: int | None) -> int:
    """Bytes of what is gathered in one pass over the tokens, at most."""
    shared = [found for found in stage.inputs if found.count == 1]
    sizes = [found.tied(method) if tied else found.statistic(method) for found in shared]
    total = sum(sizes)
    for experts in (found for found in stage.inputs if found.count > 1):
        own = experts.tied(method) if tied else experts.statistic(method)
        # That of all tokens may be with them: the shared experts', or at the entrance what scarce ones blend with.
        everyone = bool(sizes) or experts.entrance
        some = experts.count if together is None else min(experts.count, max(together - everyone, 1))
        total = max([own, *sizes]) * everyone + own * some
    return total


def _keeps(found: Input, tokens: int, size: int, choice: Choice) -> bool:
    return found.attention or tokens * found.columns * size <= choice.keep_bytes


def _observing(shape: Shape, found: Input, chunk: int, longest: int, tied: bool, on_gpu: bool) -> int:
    """Bytes of what exists of a chunk while an input is computed from the hidden states."""
    size, hidden = shape.size, shape.hidden
    own, norm = chunk * hidden * size, chunk * hidden * 8
    if found.entrance:
        return max(norm + own, 2 * own) if tied else max(norm, own)
    if found.attention:
        inside = shape.attention.passing(shape, chunk, longest, on_gpu)
    else:
        inside = chunk * size * (hidden * (3 if found.count > 1 else 1) + found.inner * found.columns)
    if not tied:
        return max(norm, inside)
    kept = chunk * size * found.columns
    if not found.last:
        return max(norm + own, 2 * inside)
    # One model's after the other's, and then what the dense one gives and lacks, in fp32.
    return max(own + kept + inside, 4 * own + kept + 12 * chunk * hidden)


def _solving(found: Input, settings: PruneSettings, size: int, tied: bool, on_gpu: bool) -> dict[str, int]:
    """Bytes of what exists while the matrices of an input are pruned."""
    rows, n, largest = found.rows, found.columns, found.largest * found.columns
    # Solved together; `prune_matrices` takes larger ones one after the other.
    some = min(rows * n, max(largest, TOGETHER))
    stacked = some * size if some > largest else 0
    moved = rows * n * size if on_gpu else 0
    if METHODS[settings.method].needs != "hessian":
        scoring = SCORING * some if METHODS[settings.method].needs == "norms" else MEASURING * largest
        solving = stacked + max(scoring, some * (size + 1))
        return {"fp32 working copies": moved + (rows * n - some) * size + solving}
    one, work = 4 * some, dict[str, int]()
    exactly = not on_gpu and n <= FACTORED_IN_FP64 and (tied or settings.method != "rac")
    exact = EXACT * n * n if exactly else 0
    if settings.method in COPIES:
        solving = COPIES[settings.method][on_gpu] * some
        if settings.method == "rac":
            solving += 2 * n * n + 12 * side_of(n) * n  # what the steps multiply by, and bands of it
        solving = max(solving, REFINED * some + _refining(found, settings, some // n, on_gpu))
    else:
        solving = SWEEPING[on_gpu] * some
    if settings.method == "alps":
        work["H, scaled, its eigenvectors and an inverse"] = 16 * n * n
        solving = max(solving, EIGENSOLVER * n * n)
    matching = chosen = cross = 0
    if tied:
        chosen, cross = one, 0 if found.by_outputs else 4 * largest
        shared = 0 if found.by_outputs else one
        matching = stacked + shared + max(shared, chosen + 3 * 4 * min(some, MATCHED_ROWS * n))
    measuring = rows * n * size + cross
    together = min(found.largest, max(OBJECTIVE_BYTES // (8 * n), 1))  # rows in fp64, times some of H's columns
    products = 8 * together * n + 8 * COLUMNS * (3 * together + 2 * min(COLUMNS, n) + n)
    measuring += max(cross, MEASURING * largest, 24 * together * n, products)
    # One after the other: factor, match, solve, round, and measure what was solved.
    solving = max(exact + stacked, matching, stacked + chosen + solving, chosen + one + some * size)
    by_runs = found.matrices == 1 and found.largest < rows  # of its rows, joined in the end
    joining = 2 * rows * n * size if by_runs else 0
    work["fp32 working copies"] = moved + max((rows * n - some) * size + solving, measuring, joining)
    return work


def _tuning(shape: Shape, stage: Stage, tokens: int, chunk: int, longest: int) -> dict[str, int]:
    """Bytes of what exists while the block that a stage ends is tuned, all in fp32."""
    last, attention = stage.inputs[-1], shape.attention
    weights = stage.before + sum(found.weights for found in stage.inputs)
    batch = min(max(BATCH, tokens // STEPS, longest), chunk)
    between = last.inner * last.columns
    if last.attention:
        between = TUNED_QUERIES * (attention.queries + attention.key_values)
        if attention.open or attention.window is not None:
            between += TUNED_SCORES * min(longest, chunk) * attention.queries // attention.head
    kept = 4 * batch * (TUNED_HIDDEN * shape.hidden + between)
    return {
        "weights in fp32, gradients and their means": TUNED_WEIGHTS * weights,
        "activations of a batch and their gradients": kept,
    }


def _refining(found: Input, settings: PruneSettings, rows: int, on_gpu: bool) -> int:
    """Bytes that the refinement of some rows takes beside what it is given and returns."""
    n = found.columns
    device = torch.device("cuda" if on_gpu else "cpu")
    some = min(rows, ROWS, max(ELEMENTS[device.type] // n, 1)) * n
    kept = math.ceil((1 - settings.sparsity) * n)  # in the mean; the row that keeps most has half as many again
    exactly = REFINING_EXACTLY * min(EXACT_ELEMENTS, some // n * (3 * kept // 2) ** 2)
    in_torch = on_gpu or not native.available()
    each = REFINING * some if in_torch else REFINING_NATIVE * some + 2 * n * n  # and what the steps multiply by
    return each + (exactly if solves_exactly(kept, n, rac.REFINING_STEPS, device) else 0)
