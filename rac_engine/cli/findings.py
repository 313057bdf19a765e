"""Findings of `rac doctor`: what this machine has for pruning and lacks, what that costs, and how to mend it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rac_engine.base.sizes import format_bytes
from rac_engine.jobs import surroundings
from rac_engine.jobs.surroundings import cpu_name, versions

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "pyyaml", "pyarrow", "jinja2")
_BUILD_AGAIN = "build it again: pip install --no-build-isolation . in the source folder"


@dataclass(frozen=True)
class Finding:
    """A line of the doctor: `ok`, `note` (works, but something is slower or missing) or `fail` (nothing works)."""

    what: str
    status: Literal["ok", "note", "fail"]
    found: str
    costs: str = ""
    mend: str = ""


def examine() -> list[Finding]:
    """Look at everything. Never raises: what cannot be looked at is a finding."""
    looks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("machine", _machine),
        ("torch", _torch),
        ("native extension", _native),
        ("GPU", _gpus),
        ("triton", _triton),
        ("nvcc", _nvcc),
    ]
    findings = []
    for what, look in looks:
        try:
            findings += look()
        except Exception as error:
            findings.append(Finding(what, "note", f"could not be looked at ({type(error).__name__}: {error})"))
    return findings


def render(findings: list[Finding]) -> str:
    """Findings as aligned text: a sign, what, what was found; costs and what to do below."""
    signs = {"ok": "✓", "note": "!", "fail": "✗"}
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.status]} {finding.what.ljust(width)}  {finding.found}")
        for label, text in (("costs", finding.costs), ("to do", finding.mend)):
            if text:
                lines.append(f"  {'':{width}}  {label}: {text}")
    bad = [finding for finding in findings if finding.status == "fail"]
    notes = [finding for finding in findings if finding.status == "note"]
    if bad:
        lines.append(f"\nNot ready: {', '.join(finding.what for finding in bad)}.")
    elif notes:
        lines.append(f"\nReady; could be better: {', '.join(finding.what for finding in notes)}.")
    else:
        lines.append("\nReady.")
    return "\n".join(lines)


def _python() -> list[Finding]:
    missing = [name for name in NEEDED if surroundings.version_of(name) is None]
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name not in ("triton", "pyarrow"))
    if missing:
        return [Finding("python", "fail", found, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")]
    return [Finding("python", "ok", found), _math_verify()]


def _math_verify() -> Finding:
    version = surroundings.version_of("math-verify")
    if version:
        return Finding("math-verify", "ok", version)
    cost = "answers are compared as text and numbers: \\frac{1}{2} is not found equal to 0.5"
    return Finding("math-verify", "note", "missing", cost, "pip install math-verify")


def _machine() -> list[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        free = min(free, int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    disk = shutil.disk_usage(".")
    return [
        Finding("processor", "ok", f"{cpu_name()}, {cores} core{'s' * (cores != 1)} for this process"),
        Finding("memory", "ok", f"{format_bytes(total)}, {format_bytes(free)} free"),
        Finding("disk", "ok", f"{format_bytes(disk.free)} free here ({Path.cwd()})"),
    ]


def _torch() -> list[Finding]:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    if threads > cores:
        return [
            Finding(
                "torch",
                "note",
                f"{threads} threads on {cores} cores",
                "threads wait for each other",
                f"set OMP_NUM_THREADS={cores}",
            )
        ]
    return [
        Finding("torch", "ok", f"{threads} thread{'s' * (threads != 1)}, {torch.backends.cpu.get_cpu_capability()}")
    ]


def _native() -> list[Finding]:
    from rac_kernels.backends import native

    info: dict[str, Any] = native.info()
    found = []
    if info["available"]:
        runtimes = info["openmp_runtime"]
        found.append(
            Finding(
                "native extension",
                "ok",
                f"{info['isa']} of {', '.join(info['isas'])}; {info['threads']} threads; built by {info['build']}",
            )
        )
        found.append(
            Finding("OpenMP", "ok", ", ".join(runtimes) or "none loaded")
            if len(runtimes) <= 1
            else Finding(
                "OpenMP",
                "note",
                f"{len(runtimes)} runtimes in one process: {', '.join(runtimes)}",
                "two thread pools compete for the cores",
                f"in this environment {_BUILD_AGAIN}",
            )
        )
    else:
        found.append(
            Finding(
                "native extension",
                "note",
                f"missing: {info['why_missing']}",
                "on the CPU, Hessian, factor and sweep run in plain torch: as good, but several times slower",
                f"install a C++ compiler (apt install g++); {_BUILD_AGAIN}",
            )
        )
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler and shutil.which(compiler):
        found.append(Finding("compiler", "ok", _first_line(compiler, "--version")))
    else:
        costs = "" if info["available"] else "the native extension cannot be built"
        found.append(Finding("compiler", "note", "none (g++, c++, clang++, $CXX)", costs, "apt install g++"))
    return found


def _gpus() -> list[Finding]:
    import torch

    from rac_kernels.backends import cuda
    from rac_kernels.backends import gpu as triton_kernels

    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            what = f"{gpu.name}, {format_bytes(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
            found.append(Finding(f"GPU {i}", "ok", what))
            if why := triton_kernels.why_unusable(torch.device("cuda", i)):
                costs = "everything on it runs in plain torch: as good, but slower, and in more memory"
                found.append(Finding(f"kernels on GPU {i}", "note", f"not used: {why}", costs))
                continue
            if why := cuda.why_unusable(torch.device("cuda", i)):
                found.append(
                    Finding(
                        f"CUDA kernels on GPU {i}",
                        "note",
                        f"not used: {why}",
                        "factor and selection run in Triton's kernels alone: as good, but slower",
                        f"with nvcc and a driver for its CUDA version, {_BUILD_AGAIN}",
                    )
                )
            else:
                found.append(Finding(f"CUDA kernels on GPU {i}", "ok", "factor's corners and selection"))
        return found
    costs = "everything runs on the CPU: right for models of some millions of parameters, slow for billions"
    if torch.version.cuda is None:
        return [
            Finding(
                "GPU",
                "note",
                "this torch is built for the CPU only",
                costs,
                "with an NVIDIA GPU, install a CUDA build of torch",
            )
        ]
    return [Finding("GPU", "note", "none that torch can see", costs, "check the driver with nvidia-smi")]


def _triton() -> list[Finding]:
    version = surroundings.version_of("triton")
    if version:
        return [Finding("triton", "ok", f"{version} (used on GPUs)")]
    return [Finding("triton", "note", "missing", "no GPU kernels; the CPU path needs none", "pip install triton")]


def _nvcc() -> list[Finding]:
    nvcc = shutil.which("nvcc") or next(filter(os.path.exists, ("/usr/local/cuda/bin/nvcc",)), None)
    if nvcc:
        return [Finding("nvcc", "ok", f"{_last_line(nvcc, '--version')} ({nvcc})")]
    return [Finding("nvcc", "note", "missing", "no CUDA sources are compiled here; Triton kernels need none", "")]


def _first_line(*command: str) -> str:
    return _output(command).splitlines()[0]


def _last_line(*command: str) -> str:
    return _output(command).splitlines()[-1]


def _output(command: tuple[str, ...]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
