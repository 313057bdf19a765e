"""config.json in the form that published checkpoints have, not the one in which transformers 5 writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rac_engine.cli.app import main
from tests import tiny

ABACUS = Path(__file__).parents[3] / "examples/abacus"
ROPES: dict[str, dict[str, Any]] = {
    "llama": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "qwen3": {"attn_factor": 0.8782488562869419, "factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
    "deepseek_v3": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
}
"""`rope_scaling` of Llama 3.x and R1-Distill-Llama, of R1-0528-Qwen3-8B, and of DeepSeek-R1, with a shorter context."""


def published(folder: Path, family: str) -> Path:
    """A tiny checkpoint whose config.json has `rope_theta`, `rope_scaling` and `torch_dtype`, as the hub's have."""
    tokenizer = AutoTokenizer.from_pretrained(ABACUS)
    tiny.save(folder, family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.02)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ABACUS / name, folder / name)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps({**config, "rope_theta": 500000.0, "rope_scaling": ROPES[family]}, indent=2))
    return folder


@pytest.mark.parametrize("family", ROPES)
def test_every_command_takes_a_published_config(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = published(tmp_path / "model", family)
    config = (model / "config.json").read_bytes()
    Path("p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    Path("recipe.yaml").write_text(
        "model: model\ntrace: {prompts: p.jsonl, tokens: 60, samples: 2, max_new_tokens: 8}\n"
        "prune: {method: sparsegpt}\nevaluate: {problems: p.jsonl, max_new_tokens: 4}\n"
    )
    for words in (
        "plan model",
        "trace model --prompts p.jsonl --tokens 60 --max-new-tokens 8 --out traces",
        "prune model pruned --calibration traces --method sparsegpt",
        "eval pruned --problems p.jsonl --max-new-tokens 4 --out answers.json",
        "verify pruned --source model",
        "run recipe.yaml all",
        "verify all --source model",
    ):
        assert main(words.split()) == 0, (words, capsys.readouterr().err)
    assert Path("pruned/config.json").read_bytes() == config == Path("all/config.json").read_bytes()
