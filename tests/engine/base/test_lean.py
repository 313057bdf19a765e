"""A job on a machine without a GPU loads neither Triton nor torch's compiler, and the compiler still works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]

JOB = """
import sys
from rac_engine.cli import main

assert main(sys.argv[1:]) == 0
heavy = ("triton", "sympy", "torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.tensor")
print(*[name for name in (*heavy, "pandas", "scipy", "sklearn") if name in sys.modules])

import torch
from transformers.masking_utils import TransformGetItemToIndex
from transformers.utils.import_utils import is_torch_greater_or_equal

with TransformGetItemToIndex():
    assert torch.arange(3)[torch.tensor(1)] == 1
compiled = torch.compile(lambda x: x + is_torch_greater_or_equal("2.0"), backend="eager", fullgraph=True)
assert compiled(torch.ones(2)).tolist() == [2, 2]
import torch._dynamo.config
assert torch._dynamo.list_backends()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton is loaded")
def test_a_job_loads_no_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    text = tmp_path / "text.txt"
    text.write_text("calibration " * 400)
    words = ["-q", "prune", str(ROOT / "examples/abacus"), str(tmp_path / "out"), "--calibration", f"text:{text}"]
    command = [sys.executable, "-c", JOB, *words, "--tokens", "100", "--method", "sparsegpt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout.splitlines()[-1].strip(), done.stdout
