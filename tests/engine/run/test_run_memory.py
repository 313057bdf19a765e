"""A whole job in less memory than the weights of its model: sampling, pruning and evaluation, streamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rac_engine.checkpoint import Checkpoint
from tests import tiny
from tests.engine.plan.test_memory import deepened
from tests.engine.plan.test_memory import run as process

ABACUS = Path(__file__).parents[3] / "examples/abacus"

LIMIT = 1200 << 20

RUN = """
import sys
from rac_engine.cli.app import main
words = ["run", sys.argv[1], sys.argv[2], "--device", "cpu", "--host-memory", sys.argv[3], "--quiet"]
code = main(words)
from rac_engine.base.process import peak_memory
print(code, peak_memory())
"""

RECIPE = """
model: model
trace: {prompts: prompts.jsonl, tokens: 20, samples: 1, max_new_tokens: 2, batch_size: 8}
prune: {method: wanda, sparsity: 0.5}
evaluate: {problems: prompts.jsonl, limit: 1, max_new_tokens: 1}
"""


def test_32_layers_go_through_a_whole_run_in_less_memory_than_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ABACUS)
    four = tiny.save(
        tmp_path / "four",
        shard_size="1GB",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=1024,
        intermediate_size=6144,
        num_hidden_layers=4,
        num_attention_heads=8,
        initializer_range=0.02,
        dtype=torch.bfloat16,
    )
    model = deepened(four, tmp_path / "model", times=8)
    shutil.rmtree(four)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ABACUS / name, model / name)
    lines = [json.dumps({"problem": f"Add {n} and {n}.", "answer": str(2 * n)}) for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    weights = sum(info.nbytes for info in Checkpoint.open(model).tensors.values())
    assert weights > LIMIT
    said = process(RUN, tmp_path / "recipe.yaml", tmp_path / "out", str(LIMIT), limited=True)
    code, peak = map(int, said.split()[-2:])
    with capsys.disabled():
        print(f"\nweights {weights:,}, limit {LIMIT:,}, peak {peak:,} bytes")
    assert code == 0
    assert peak <= LIMIT
    for results in ("dense", "pruned"):
        notes = json.loads((tmp_path / f"out/rac/eval/{results}.json").read_text())["notes"]
        assert any(note.startswith("layers are streamed") for note in notes)
