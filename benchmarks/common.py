"""What every benchmark shares: interleaved timing, the machine's description, a table, a JSON record.

Times of one process on a shared machine drift, so competitors run in turn (A B C, A B C, …) and are compared by the
median of their per-round ratios. A record names machine, versions, shapes and what was compared; nothing is judged.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Case = Callable[[], object]
RESULTS = Path(__file__).parent / "results"


@dataclass
class Measurement:
    """One competitor on one shape: ``seconds`` holds every round's time; ``flops`` what the mathematics needs."""

    op: str
    shape: str
    name: str
    seconds: list[float]
    flops: float = 0.0
    ratio: float | None = None
    share_of_limit: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def machine() -> dict[str, Any]:
    """Processor, accelerator, threads and versions, as found."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "llmcompressor", "numpy", "rac-engine"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    from rac_kernels import native

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "native": native.info(),
    }


def rounds(
    cases: Mapping[str, Case], repeats: int, setup: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Seconds of every case in every round, the cases taken in turn after one round that is not counted.

    ``setup`` runs before each case, outside the clock (to restore what a case destroys).
    """
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            if setup:
                setup()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            case()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def measure(
    op: str,
    shape: str,
    cases: Mapping[str, Case],
    *,
    ours: str,
    flops: float,
    peak: float | None = None,
    repeats: int = 3,
    setup: Callable[[], object] | None = None,
    extra: dict[str, dict[str, Any]] | None = None,
) -> list[Measurement]:
    """Time the cases in turn. ``ratio`` is how many times ``ours`` is faster than each (median over the rounds)."""
    times = rounds(cases, repeats, setup)
    found = []
    for name, seconds in times.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds, times[ours], strict=True))
        share = flops / statistics.median(seconds) / peak if peak else None
        found.append(Measurement(op, shape, name, seconds, flops, ratio, share, (extra or {}).get(name, {})))
    return found


def table(measurements: list[Measurement]) -> str:
    """Plain-text table, a line a competitor."""
    lines = [f"{'op':<10} {'shape':<26} {'competitor':<34} {'median':>10} {'ours faster':>12} {'of limit':>9}"]
    for m in measurements:
        share = f"{m.share_of_limit:.0%}" if m.share_of_limit is not None else ""
        ratio = f"{m.ratio:.2f}x" if m.ratio is not None else ""
        notes = "  ".join(f"{key} {value}" for key, value in m.extra.items())
        line = f"{m.op:<10} {m.shape:<26} {m.name:<34} {m.median:>8.3f} s {ratio:>12} {share:>9}  {notes}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def record(path: Path, measurements: list[Measurement], **more: Any) -> None:
    """Write the JSON record: the machine, what was measured and every single time."""
    rows = [m.__dict__ | {"median": m.median} for m in measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "measurements": rows}, indent=1) + "\n")
    print(f"record: {path}")
