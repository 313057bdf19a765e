"""Memory and speed of sampling, worked out from shapes, and the way that fits.

A model is sampled from as a whole where it fits. Else its decoder layers are streamed (see `layers`): the more
sequences are in flight, the more tokens pay for a reading of the weights, and the more their keys and values take.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rac_engine.base.devices import free_device_memory
from rac_engine.base.errors import BadInput
from rac_engine.base.process import resident
from rac_engine.base.sizes import format_bytes
from rac_engine.checkpoint import find_format
from rac_engine.models import CALL_TOKENS, Model, workspace
from rac_engine.traces.layers import Placement

PROMPT_TOKENS = 8192
"""Tokens of prompts that join in one step, or one prompt that is longer."""

LINK = 25e9
"""Bytes a second from page-locked memory to a GPU, over 16 lanes of PCIe 4."""

DISK = 1e9
"""Bytes a second that are read from a checkpoint's files."""

_LIBRARIES = 48 << 20  # of what libraries and the heap keep for themselves once they compute

_CUDA_HOST = 2 << 30  # of CUDA's context and libraries in the host's memory, and on the device

_CUDA_DEVICE = 96 << 20

_PROMPT_STEPS = (PROMPT_TOKENS, 4096, 2048, 1024, 512, 256)

_MOST_ROWS = 256

_FREE = 0.9  # of what is free, which others may want too, where no limit was given


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second of what computes, and of the ways to it."""

    flops: float = 2e14
    memory: float = 2e12
    link: float = LINK
    disk: float = DISK


CPU_RATES = Rates(flops=2e11, memory=2e10)


@dataclass(frozen=True)
class Room:
    """The memory that sampling has: limits that a user gave, and what is free. None: unknown, or no limit."""

    device_limit: int | None = None
    host_limit: int | None = None
    device_free: int | None = None
    host_free: int | None = None
    program: int = 0
    """Bytes of the host that the process has already."""

    @classmethod
    def here(cls, device: torch.device, device_limit: int | None, host_limit: int | None) -> Room:
        """The room on this machine. Raises `BadInput` for a limit that the device cannot have."""
        import psutil

        begun, free = resident(), free_device_memory(device, device_limit)
        return cls(device_limit, host_limit, free, psutil.virtual_memory().available + begun, begun)

    @property
    def limited(self) -> bool:
        """Whether a user gave a limit."""
        return self.device_limit is not None or self.host_limit is not None

    @property
    def device(self) -> int | None:
        """Bytes of the device that may be taken."""
        if self.device_limit is not None or self.device_free is None:
            return self.device_limit
        return int(_FREE * self.device_free)

    @property
    def host(self) -> int | None:
        """Bytes of the host that may be taken, the process included."""
        if self.host_limit is not None or self.host_free is None:
            return self.host_limit
        return int(_FREE * self.host_free)


@dataclass(frozen=True)
class SamplingShape:
    """A model, as far as memory and time of sampling depend on it, in bytes of the dtype that it is computed in."""

    layers: tuple[int, ...]
    """Bytes of the weights of each decoder layer."""
    around: int
    """Bytes of embeddings, final norm and lm_head."""
    cached: int
    """Bytes of keys and values of a token, in all layers."""
    largest_cached: int
    """Bytes of those in the layer with the most."""
    state: int
    """Bytes of the recurrent states of a sequence."""
    token: int
    """Bytes of what exists of a token on its way through a layer."""
    recurrent: int
    """Bytes of what exists of one in a recurrent mixer."""
    vocabulary: int
    heads: int
    reading: int
    """Bytes beside the layer that is read, until it is converted."""
    size: int
    """Bytes of an element."""
    flops: float
    """Operations for a token, but for attention's."""

    def fits(self, free: int | None) -> bool:
        """Whether all weights do."""
        return free is None or sum(self.layers) + self.around <= free

    @classmethod
    def of(cls, model: Model, dtype: torch.dtype) -> SamplingShape:
        """The shape of a model that is computed in `dtype`."""
        infos, config, family = model.checkpoint.tensors, model.config, model.family
        size = dtype.itemsize
        elements = [[infos[name].nbytes // infos[name].dtype.itemsize for name in model.tensor_names(n)]
                    for n in range(model.layers)]  # fmt: skip
        layers = tuple(size * sum(each) for each in elements)
        table = infos[family.embedding].shape[0] * model.hidden_size
        around = table * size * (1 if config.tie_word_embeddings else 2)
        cached = [size * _cached(model, number) for number in range(model.layers)]
        mixers = [mixer for plan, mixer in model.mixers() if plan.recurrent]
        works = [workspace(mixer, size) for mixer in mixers]
        recurrent = sum(any(plan.recurrent for plan in model.plans(n)) for n in range(model.layers))
        widest = max(matrix.rows for matrix in model.prunable())
        widest = max(widest, *(matrix.columns for matrix in model.prunable()))
        stored = max(sum(infos[name].nbytes for name in model.tensor_names(n)) for n in range(model.layers))
        converted = dtype != model.dtype or find_format(model.checkpoint.config) is not None
        converted |= any(model.is_mixture(n) for n in range(model.layers))
        weights = sum(m.rows * m.columns * m.group.share for m in model.prunable())
        return cls(
            layers=layers,
            around=around,
            cached=sum(cached),
            largest_cached=max(cached),
            state=recurrent * 2 * max((work.state for work in works), default=0),
            token=size * (8 * model.hidden_size + 4 * widest) + 8 * model.hidden_size,
            recurrent=max((work.token for work in works), default=0),
            vocabulary=infos[family.embedding].shape[0],
            heads=int(config.num_attention_heads),
            reading=stored if converted else max((max(each) * size for each in elements), default=0),
            size=size,
            flops=2.0 * (weights + table),
        )


def _cached(model: Model, number: int) -> int:
    """Elements of keys and values that a layer keeps of a token."""
    infos, config = model.checkpoint.tensors, model.config
    plan = next((plan for plan in model.plans(number) if plan.attention), None)
    if plan is None:
        return 0
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):  # they are kept as they were made of the latent
        keys = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return heads * (keys + int(config.v_head_dim))
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or model.hidden_size // heads)
    home = f"{model.family.layers}{number}.{plan.module}."
    key, value = (infos.get(f"{home}{name}.weight") for name in ("k_proj", "v_proj"))
    keys = key_heads * width if key is None else key.shape[0]
    return keys + (keys if value is None else value.shape[0])


@dataclass(frozen=True)
class SamplingPlan:
    """A way to sample and what it takes. On a CPU everything is the host's."""

    on_gpu: bool
    streamed: bool
    placement: Placement
    rows: int
    """Sequences in flight, where each becomes as long as it may."""
    longest: int
    """Tokens of a sequence that may be."""
    prompt_tokens: int
    """Tokens of prompts that join in one step."""
    cache_on_host: bool
    cache: int
    """Bytes that keys, values and states may take."""
    device: dict[str, int]
    """Bytes on the device by purpose."""
    host: dict[str, int]
    """Bytes of the host by purpose."""
    linked: int
    """Bytes of weights that go to the GPU in a step."""
    read: int
    """Bytes of weights that are read from disk in a step."""
    moved: int
    """Bytes of keys and values that go to the GPU in a step, of sequences half as long as they may be."""
    seconds: float
    """Of a step, about."""
    layers: int
    why: str = ""

    @property
    def device_peak(self) -> int:
        """Most bytes on the device at a time."""
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        """Most bytes of the host at a time, the program included."""
        return sum(self.host.values())

    @property
    def rate(self) -> float:
        """Tokens a second, about."""
        return self.rows / self.seconds

    def describe(self) -> str:
        """What is done and why, in a line."""
        flight = f"{self.rows} sequences of up to {self.longest:,} tokens in flight"
        if not self.streamed:
            return f"the whole model is in memory; {flight}"
        kept, where = self.placement.kept, "on the device" if self.on_gpu else "in memory"
        parts = [f"{kept} of {self.layers} layers stay {where}"]
        if self.placement.host:
            parts.append(f"{self.placement.host} in the host's memory")
        if left := self.layers - kept - self.placement.host:
            parts.append(f"{left} are read from disk in every step")
        cache = ", their keys and values in the host's memory" if self.cache_on_host else ""
        return f"layers are streamed, {self.why}: {', '.join(parts)}; {flight}{cache}"


@dataclass(frozen=True)
class Sequences:
    """What is to be sampled, as far as memory depends on it."""

    rows: int
    """Sequences in flight, at most."""
    longest: int
    """Tokens of one, prompt and answer together, at most."""
    prompt: int = 1
    """Tokens of the longest prompt, as far as that is known."""


def plan_sampling(
    shape: SamplingShape, room: Room, asked: Sequences, on_gpu: bool, rates: Rates | None = None
) -> SamplingPlan:
    """The quickest way to sample that fits. Raises `BadInput`, with the least that is needed, where none does."""
    rates = rates or (Rates() if on_gpu else CPU_RATES)
    best: SamplingPlan | None = None
    least: SamplingPlan | None = None
    for rows, prompts, ahead, on_host in _ways(asked, on_gpu):
        plan = _placed(shape, room, Sequences(rows, asked.longest), prompts, ahead, on_host, on_gpu, rates)
        if _fits(plan, room):
            if best is None or plan.rate > 1.001 * best.rate:
                best = plan
        elif least is None or _excess(plan, room) < _excess(least, room):
            least = plan
    if best is not None:
        return best
    assert least is not None
    raise BadInput(_too_little(least, room))


def _ways(asked: Sequences, on_gpu: bool) -> Iterator[tuple[int, int, bool, bool]]:
    """Sequences in flight, tokens of prompts in a step, whether layers are read ahead, and the cache on the host."""
    rows = [asked.rows]
    while rows[-1] > 1:
        rows.append(rows[-1] * 3 // 4 if rows[-1] > 8 else rows[-1] - 1)
    steps = [step for step in _PROMPT_STEPS if step >= min(asked.prompt, PROMPT_TOKENS)]
    if asked.prompt > PROMPT_TOKENS:
        steps = [asked.prompt]
    for each, step in itertools.product(rows, steps):
        for ahead in (True, False):
            for on_host in (False, True) if on_gpu else (False,):
                yield each, step, ahead, on_host


def _placed(
    shape: SamplingShape,
    room: Room,
    asked: Sequences,
    prompts: int,
    ahead: bool,
    on_host: bool,
    on_gpu: bool,
    rates: Rates,
) -> SamplingPlan:
    """The plan with as many layers kept as fit beside all else."""
    rows, longest, count = asked.rows, asked.longest, len(shape.layers)
    cache = rows * (longest * shape.cached + shape.state)
    growing = 2 * rows * longest * shape.largest_cached
    tokens = min(prompts, rows * longest) + rows
    computing = {
        "embeddings and lm_head": shape.around,
        "activations of a step": tokens * shape.token + min(tokens, max(CALL_TOKENS, rows)) * shape.recurrent,
        "logits": 6 * 4 * rows * shape.vocabulary,
        "scores of attention": rows * longest * (8 * shape.heads + 8),
    }
    device, host = dict[str, int](), {"program": room.program, "libraries": _LIBRARIES}
    where = device if on_gpu else host
    where.update(computing)
    if on_gpu:
        device["libraries"] = _CUDA_DEVICE
        host["CUDA"] = _CUDA_HOST
    (host if on_host else where)["keys, values and states"] = cache
    where["keys and values of a layer, while they are moved"] = growing
    host["a layer while it is read"] = shape.reading
    free = room.device if on_gpu else room.host
    left = None if free is None else free - sum(where.values())
    kept = count if left is None or sum(shape.layers) <= left else _first(shape.layers, left, 2 if ahead else 1)
    streamed, largest = shape.layers[kept:], max(shape.layers[kept:], default=0)
    # One streamed layer alone is the one that comes next as well.
    buffers = (2 if on_gpu or ahead else 1) * largest
    where["weights that stay"] = sum(shape.layers[:kept])
    where["weights that come and go"] = buffers
    held = 0
    if on_gpu and streamed:
        staged = 2 * largest
        host_left = None if room.host is None else room.host - sum(host.values())
        held = len(streamed)
        if host_left is not None and sum(streamed) > host_left:
            held = _first(streamed, host_left, 2)
        host["weights in page-locked memory"] = sum(streamed[:held]) + (staged if held < len(streamed) else 0)
    read, linked = (sum(streamed[held:]), sum(streamed)) if on_gpu else (sum(streamed), 0)
    moved = rows * longest // 2 * shape.cached if on_host else 0
    computed = max(
        rows * shape.flops / rates.flops,
        (sum(shape.layers) + shape.around // 2 + rows * longest // 2 * shape.cached) / rates.memory,
    )
    brought = max(read / rates.disk, linked / rates.link)
    seconds = (max(computed, brought) if ahead else computed + brought) + moved / rates.link
    return SamplingPlan(
        on_gpu,
        bool(streamed),
        Placement(kept, held, ahead),
        rows,
        longest,
        prompts,
        on_host,
        cache,
        device,
        host,
        linked,
        read,
        moved,
        seconds,
        count,
        _why(sum(shape.layers) + shape.around, room, on_gpu),
    )


def _first(layers: tuple[int, ...], room: int, buffers: int) -> int:
    """How many of the first layers fit beside `buffers` times the largest of the others."""
    kept = 0
    while kept < len(layers) - 1 and sum(layers[: kept + 1]) + buffers * max(layers[kept + 1 :]) <= room:
        kept += 1
    return kept


def _why(weights: int, room: Room, on_gpu: bool) -> str:
    size, limit = format_bytes(weights), room.device_limit if on_gpu else room.host_limit
    name = "--device-memory" if on_gpu else "--host-memory"
    free = room.device if on_gpu else room.host
    within = f"{name} {format_bytes(limit)}" if limit is not None else f"the {format_bytes(free or 0)} that are free"
    return f"as {size} of weights and what they work on do not fit {within}"


def _excess(plan: SamplingPlan, room: Room) -> int:
    over = 0 if room.host is None else max(plan.host_peak - room.host, 0)
    return over if room.device is None or not plan.on_gpu else over + max(plan.device_peak - room.device, 0)


def _fits(plan: SamplingPlan, room: Room) -> bool:
    return _excess(plan, room) == 0


def _too_little(plan: SamplingPlan, room: Room) -> str:
    """The memory that the nearest plan lacks, in words."""
    if plan.on_gpu and room.device is not None and plan.device_peak > room.device:
        name, given, limit, need = "--device-memory", room.device, room.device_limit, plan.device_peak
        free = f"the device has {format_bytes(given)} free"
    else:
        given, limit, need = room.host or 0, room.host_limit, plan.host_peak
        name, free = "--host-memory", f"the machine has {format_bytes(given)} of memory free"
    where = free if limit is None else f"{name} {format_bytes(given)}"
    return (
        f"{where}: at least {format_bytes(need)} is needed to sample one sequence of {plan.longest:,} tokens, a layer "
        "at a time; lower max_new_tokens, or give more"
    )
