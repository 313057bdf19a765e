"""What `make gpu` does on a machine with a GPU: build in place, test, sanitize, measure; one JSON record of all of it.

The last part is a pruning job on layers of 7B shapes, for which the engine's own packages must be there; where it does
not get done in its time that is recorded, and no failure.

    python benchmarks/gpu.py            # results/gpu-DEVICE-DATE.json; ends non-zero if anything failed

No network, nothing installed: it needs PyTorch with Triton and pytest, and for the CUDA kernels nvcc, pybind11 and
ninja; without those the extension is left out, which the record says. Each part has a time limit, together below eight
minutes; a part that runs out of it is recorded as such and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
#: Seconds. The tools find what `tests` has compiled.
LIMITS = {"build": 75, "tests": 120, **dict.fromkeys(TOOLS, 27), "benchmarks": 110, "streaming": 85}
ENGINE = ("transformers", "safetensors", "pydantic", "yaml", "pyarrow", "tokenizers", "jinja2", "psutil")
AT_ONCE = 4  # processes of the tests: most of their time is compiling


def part(
    name: str, command: list[str], environment: dict[str, str] | None = None, until: float | None = None
) -> dict[str, Any]:
    """Runs a part within its limit: how it ended, how long it took, the end of what it said. ``until``: when it has to
    be done by the clock of `time.perf_counter`, if not only by the limit."""
    print(f"{name}: {' '.join(command)}", flush=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMITS[name] if until is None else max(until - start, 0))
            ended = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMITS[name]} s"
        finally:
            # With all that it started: what compiles or hangs on would slow the parts that follow.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read()
    seconds = round(time.perf_counter() - start, 1)
    print(f"{text[-3000:]}\n{name}: {ended}, {seconds} s\n", flush=True)
    return {"ended": ended, "seconds": seconds, "output": text[-4000:]}


def build() -> dict[str, Any]:
    """The extension in place; without what building takes, why not."""
    missing = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if missing:
        return {"ended": f"left out: {', '.join(missing)} not installed", "seconds": 0, "output": ""}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    found = part("build", command, {"RAC_REQUIRE_NATIVE": "1"})
    said = subprocess.run(
        [sys.executable, "-c", "from rac_kernels import cuda; print(cuda.why_missing())"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    return found | {"cuda_missing": (said.stdout or said.stderr[-1000:]).strip()}


def tests() -> dict[str, Any]:
    """The files of tests/gpu, some at once, and small.py, so that the tools need not compile what it runs."""
    start = time.perf_counter()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
    folder = ROOT / "tests" / "gpu"
    jobs = {file.stem: [*pytest, str(file.relative_to(ROOT))] for file in sorted(folder.glob("test_*.py"))}
    jobs = {"small": [sys.executable, "tests/gpu/small.py"], **jobs}
    until = start + LIMITS["tests"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {label: pool.submit(part, "tests", command, None, until) for label, command in jobs.items()}
        found = {label: job.result() for label, job in running.items()}
    # pytest's 5: nothing to run, as where what a file needs is missing.
    bad = {label: one["ended"] for label, one in found.items() if one["ended"] not in ("passed", "failed with 5")}
    ended = ", ".join(f"{label} {how}" for label, how in bad.items()) or "passed"
    return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "files": found}


def sanitize(tool: str) -> dict[str, Any]:
    """One of compute-sanitizer's tools over every kernel on small shapes, with the errors it counted."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not sanitizer:
        return {"ended": "left out: no compute-sanitizer", "seconds": 0, "output": ""}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "tests/gpu/small.py"]
    found = part(tool, command)
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


def benchmarks() -> dict[str, Any]:
    """All ops on the GPU, with their peaks, errors, times and shares of the limit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "benchmarks/kernels.py", "--device", "cuda", "--repeats", "2", "--out", str(out)]
        found = part("benchmarks", command)
        return found | {"record": json.loads(out.read_text()) if out.exists() else None}


def streaming() -> dict[str, Any]:
    """A pruning job on two layers of 7B shapes."""
    if missing := [name for name in ENGINE if importlib.util.find_spec(name) is None]:
        return {"ended": f"left out: {', '.join(missing)} not installed", "seconds": 0, "output": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "benchmarks/streaming.py", "--device", "cuda", "--layers", "2", "--tokens", "64k"]
        command += ["--length", "8k", "--vocabulary", "16000", "--device-memory", "6GiB", "--out", str(out)]
        found = part("streaming", command, {"TMPDIR": folder})
        if found["ended"].startswith("stopped"):
            found["ended"] = f"left out: {found['ended']}"
        return found | {"record": json.loads(out.read_text()) if out.exists() else None}


def driver() -> str | None:
    """The version of the GPU's driver, if nvidia-smi is there to say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said[0] if said else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the record (benchmarks/results/gpu-DEVICE-DATE.json)")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.UTC)
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu-{short}-{now:%Y-%m-%d}.json"
    record: dict[str, Any] = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "device": name, "torch": torch.__version__}
    record["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    record |= {"cuda": torch.version.cuda, "driver": driver()}
    parts: dict[str, Any] = {}
    record["parts"] = parts
    out.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[], dict[str, Any]]] = {"build": build, "tests": tests}
    runs |= {tool: functools.partial(sanitize, tool) for tool in TOOLS}
    runs |= {"benchmarks": benchmarks, "streaming": streaming}
    for label, run in runs.items():  # written after each, so that a machine taken away leaves what it did
        parts[label] = run()
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")
    bad = [name for name, found in parts.items() if not found["ended"].startswith(("passed", "left out"))]
    print(f"failed: {', '.join(bad)}" if bad else "all parts passed or, where the record says so, were left out")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
