"""The memory of a pruning job, and the best way to do it that fits.

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

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes
from rac_engine.calibrate import KEEP_BYTES, Place
from rac_engine.plan.phases import BEHIND, Choice, Machine, Phase, PhasePlanner, Tokens
from rac_engine.plan.shapes import Shape
from rac_engine.recipe import PruneSettings

SMALL_CHUNK = 1024  # tokens, fewer than which leave a device idle

SMALLEST_CHUNK = 256


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
    learning: int = 0
    """Bytes of weights, activations and targets in files while the whole model learns, when those are gone."""

    @property
    def beside(self) -> int:
        """Bytes of the disk that the job takes beside its output, at most."""
        return max(self.disk, self.learning)

    @property
    def device_peak(self) -> int:
        """Most bytes on the device at a time."""
        return max(sum(phase.device.values()) for phase in self.phases)

    @property
    def host_peak(self) -> int:
        """Most bytes resident on the host at a time, the program itself included."""
        return max(sum(phase.host.values()) for phase in self.phases)

    @property
    def alone(self) -> dict[tuple[int, int], str]:
        """Stages with no room for a layer that is still being written: names of their matrices by their keys."""
        if self.on_gpu or not self.choice.overlap:
            return {}
        return {
            phase.key: phase.name.partition(" ")[2] for phase in self.phases if phase.key and BEHIND not in phase.host
        }

    def passes(self, experts: int, everyone: bool) -> int:
        """Passes over the tokens for a stage of so many experts; `everyone`: with the statistic of all tokens."""
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
    tokens: Tokens,
    machine: Machine,
    chunk: int | None = None,
    judged: bool | None = None,
    planner_of: type[PhasePlanner] = PhasePlanner,
) -> MemoryPlan:
    """The best way to go within the machine's limits.

    Without a limit the chunks are as the settings say, so that results do not depend on the machine, and activations go
    to disk where the host's spare bytes do not hold them; only a device whose spare bytes are too few makes them
    smaller. With `chunk`, so many tokens go through a layer together, as when the job was begun, and with `judged`
    matrices are judged or not as they were then. `planner_of` knows the
    job's phases. Raises `BadInput`, naming the phase, where nothing fits.
    """
    best: MemoryPlan | None = None
    free = machine.device_limit is None and machine.host_limit is None
    device_room = machine.device_spare if machine.device_limit is None else machine.device_limit
    host_room = machine.host_spare if machine.host_limit is None else machine.host_limit
    choices = _choices(shape, settings, tokens, machine.on_gpu, fixed=free)
    if free and device_room is not None:
        choices = itertools.chain(choices, _choices(shape, settings, tokens, machine.on_gpu, fixed=False))
    for choice in choices:
        if judged is not None and choice.judged != judged:
            continue
        planner = planner_of(
            shape, settings, tokens, choice if chunk is None else replace(choice, chunk_tokens=chunk), machine
        )
        phases = planner.phases()
        plan = MemoryPlan(
            machine.on_gpu,
            planner.choice,
            phases,
            machine.device_limit,
            machine.host_limit,
            planner.disk,
            planner.learning,
        )
        over = _excess(plan, device_room, host_room)
        if over <= 0:
            return plan
        best = plan if best is None or over < _excess(best, device_room, host_room) else best
    assert best is not None
    if free and device_room is None:
        return best  # no promise was made: the settings decide
    raise BadInput(_too_little(best, device_room, host_room) + planner_of.hint)


def _too_little(plan: MemoryPlan, device_room: int | None, host_room: int | None) -> str:
    """The memory that the nearest plan lacks, in words."""
    if plan.on_gpu and device_room is not None and plan.device_peak > device_room:
        where = f"--device-memory {format_bytes(device_room)}"
        if plan.device_limit is None:
            where = f"the device has {format_bytes(device_room)} free"
        need, phase = plan.device_peak, max(plan.phases, key=lambda phase: sum(phase.device.values()))
    else:
        where = f"--host-memory {format_bytes(host_room or 0)}"
        if plan.host_limit is None:
            where = f"the machine has {format_bytes(host_room or 0)} of memory free"
        need, phase = plan.host_peak, max(plan.phases, key=lambda phase: sum(phase.host.values()))
    return f"{where}: at least {format_bytes(need)} is needed ({phase.name})"


def _excess(plan: MemoryPlan, device: int | None, host: int | None) -> int:
    """Bytes by which what there is, of the device and of the host, is passed, in all."""
    over = 0 if host is None else max(plan.host_peak - host, 0)
    return over if device is None else over + max(plan.device_peak - device, 0)


def _choices(shape: Shape, settings: PruneSettings, tokens: Tokens, on_gpu: bool, fixed: bool) -> Iterator[Choice]:
    """All ways, the fastest first: small chunks cost most, then reading twice, then waiting for the disk.

    Where tokens are held out, those that judge every matrix by them come first, unless that takes more passes.
    """
    most = max(min(settings.chunk_tokens, tokens.count), 1)
    halves = [settings.chunk_tokens] if fixed else [most]
    while not fixed and halves[-1] > SMALLEST_CHUNK:
        halves.append(max(halves[-1] // 2, SMALLEST_CHUNK))
    experts = max(found.count for found in shape.inputs)
    together: list[int | None] = [None]
    while experts > 1:
        experts = -(-experts // 2)
        together.append(experts)
    places: list[Place] = ["device", "host", "disk"] if on_gpu and not fixed else ["host", "disk"]
    judging = (True, False) if tokens.held and settings.solver.needs == "hessian" else (False,)
    for small, judged in itertools.product((False, True), judging):  # chunks that waste what computes come last
        for chunk in halves:
            if (chunk < SMALL_CHUNK and chunk != halves[0]) != small:
                continue
            for overlap in (True, False):
                for each in together[:1] if judged else together:
                    for place in places:
                        for keep in (KEEP_BYTES, 0):
                            yield Choice(chunk, place, keep, overlap, each, judged)
