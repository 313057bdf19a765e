"""What `make gpu` does on a machine with a GPU: build in place, check, measure, test; one JSON record of all of it.

    python benchmarks/gpu.py --minutes 9 --out DIR    # ends non-zero if anything failed

A machine with a GPU may be lent for minutes. So the parts come in the order of what they are worth: the build, a line
an operation, the three hot steps' times, their tests and those next to them, a pruning job on layers of 7B shapes,
packed products, the other times, the other tests, and compute-sanitizer on the kernels of csrc last. DIR/record.json
is written after each part, what each process says goes to DIR/PART.log at once, and each benchmark adds to its record
after each operation, so that nothing is lost when the machine is taken away. A part that there are no minutes left
for is listed as not reached, which is no failure; one that does not end in its own time is stopped, and the others go
on.

No network, nothing installed: it needs PyTorch with Triton and pytest, and for the CUDA kernels nvcc, pybind11 and
ninja; without those the extension is left out, which the record says. The pruning job needs the engine's own packages.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
HOT = ("hessian", "factor", "sweep")
HOT_TESTS = (*HOT, "select", "cross", "refine", "cuda")
OTHER = ("column_norm", "cross", "select", "refine")
ENGINE = ("transformers", "safetensors", "pydantic", "yaml", "pyarrow", "tokenizers", "jinja2", "psutil")
AT_ONCE = 10  # processes of the tests: most of their time is compiling
LEAST = 8.0  # seconds: with less left no part begins
SAVING = 2.0  # seconds kept back for the record

#: Seconds that a part may take.
LIMITS = {"build": 75.0, "small": 75.0, "hot": 110.0, "hot tests": 160.0, "streaming": 85.0, "packed": 60.0}
LIMITS |= {"benchmarks": 90.0, "tests": 200.0, **dict.fromkeys(TOOLS, 30.0)}

Found = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """Where the record goes, and until when by the clock of `time.perf_counter`."""

    out: Path
    until: float

    def left(self) -> float:
        """Seconds."""
        return self.until - SAVING - time.perf_counter()

    def run(
        self, name: str, command: Sequence[str], label: str = "", environment: dict[str, str] | None = None
    ) -> Found:
        """Runs a process of part `name` within the part's limit and the session's: how it ended, how long it took, the
        end of what it said. All of that goes to a file as it is said, called after the part or by `label`."""
        print(f"{label or name}: {' '.join(command)}", flush=True)
        start, seconds = time.perf_counter(), min(LIMITS[name], self.left())
        log = self.out / f"{(label or name).replace(' ', '-')}.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
                | (environment or {}),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(seconds, 0))
                ended = "passed" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                ended = (
                    f"stopped after {seconds:.0f} s" if seconds == LIMITS[name] else "not done: the minutes were over"
                )
            finally:
                # With all that it started: what compiles or hangs on would slow the parts that follow.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        took = round(time.perf_counter() - start, 1)
        print(f"{text[-3000:]}\n{label or name}: {ended}, {took} s\n", flush=True)
        return {"ended": ended, "seconds": took, "output": text[-4000:]}


Part = Callable[[Session], Found]


def left_out(why: str) -> Found:
    """What the record has of a part that cannot run here."""
    return {"ended": f"left out: {why}", "seconds": 0, "output": ""}


def is_failure(found: Found) -> bool:
    """Whether a part went wrong; to be left out, or not reached in the minutes given, is no failure."""
    return not found["ended"].startswith(("passed", "left out", "not "))


def build(session: Session) -> Found:
    """The extension in place; without what building takes, why not."""
    missing = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if missing:
        return left_out(f"{', '.join(missing)} not installed")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    found = session.run("build", command, environment={"RAC_REQUIRE_NATIVE": "1"})
    said = subprocess.run(
        [sys.executable, "-c", "from rac_kernels import cuda; print(cuda.why_missing())"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    return found | {"cuda_missing": (said.stdout or said.stderr[-1000:]).strip()}


def small(session: Session) -> Found:
    """Each operation once on small shapes: a line an operation of how near it is to fp64."""
    found = session.run("small", [sys.executable, "tests/gpu/small.py"])
    lines = (session.out / "small.log").read_text(errors="replace").splitlines()
    return found | {"lines": [line for line in lines if line.endswith((": right", ": WRONG"))]}


def tests(session: Session, name: str = "tests", some: Sequence[str] | None = None) -> Found:
    """Files of tests/gpu, many at once and within one limit: those of `some`, in that order, or all but HOT_TESTS."""
    start = time.perf_counter()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
    there = {file.stem.removeprefix("test_"): file for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))}
    chosen = [label for label in there if label not in HOT_TESTS] if some is None else [s for s in some if s in there]
    own = Session(session.out, min(session.until, start + LIMITS[name] + SAVING))

    def one(label: str) -> Found:
        if own.left() <= 0:
            return {"ended": "not reached", "seconds": 0, "output": ""}
        return own.run(name, [*pytest, str(there[label].relative_to(ROOT))], f"test {label}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(chosen, pool.map(one, chosen), strict=True))
    for each in found.values():
        # pytest's 5: nothing to run, as where what a file needs is missing.
        each["ended"] = "passed: nothing to run here" if each["ended"] == "failed with 5" else each["ended"]
        if own.until < session.until and each["ended"].startswith("not done"):
            each["ended"] = "stopped at the part's end"
    other = {label: each["ended"] for label, each in found.items() if not each["ended"].startswith("passed")}
    bad = any(map(is_failure, found.values()))
    ended = ", ".join(f"test_{label} {how}" for label, how in other.items())
    ended = ("failed: " if bad else "not done: ") + ended if other else "passed"
    return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "files": found}


def measure(session: Session, name: str, ops: Sequence[str]) -> Found:
    """Some operations on the GPU, with peaks, errors, times and shares of the limit; the record grows by operation."""
    out = session.out / f"{name}.json"
    out.unlink(missing_ok=True)
    options = ["--device", "cuda", "--repeats", "2", "--out", str(out)]
    found = session.run(name, [sys.executable, "benchmarks/kernels.py", *ops, *options])
    return found | {"record": json.loads(out.read_text()) if out.exists() else None}


def streaming(session: Session) -> Found:
    """A pruning job on two layers of 7B shapes in 6 GiB."""
    if missing := [name for name in ENGINE if importlib.util.find_spec(name) is None]:
        return left_out(f"{', '.join(missing)} not installed")
    out = session.out / "streaming.json"
    out.unlink(missing_ok=True)
    work = session.out / "streaming"
    work.mkdir(exist_ok=True)
    command = [sys.executable, "benchmarks/streaming.py", "--device", "cuda", "--layers", "2", "--tokens", "64k"]
    command += ["--length", "8k", "--vocabulary", "16000", "--device-memory", "6GiB", "--out", str(out)]
    try:
        found = session.run("streaming", command, environment={"TMPDIR": str(work)})
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gigabytes, and no fact in them
    return found | {"record": json.loads(out.read_text()) if out.exists() else None}


def sanitize(session: Session, tool: str) -> Found:
    """One of compute-sanitizer's tools over the kernels of csrc on small shapes, with the errors it counted."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        return left_out("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "tests/gpu/small.py", "--csrc"]
    found = session.run(tool, command)
    if refused(found["output"]):
        found["ended"] = f"left out: {tool} does not serve this device"
    return found | {"errors": errors(found["output"])}


def refused(output: str) -> bool:
    """Whether compute-sanitizer says that it cannot check on this device (older than it, newer, or in a container)."""
    return re.search(r"device not supported", output, re.IGNORECASE) is not None


def errors(output: str) -> int | None:
    """How many errors (racecheck: hazards) compute-sanitizer's summary counts; None without a summary."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return int(summary[-1]) if summary else None


def driver() -> str | None:
    """The version of the GPU's driver, if nvidia-smi is there to say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said[0] if said else None


#: What there is to find out, the most valuable first.
PARTS: dict[str, Part] = {
    "build": build,
    "small": small,
    "hot": partial(measure, name="hot", ops=HOT),
    "hot tests": partial(tests, name="hot tests", some=HOT_TESTS),
    "streaming": streaming,
    "packed": partial(measure, name="packed", ops=("packed",)),
    "benchmarks": partial(measure, name="benchmarks", ops=OTHER),
    "tests": tests,
    **{tool: partial(sanitize, tool=tool) for tool in TOOLS},
}


def go(session: Session, record: Found) -> list[str]:
    """All parts in their order, the record written after each. Returns those that failed."""
    file = session.out / "record.json"
    done: dict[str, Found] = {}
    for label, part in PARTS.items():
        if session.left() < LEAST:
            done[label] = {"ended": "not reached", "seconds": 0, "output": ""}
        else:
            try:
                done[label] = part(session)
            except Exception as error:  # a part's mistake costs no other part
                done[label] = {"ended": f"failed: {error!r}", "seconds": 0, "output": ""}
        missing = [name for name in PARTS if name not in done or done[name]["ended"].startswith("not ")]
        whole = record | {"not_reached": missing, "parts": done}
        new = file.with_suffix(".new")
        new.write_text(json.dumps(whole, indent=1) + "\n")
        new.replace(file)  # whoever takes the machine away finds the old one or the new one
    return [label for label, found in done.items() if is_failure(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the record and of what was said (build/gpu-DEVICE-DATE)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which all is over (9)")
    args = parser.parse_args()
    began = time.perf_counter()
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.UTC)
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = (args.out or ROOT / "build" / f"gpu-{short}-{now:%Y-%m-%d}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    record: Found = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "device": name, "torch": torch.__version__}
    record["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    record |= {"cuda": torch.version.cuda, "driver": driver(), "minutes": args.minutes}
    bad = go(Session(out, began + 60 * args.minutes), record)
    missing = json.loads((out / "record.json").read_text())["not_reached"]
    print(f"record: {out / 'record.json'}")
    if missing:
        print(f"not reached, or not done, in {args.minutes:g} minutes: {', '.join(missing)}")
    print(f"failed: {', '.join(bad)}" if bad else "nothing failed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
