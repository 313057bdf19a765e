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

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes
from rac_engine.calibrate import AHEAD, KEEP_BYTES, Place
from rac_engine.models import working_dtype
from rac_engine.plan.costs import (
    CUDA_HOST_BYTES,
    CUDA_WORKSPACE_BYTES,
    FILE_BYTES,
    GATHERED,
    PACKED_BYTES,
    PACKED_RUN,
    PROGRAM_BYTES,
    SCORES,
    TOKEN_BYTES,
    UNUSED_BYTES,
    WORKSPACE_BYTES,
    gathered_bytes,
    observing_bytes,
    solving_bytes,
    tuning_bytes,
)
from rac_engine.plan.shapes import Input, Shape, Stage
from rac_engine.recipe import PruneSettings
from rac_engine.solve import find_method
from rac_kernels.ops.profile import ROWS_BYTES as SCORE_BYTES

BEHIND = "weights written behind"

WORTH_WAITING = 1.02  # times the peak without them

SMALL_CHUNK = 1024  # tokens, fewer than which leave a device idle

SMALLEST_CHUNK = 256


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
    calibrated = find_method(method).needs != "nothing"
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

    algebra = find_method(method).needs == "hessian"
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
            "activations of a chunk": max(
                observing_bytes(shape, i, chunk, longest, False, on_gpu) for i in shape.inputs
            ),
            "scores of some rows": SCORES * max(min(8 * i.largest * i.columns, SCORE_BYTES) for i in shape.inputs),
            "keys and values": longest * shape.attention.key_values * size if longest > chunk else 0,
        }
        phase("first pass", shape.stages[0], kept, work, beside=False)
    whole = settings.order == "layer"
    for stage in (*shape.stages, *([] if shape.head is None else [shape.head])):
        tied = matched and find_method(method).needs == "hessian"
        gathered = {GATHERED[find_method(method).needs]: gathered_bytes(stage, method, tied, choice.hessians)}
        if tied and stage.inputs[-1].last:
            last = stage.inputs[-1]
            gathered["cross product with the dense outputs"] = 4 * last.columns * last.rows
        kept = 0
        if not whole:
            kept = max((i.columns for i in stage.inputs if i.last and keeps(i)), default=0)
        if calibrated:
            passing = max(observing_bytes(shape, found, chunk, longest, tied, on_gpu) for found in stage.inputs)
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
                    leaving = observing_bytes(shape, before, chunk, longest, False, on_gpu)
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
            work = solving_bytes(found, settings, shape.weight_size, tied, on_gpu)
            work = {**gathered, "pruned before": waiting, **work}
            phase(f"solve {found.name}", stage, kept, work, beside=True, done=found.last, key=found.key)
            if whole and not converted:
                waiting += found.weights * shape.weight_size  # not in the layer before all are pruned
        if settings.epochs and tied and stage.inputs[-1].last:
            work = tuning_bytes(shape, stage, tokens, chunk, longest)
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


def _keeps(found: Input, tokens: int, size: int, choice: Choice) -> bool:
    return found.attention or tokens * found.columns * size <= choice.keep_bytes
