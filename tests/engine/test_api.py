"""What Python code is given by `import rac_engine`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
from pathlib import Path
from types import FunctionType

import pytest
import torch

import rac_engine
from rac_engine.recipe.settings import EvalSettings, PruneSettings

ABACUS = Path(__file__).parents[2] / "examples/abacus"


def test_functions_stay_functions_whatever_is_imported():
    for found in pkgutil.walk_packages(rac_engine.__path__, "rac_engine."):
        theirs = found.name == "rac_engine.serve.vllm" and importlib.util.find_spec("vllm") is None  # vLLM imports it
        if not theirs and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    for name in rac_engine.__all__:
        assert isinstance(getattr(rac_engine, name), FunctionType), name


@pytest.mark.parametrize("name", rac_engine.__all__)
def test_signatures_and_docstrings_say_what_is_taken(name):
    function = getattr(rac_engine, name)
    parameters = inspect.signature(function).parameters
    assert "device" in parameters or name == "keep_zeros"  # all others are jobs
    assert not {"args", "options", "kwargs"} & set(parameters)
    assert all(f"        {parameter}: " in function.__doc__ for parameter in parameters)


def test_a_call_leaves_the_environment_and_torch_as_they_were(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    before = dict(os.environ), torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.get_rng_state()
    rac_engine.prune(ABACUS, tmp_path / "out", PruneSettings(method="magnitude", sparsity=0.1))
    after = dict(os.environ), torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.get_rng_state()
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])


def test_pruning_and_then_evaluating(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    made = rac_engine.prune(ABACUS, "out", PruneSettings(method="magnitude", sparsity=0.1))
    settings = EvalSettings(problems=tmp_path / "q.jsonl", max_new_tokens=4)
    for name in ("first.json", "second.json"):
        assert rac_engine.evaluate(made.out, settings, name).summary["problems"] == 1
