"""A call of the library leaves its process as it was; the program's own settings are for programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rac_engine.base.process import peak_memory, prepare_process, resident

ROOT = Path(__file__).parents[3]

LIBRARY = """
import os, random, resource, signal, sys, warnings
import numpy, pyarrow.parquet, torch, transformers  # what they do to their process is theirs
from tests import tiny

torch.set_num_threads(2)
folder, abacus = sys.argv[1:]


def state():
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT")}
    return {
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "limits": limits,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": (torch.get_float32_matmul_precision(), torch.get_default_dtype()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
        "umask": os.umask(0o22),
    }


os.umask(0o22)
before = state()

import importlib, pkgutil
import rac_engine
for module in pkgutil.walk_packages(rac_engine.__path__, "rac_engine."):
    if not module.name.endswith("__main__") and module.name != "rac_engine.serve.vllm":  # which vLLM alone imports
        importlib.import_module(module.name)

with open(f"{folder}/problems.jsonl", "w") as file:
    file.write('{"problem": "Add 2 and 2.", "answer": "4"}')
from rac_engine.recipe import EvalSettings, PruneSettings, TraceSettings
trace = TraceSettings(prompts=f"{folder}/problems.jsonl", tokens=40, samples=1, max_new_tokens=8)
rac_engine.trace(abacus, trace, f"{folder}/traces")
settings = PruneSettings(method="admm", pattern="2:4", tune=1)
made = rac_engine.prune(abacus, f"{folder}/pruned", settings, tiny.calibration([40, 30]), host_memory=8 << 30)
assert any("tuned" in row for row in made.matrices)
asked = EvalSettings(problems=f"{folder}/problems.jsonl", max_new_tokens=4)
rac_engine.evaluate(f"{folder}/pruned", asked, f"{folder}/answers.json")

after = state()
for name in before:
    assert after[name] == before[name], (name, before[name], after[name])
"""


def test_a_library_call_changes_nothing_of_its_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", LIBRARY, str(tmp_path), str(ROOT / "examples/abacus")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_program_sets_what_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"THP_MEM_ALLOC_ENABLE": "0"})
    prepare_process()
    assert os.environ == {
        "THP_MEM_ALLOC_ENABLE": "0",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "GOMP_SPINCOUNT": "1000",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    prepare_process()
    assert "GOMP_SPINCOUNT" not in os.environ
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", {name: "mine"})
        prepare_process()
        assert [value for key, value in os.environ.items() if key.startswith("PYTORCH")] == ["mine"]


def test_memory_is_counted_in_bytes() -> None:
    import psutil

    assert resident() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert peak_memory() >= 0.9 * resident()


KEPT = """
import ctypes, sys
from rac_engine.base import process

if sys.argv[1:]:
    process.give_back_large()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = process.resident()
for _ in range(3):
    piece = libc.malloc(16 << 20)
    ctypes.memset(piece, 1, 16 << 20)
    libc.free(piece)
kept = process.resident() - before
process.trim_memory()
print(kept >> 20, process.resident() - before >> 20)
pieces = [libc.malloc(1 << 20) for _ in range(12)]
for piece in pieces:
    ctypes.memset(piece, 1, 1 << 20)
for piece in reversed(pieces):
    libc.free(ctypes.c_void_p(piece))
print(process.resident() - before >> 20)
"""


@pytest.mark.parametrize("given_back", [False, True])
def test_large_pieces_are_given_back(given_back: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KEPT, *(["yes"] if given_back else [])]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    kept, after, small = map(int, said.split())
    assert (kept < 4) == given_back and after < 4
    assert small >= 8 or not given_back  # pieces of 1 MiB are kept
