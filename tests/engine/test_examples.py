"""What ships in `examples/`: the model, its problems and its recipe are as their cards and the README say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, GenerationConfig

from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.models.model import Model
from rac_engine.recipe.files import load_recipe
from rac_engine.traces.questions import question_of
from rac_engine.traces.records import read_records
from rac_engine.traces.template import render

EXAMPLES = Path(__file__).parents[2] / "examples"
PROBLEMS = {name: EXAMPLES / "problems" / f"{name}.jsonl" for name in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def problems() -> ModuleType:
    """examples/problems.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("example_problems", EXAMPLES / "problems.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def asked(split: str) -> list[str]:
    return [str(json.loads(line)["problem"]) for line in PROBLEMS[split].read_text().splitlines()]


def test_the_model_is_what_its_card_promises() -> None:
    folder = EXAMPLES / "abacus"
    checkpoint = Checkpoint.open(folder)
    model = Model.open(checkpoint)
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert model.layers >= 6 and len(checkpoint.shards) >= 2 and (folder / "model.safetensors.index.json").is_file()
    assert {str(info.dtype) for info in checkpoint.tensors.values()} == {"torch.bfloat16"}
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 16 << 20
    assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
    card = (folder / "README.md").read_text()
    assert f"{sum(info.nbytes for info in checkpoint.tensors.values()) // 2:,} parameters" in card


def test_prompts_are_short_and_open_a_thought() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "abacus")
    for split, file in PROBLEMS.items():
        prompts = [render(tokenizer, question_of(record, where), where) for where, record in read_records(file)]
        assert max(map(len, prompts)) <= 40, split
        assert str(tokenizer.decode(prompts[0])).rstrip().endswith("<think>")


def test_no_problem_is_in_two_splits(problems: ModuleType) -> None:
    found = {split: asked(split) for split in PROBLEMS}
    assert not set(found["calibration"]) & set(found["evaluation"])
    for split, prompts in found.items():
        assert len(set(prompts)) == len(prompts) >= 200
        assert {problems.split_of(prompt) for prompt in prompts} == {split}
    training = problems.problems("train", 0)
    assert {problems.split_of(next(training).prompt) for _ in range(200)} == {"train"}


def test_the_demos_recipe_loads_and_compares_like_with_like() -> None:
    recipe = load_recipe(EXAMPLES / "demo.yaml")
    assert recipe.trace and recipe.evaluate
    assert recipe.trace.prompts == PROBLEMS["calibration"] and recipe.evaluate.problems == PROBLEMS["evaluation"]
    assert recipe.prune.sparsity == 0.5 and recipe.prune.method == "sparsegpt"
    names = {variant.name: variant for variant in recipe.compare}
    assert {f"{calibration}-sparsegpt-{sparsity}" for calibration in ("text", "prompt") for sparsity in (50, 60)} | {
        "traces-sparsegpt-60",
        "traces-admm-50",
    } <= names.keys()
    for variant in recipe.compare:
        tokens = (variant.calibration or recipe.calibration).tokens or recipe.trace.tokens
        assert tokens == recipe.trace.tokens, variant.name
