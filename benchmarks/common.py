"""What every benchmark shares: data, interleaved timing, limits, the machine's description, table, record and plot.

Times of one process on a shared machine drift, so competitors run in turn (A B C, A B C, …) and are compared by the
median of their per-round ratios. A record names machine, versions, shapes and what was compared; nothing is judged.
"""

from __future__ import annotations

import argparse
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
from peer import LLMCompressor
from torch import Tensor

from rac_kernels import hessian_accumulate_, symmetrize_
from rac_kernels.backends import native
from rac_kernels.measure import roofline
from rac_kernels.ops.limits import Limit

Case = Callable[[], object]
OURS = "rac_kernels"
RESULTS = Path(__file__).parent / "results"


@dataclass
class Measurement:
    """One competitor on one shape of size n: every round's time, and the limit, in seconds."""

    op: str
    shape: str
    n: int
    name: str
    seconds: list[float]
    limit: float
    ratio: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share_of_limit(self) -> float:
        return self.limit / self.median


@dataclass
class Bench:
    """What a benchmark is run with."""

    device: str
    tokens: int
    columns: list[int]
    shapes: list[tuple[int, int]]
    repeats: int
    slow: float
    peaks: roofline.Peaks
    peer: LLMCompressor | None

    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def randn(self, *shape: int) -> Tensor:
        """The same numbers each time, fp32 on the device."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device)

    def activations(self, columns: int, tokens: int | None = None) -> Tensor:
        """bf16 [tokens, columns], their spectrum falling as a power, scaled by column, as trace activations are."""
        generator = torch.Generator().manual_seed(columns)
        rank = min(columns, 512)
        basis = torch.randn(rank, columns, generator=generator) * torch.arange(1, rank + 1)[:, None] ** -0.5
        scale = torch.rand(columns, generator=generator).add(0.1).to(self.device)
        basis = basis.to(self.device)
        tokens = tokens or self.tokens
        x = self.randn(tokens, rank) @ basis + 0.3 * self.randn(tokens, columns)
        return (x * scale).to(torch.bfloat16)

    def gram(self, columns: int, full: bool = False) -> Tensor:
        """H [columns, columns] of as many activations as make it regular; its upper triangle, or all of it."""
        H = torch.zeros(columns, columns, device=self.device)
        hessian_accumulate_(H, self.activations(columns, max(self.tokens, columns)))
        return symmetrize_(H) if full else H

    def measure(
        self,
        op: str,
        shape: str,
        n: int,
        cases: Mapping[str, Case],
        *,
        limit: Limit,
        setup: Callable[[], object] | None = None,
        extra: Mapping[str, dict[str, Any]] | None = None,
    ) -> list[Measurement]:
        """Times the cases in turn, against the limit of the operation on this machine.

        ``ratio`` is how many times ours is faster than each (median over the rounds).
        """
        times = rounds(cases, self.repeats, setup, self.slow)
        least = roofline.limit_seconds(limit, self.peaks)
        found = []
        for name, seconds in times.items():
            ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds, times[OURS], strict=False))
            found.append(Measurement(op, shape, n, name, seconds, least, ratio, (extra or {}).get(name, {})))
        return found


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
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        # Of a library, its name: where it lies is nobody's business.
        "native": {**native.info(), "openmp_runtime": [Path(path).name for path in native.info()["openmp_runtime"]]},
    }


def rounds(
    cases: Mapping[str, Case], repeats: int, setup: Callable[[], object] | None = None, slow: float = 30.0
) -> dict[str, list[float]]:
    """Seconds of every case in every round, the cases taken in turn after one round that is not counted.

    A case that took more than `slow` seconds in the first counted round sits out the others. ``setup`` runs before each
    case, outside the clock (to restore what a case destroys).
    """
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            if times[name] and times[name][0] > slow:
                continue
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


def table(measurements: list[Measurement]) -> str:
    """Plain-text table, a line a competitor."""
    lines = [f"{'op':<12} {'shape':<26} {'competitor':<34} {'median':>11} {'ours faster':>12} {'of limit':>9}"]
    for m in measurements:
        ratio = f"{m.ratio:.2f}x" if m.ratio is not None else ""
        notes = "  ".join(f"{key} {value}" for key, value in m.extra.items())
        time_ = f"{m.median:.3f} s" if m.median >= 0.1 else f"{m.median * 1e3:.3f} ms"
        line = f"{m.op:<12} {m.shape:<26} {m.name:<34} {time_:>11} {ratio:>12} {m.share_of_limit:>9.1%}  {notes}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def record(path: Path, measurements: list[Measurement], **more: Any) -> None:
    """Write the JSON record: the machine, what was measured and every single time."""
    rows = [m.__dict__ | {"median": m.median, "share_of_limit": m.share_of_limit} for m in measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "measurements": rows}, indent=1) + "\n")


def plot(path: Path, measurements: list[Measurement]) -> None:
    """A picture of each op's share of the limit over n, a line a competitor; needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    ops = list(dict.fromkeys(m.op for m in measurements))
    figure, axes = plt.subplots(1, len(ops), figsize=(4 * len(ops), 3.6), squeeze=False, layout="constrained")
    for op, ax in zip(ops, axes[0], strict=True):
        own = [m for m in measurements if m.op == op]
        for name in dict.fromkeys(m.name for m in own):
            best: dict[int, float] = {}
            for m in own:
                if m.name == name:
                    best[m.n] = max(best.get(m.n, 0.0), m.share_of_limit)
            points = sorted(best.items())
            style = {"linewidth": 2.5} if name == OURS else {"linewidth": 1, "linestyle": "--"}
            ax.plot([n for n, _ in points], [share for _, share in points], marker="o", label=name, **style)
        ax.set(title=op, xlabel="n", xscale="log", ylim=(0, None))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("share of the measured limit")
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


Run = Callable[[Bench], list[Measurement]]


def shape(text: str) -> tuple[int, int]:
    """ "1536x8960" → (1536, 8960)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not ROWSxCOLUMNS")
    return int(rows), int(columns)


def main(description: str | None, ops: Mapping[str, Run], choose: bool = False) -> None:
    """The command line of one op's script or, with `choose`, of all of them."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if choose:
        parser.add_argument("ops", nargs="*", help=f"{', '.join(ops)}; all if none is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--columns", type=int, nargs="+", help="n, where one size says it")
    parser.add_argument("--shapes", type=shape, nargs="+", help="ROWSxCOLUMNS, where two do")
    parser.add_argument("--tokens", type=int, help="calibration tokens of a call (8192, on a GPU 16384)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--slow", type=float, help="seconds from which a competitor is timed once (30, on a GPU 2)")
    parser.add_argument("--out", type=Path, help="JSON record to write")
    parser.add_argument("--record", action="store_true", help="write results/kernels-DEVICE-DATE.json")
    parser.add_argument("--plot", type=Path, help="picture of the shares of the limit over n to write (matplotlib)")
    args = parser.parse_args()
    chosen = getattr(args, "ops", None) or list(ops)
    if unknown := [op for op in chosen if op not in ops]:
        parser.error(f"{unknown[0]} is not one of {', '.join(ops)}")
    gpu = args.device.startswith("cuda")
    bench = Bench(
        device=args.device,
        tokens=args.tokens or (16384 if gpu else 8192),
        columns=args.columns or ([3584, 8192, 18944] if gpu else [1536, 8960]),
        shapes=args.shapes or ([(3584, 18944), (18944, 3584)] if gpu else [(8960, 1536), (1536, 8960)]),
        repeats=args.repeats,
        slow=args.slow or (2.0 if gpu else 30.0),
        peaks=roofline.measure_peaks(args.device),
        peer=LLMCompressor.load(),
    )
    if bench.peer is None:
        print("llm-compressor is not installed here: left out (make bench installs it in a folder of its own)")
    print(f"measured peaks, {args.device}: " + ", ".join(f"{k} {v:.3g}" for k, v in bench.peaks.items()))
    out = args.out
    if args.record:
        today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        out = RESULTS / f"kernels-{'gpu' if gpu else 'cpu'}-{today}.json"
    found: list[Measurement] = []
    for op in chosen:
        some = ops[op](bench)
        print(table(some), flush=True)
        found += some
        if out:  # after each op, so that a run that is stopped leaves what it has
            record(out, found, peaks=bench.peaks, tokens=bench.tokens)
    if out:
        print(f"record: {out}")
    if args.plot:
        plot(args.plot, found)


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Add --record, --out, --table and --into, of benchmarks that leave one record and show it in a page."""
    parser.add_argument("--record", action="store_true", help="write the record to benchmarks/results")
    parser.add_argument("--out", type=Path, help="file of the record (default: in WORK)")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table, and do nothing else")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --table: put it into this page")


def record_file(args: argparse.Namespace, name: str) -> Path:
    """The file that a record goes to: the one asked for, a new one of results called `name`, or one in WORK."""
    asked: Path | None = args.out
    if asked is not None:
        return asked
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return RESULTS / f"{name}-cpu-{date}.json" if args.record else Path(args.work) / "record.json"
