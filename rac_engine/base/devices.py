"""The memory of a device that a job may take."""

from __future__ import annotations

import torch

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes


def free_device_memory(device: torch.device, limit: int | None) -> int | None:
    """Bytes of a GPU that are free, or that torch holds in reserve from an earlier job of this process; None on a CPU.

    Raises `BadInput` for a `limit` in bytes (`--device-memory`) that the device cannot have.
    """
    if device.type != "cuda":
        if limit is not None:
            raise BadInput(f"--device-memory is for a GPU, and the job runs on {device}; give --host-memory")
        return None
    available, total = torch.cuda.mem_get_info(device)
    if limit is not None and limit > total:
        raise BadInput(f"--device-memory {format_bytes(limit)}: {device} has {format_bytes(total)}; give no more")
    return available + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
