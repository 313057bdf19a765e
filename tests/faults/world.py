"""A folder with everything a job needs, as small as can be, and the jobs that are made to fail in it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests import tiny

ABACUS = Path(__file__).parents[2] / "examples/abacus"


@dataclass(frozen=True)
class Job:
    """A command line whose result is the file or folder `out`."""

    name: str
    argv: list[str]
    out: str
    disk: bool = False
    """Whether the activations are to live on disk, whatever the plan would have."""


def make_world(folder: Path) -> list[Job]:
    """Write model, prompts, problems, calibration and recipe into `folder`, and say which jobs run on them there."""
    tokenizer = AutoTokenizer.from_pretrained(ABACUS)
    tiny.save(
        folder / "model",
        "qwen2",
        vocab_size=len(tokenizer),
        shard_size="6KB",
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ABACUS / name, folder / "model" / name)
    problems = [{"problem": f"Add {n} and {n}.", "answer": 2 * n, "id": n} for n in range(5)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    (folder / "recipe.yaml").write_text(
        """\
model: model
name: main
trace: {prompts: problems.jsonl, tokens: 60, samples: 1, max_new_tokens: 8, batch_size: 1}
prune: {block_size: 8, chunk_tokens: 32}
evaluate: {problems: problems.jsonl, limit: 2, max_new_tokens: 4, batch_size: 1}
compare:
  - {name: text, calibration: {source: "text:text.txt", tokens: 40, sequence_length: 20}}
"""
    )
    prune = "prune model pruned --calibration text:text.txt --sequence-length 30 --block-size 8 --chunk-tokens 32"
    sample = "--max-new-tokens 8 --batch-size 1"
    return [
        Job("prune", prune.split(), "pruned"),
        Job("disk", [*prune.replace("pruned", "spilled").split()], "spilled", disk=True),
        Job("trace", f"trace model --prompts problems.jsonl --tokens 80 --out traces {sample}".split(), "traces"),
        Job("eval", f"eval model --problems problems.jsonl --out answers.json {sample}".split(), "answers.json"),
        Job("run", ["run", "recipe.yaml", "all"], "all"),
    ]


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of a result by file name, with the times it took left out, and what is made of those."""
    found = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    files = {str(path.relative_to(out.parent)): path for path in found}
    return {name: _timeless(name, path) for name, path in files.items()}


def _timeless(name: str, path: Path) -> bytes:
    data = path.read_bytes()
    if name.endswith((".html", ".parquet", ".safetensors")):
        # A report is made of the other files, of which it shows times too.
        return data if not name.endswith(".html") else b""
    if name.endswith("metrics.jsonl"):
        lines = [json.loads(line) for line in data.splitlines()]
        return json.dumps([_without_times(line) for line in lines if line["type"] != "end"]).encode()
    if name.endswith(("journal.jsonl", "steps.jsonl")):
        return json.dumps([_without_times(json.loads(line.partition(b" ")[2])) for line in data.splitlines()]).encode()
    if name.endswith("manifest.json"):
        timed = ("metrics.jsonl", "journal.jsonl", "steps.jsonl")
        files = json.loads(data)["files"]
        return json.dumps({name: "" if name.endswith(timed) else entry for name, entry in files.items()}).encode()
    if re.search(r"rac/eval/.*\.json$|^answers\.json$", name):
        return json.dumps(_without_times(json.loads(data))).encode()
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        # Nor what is made of times: the SHA-256 of files that hold some.
        return {
            key: "" if re.search(r"(metrics|journal)\.jsonl$|^rac/eval/", key) else _without_times(child)
            for key, child in value.items()
            if key != "seconds"
        }
    return [_without_times(child) for child in value] if isinstance(value, list) else value
