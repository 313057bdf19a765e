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
# What is no Triton: the CUDA kernels, which tests/cuda runs on the host, and what the engine does on a GPU.
OTHER = {"test_cuda", "test_activations", "test_prune"}
FILES = sorted(file for file in (ROOT / "tests" / "gpu").glob("test_*.py") if file.stem not in OTHER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
def test_interpreted() -> None:
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", str(ROOT / "tests" / "gpu")]
    command = [sys.executable, "-m", "pytest", *options, *map(str, FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
