"""The machine that a job runs on: its device, its memory, and the limits that the job keeps to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from rac_engine.base.devices import free_device_memory
from rac_engine.base.errors import BadInput
from rac_engine.base.process import GPU_ALLOCATOR, resident, set_gpu_allocator
from rac_engine.models import Model
from rac_engine.plan import PROGRAM_BYTES, Machine, Shape, Tokens, plan_memory
from rac_engine.recipe import PruneSettings

_PROGRAM_STEP = 64 << 20


def machine_limits(device: str, device_memory: int | None, host_memory: int | None, begun: int) -> Machine:
    """The memory of the machine, less what others use, and the limits in bytes that were given.

    `begun` are the bytes that this process has already. Raises `BadInput` for limits that do not fit the device.
    """
    on_gpu = torch.device(device).type == "cuda"
    free = free_device_memory(torch.device(device), device_memory)
    # In steps, so that a job that goes on elsewhere on the same machine finds the same plan.
    program = max(PROGRAM_BYTES, -(-begun // _PROGRAM_STEP) * _PROGRAM_STEP)
    return Machine(
        on_gpu=on_gpu,
        device_limit=device_memory,
        host_limit=host_memory,
        device_spare=free,
        host_spare=psutil.virtual_memory().available + begun,
        program=program,
    )


@contextmanager
def allocator_restored() -> Iterator[None]:
    """Put the setting of torch's allocator in the environment back afterwards (see `device_name`)."""
    before = os.environ.get(GPU_ALLOCATOR)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(GPU_ALLOCATOR, None)
        else:
            os.environ[GPU_ALLOCATOR] = before


@contextmanager
def limited_gpu(device: str, limit: int | None) -> Iterator[None]:
    """Hold this process to `limit` bytes of a GPU for a while, and measure its peak from here; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    _, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction((limit or total) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)  # what comes after is not this job's


def require_memory(
    model: Model, settings: PruneSettings, device: str, device_memory: int | None, host_memory: int | None
) -> None:
    """Raise `BadInput` for limits, those of `prune`, in which not even a single token goes through the model."""
    with allocator_restored():
        machine = machine_limits(device_name(device), device_memory, host_memory, resident())
    plan_memory(Shape.of(model, settings, machine.on_gpu), settings, Tokens(1, 1), machine)


def device_name(name: str) -> str:
    """The device by its full name ("cuda:0" for "cuda"); `BadInput` if it is not there."""
    set_gpu_allocator()
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r}: {str(error).splitlines()[0]}; `rac doctor` shows what there is") from None
