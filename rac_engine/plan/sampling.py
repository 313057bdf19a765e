"""The plan of sampling a job's tokens from the model, for `rac plan`."""

from __future__ import annotations

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes, format_count, format_seconds
from rac_engine.models import Model, working_dtype
from rac_engine.plan.phases import Machine
from rac_engine.traces import Room, SamplingPlan, SamplingShape, Sequences, plan_sampling

_ROWS = 64  # as by default


def sampled(model: Model, longest: int, machine: Machine) -> SamplingPlan | str:
    """The plan of sampling sequences of up to `longest` tokens; or why it does not fit."""
    room = Room(machine.device_limit, machine.host_limit, program=machine.program)
    shape = SamplingShape.of(model, working_dtype(model.dtype, machine.on_gpu))
    try:
        return plan_sampling(shape, room, Sequences(_ROWS, longest), machine.on_gpu)
    except BadInput as error:
        return str(error)


def sampling_lines(plan: SamplingPlan | str, tokens: int) -> list[str]:
    """Lines on tokens a second, time, memory and what a step moves."""
    if isinstance(plan, str):
        return ["", f"Sampling does not fit: {plan}"]
    peaks = [f"{format_bytes(plan.device_peak)} of the device"] if plan.on_gpu else []
    peaks.append(f"{format_bytes(plan.host_peak)} of the host")
    moved = [
        (plan.linked, "of weights over the link"),
        (plan.read, "of weights from disk"),
        (plan.moved, "of keys and values over the link"),
    ]
    steps = [f"{format_bytes(size)} {what}" for size, what in moved if size]
    lines = ["", f"Sampling {format_count(tokens)} tokens: {plan.describe()}", f"  memory: {', '.join(peaks)}"]
    if steps:
        lines.append(f"  a step moves {', '.join(steps)}")
    seconds = format_seconds(tokens / plan.rate)
    return [*lines, f"  about {format_count(plan.rate)} tokens/s at most, {seconds}"]
