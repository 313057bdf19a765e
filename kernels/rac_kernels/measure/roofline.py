"""The peaks of a machine, and the time that an operation's ``limit()`` takes at them: it stands beside every timing.

Peaks are measured here and now, not read in a brochure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rac_kernels.ops.limits import Limit

Peaks = dict[str, float]

"""FLOP/s of a matrix product by dtype ("bf16", "fp16", "fp32") and of an fp32 product made of three of TF32 ("tf32x3");
bytes/s of a copy, read and written ("bytes")."""

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def measure_peaks(device: torch.device | str = "cpu", seconds: float = 0.5) -> Peaks:
    """Measure `Peaks` on a device: the best of several square matrix products for each dtype, and of several copies.

    `seconds`: about how long to measure each. "fp32" is without TF32, as torch's default is; "tf32x3", by which factor
    and sweep reach fp32's errors on a GPU, is a third of torch's product in TF32. On a CPU, which has no TF32, that is
    the fp32 figure, and so is "fp16": torch's fp16 products are emulated there at a crawl, and the kernels here take
    fp16 through fp32.
    """
    device = torch.device(device)
    size, elements = (8192, 1 << 28) if device.type == "cuda" else (1536, 1 << 25)
    peaks = {}
    for dtype, name in NAMES.items():
        if dtype == torch.float16 and device.type == "cpu":
            continue
        a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
        out = torch.empty_like(a)
        peaks[name] = 2.0 * size**3 / _best(_product(a, b, out), device, seconds)
    peaks.setdefault("fp16", peaks["fp32"])
    if device.type == "cpu":
        peaks["tf32x3"] = peaks["fp32"]
    else:
        a, b, out = torch.randn(3, size, size, device=device).unbind()
        with _tf32():
            peaks["tf32x3"] = 2.0 * size**3 / _best(_product(a, b, out), device, seconds) / 3
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    peaks["bytes"] = 2.0 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    return peaks


def limit_seconds(limit: Limit, peaks: Peaks) -> float:
    """The time below which the work cannot be done: by its arithmetic or by the bytes moved, whichever takes longer."""
    return max(limit.flops / peaks[limit.peak], limit.moved / peaks["bytes"])


def share_of_limit(seconds: float, limit: Limit, peaks: Peaks) -> float:
    """Share of the measured limit that was reached in `seconds`: 1 is all of it."""
    return limit_seconds(limit, peaks) / seconds


def _product(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.matmul(a, b, out=out)


@contextmanager
def _tf32() -> Iterator[None]:
    """torch's fp32 products in TF32."""
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    place.fp32_precision = "tf32"
    try:
        yield
    finally:
        place.fp32_precision = before


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of one run, among as many as fit into `seconds` after one that is not counted."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return best
