"""Every CUDA file through nvcc, as setup.py calls it, for each architecture: within its registers, without spills."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.cuda.host import ROOT, SOURCES

# Threads that a multiprocessor must have room for, of its 65536 registers: the kernels' launch bounds.
RESIDENT = {"factor_corner": 512, "select": 2 * 256}
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def build_script() -> dict[str, Any]:
    """What setup.py defines, without running a setup."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def test_nvcc(tmp_path: Path) -> None:
    script = build_script()
    cuda = script["find_cuda"](["g++"])
    if isinstance(cuda, str):
        pytest.skip(cuda)
    command = [*cuda.command, "-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}", "-c"]
    jobs = {
        source: subprocess.Popen(
            [*command, source, "-o", tmp_path / f"{source.stem}.o"], stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        for source in SOURCES
    }
    seen = set()
    for job in jobs.values():
        said = job.communicate()[0]
        assert job.returncode == 0, said
        for kernel, part in re.findall(
            r"Compiling entry function '(\w+)' for '(.*?)(?=Compiling entry|\Z)", said, re.S
        ):
            (name,) = (name for name in RESIDENT if name in kernel)
            seen.add((name, part.split("'")[0]))
            (spilled,) = SPILLS.findall(part)
            assert spilled == ("0", "0", "0"), f"{kernel}: {part}"
            registers = int(re.findall(r"Used (\d+) registers", part)[0])
            assert -(-registers // 8) * 8 * RESIDENT[name] <= 65_536, f"{kernel}: {registers} registers"
    assert seen == {(name, f"sm_{number}") for name in RESIDENT for number in script["CAPABILITIES"]}
