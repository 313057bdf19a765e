"""The tests of tests/gpu in Triton's interpreter, in a process of its own: it is chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# What is no Triton: the CUDA kernels, which tests/cuda runs on the host, and the driver's streams and pinned memory.
OTHER = {"test_cuda", "test_activations"}
FILES = sorted(file for file in (ROOT / "tests" / "gpu").glob("test_*.py") if file.stem not in OTHER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--confcutdir",
        str(file.parent),
        str(file),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
