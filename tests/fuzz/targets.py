"""Files from strangers, each with the code that reads it: what is tried, from which seeds, and how it is judged.

An input is fine if it is taken, or refused by `BadInput`, which the command line prints as one line with exit code 2.
Any other exception, a file written, or memory that grows is a finding.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.formats import find_format
from rac_engine.checkpoint.header import read_header
from rac_engine.checkpoint.quantized import presented
from rac_engine.checkpoint.reader import INDEX, Checkpoint
from rac_engine.checkpoint.tensors import pieces_of, read_tensor
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.evaluation.problems import load_problems
from rac_engine.evaluation.results import load_evaluation
from rac_engine.jobs.journal import records_of
from rac_engine.models.model import Model
from rac_engine.recipe.files import load_recipe
from rac_engine.recipe.settings import PruneSettings
from rac_engine.report.page import render
from rac_engine.traces.calibration import load_calibration
from rac_engine.traces.prompts import load_prompts
from rac_engine.traces.tokenizer import load_tokenizer
from tests import tiny
from tests.engine.outputs import evaluation

ABACUS = Path(__file__).parents[2] / "examples/abacus"
MEMORY = 512 << 20
"""What trying inputs may add to the process's peak."""


@dataclass(frozen=True)
class Target:
    """A kind of file: where it is put, seeds, and what reads it.

    `command` is a command line that comes to it and ends with 0 or 2, if there is one.
    """

    name: str
    file: Path
    seeds: list[bytes]
    read: Callable[[], object]
    command: list[str]


def make_targets(folder: Path) -> dict[str, Target]:
    """Everything that is tried, with its files in `folder`."""
    tokenizer = load_tokenizer(ABACUS)
    model = tiny.save(folder / "model", shard_size="40KB", num_hidden_layers=1, vocab_size=len(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ABACUS / name, model / name)
    single = folder / "single"
    single.mkdir()
    (single / "config.json").write_bytes((model / "config.json").read_bytes())
    coded = folder / "coded"
    coded.mkdir()
    (coded / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": _QUANTIZED[0]}))
    spoilt = folder / "spoilt"
    spoilt.mkdir()
    for file in model.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    lines = folder / "calibration.jsonl"
    table = folder / "calibration.parquet"
    recipe = folder / "recipe.yaml"
    problems = folder / "problems.jsonl"
    journal = folder / "journal.jsonl"
    record = b'{"a": 1}'
    made = folder / "made"
    bare = tiny.save(folder / "bare", num_hidden_layers=1)
    for file in bare.glob("*token*"):
        file.unlink()  # loading it would take most of the time
    prune(bare, made, PruneSettings(method="magnitude"))
    rac = made / "rac"
    answers = rac / "eval" / "dense.json"
    answers.parent.mkdir()
    given = json.dumps(evaluation(0.9, 30, 0.1, count=4)).encode()
    answers.write_bytes(given)

    def header() -> None:
        for info in read_header(single / "model.safetensors"):
            read_tensor(info)

    def quantized() -> None:
        shards = {"model.safetensors": read_header(coded / "model.safetensors")}
        taken, refused = 0, BadInput("")
        for config in _QUANTIZED:
            form = find_format({"quantization_config": config})
            assert form is not None
            try:
                for info in presented(coded, form, shards)[0].get("model.safetensors", []):
                    for _ in pieces_of(info):
                        pass
                taken += 1
            except BadInput as error:
                refused = error
        if not taken:
            raise refused

    def calibration(source: Path) -> Callable[[], object]:
        return lambda: load_calibration(str(source), tokens=1000, tokenizer=tokenizer)

    def questions() -> None:
        load_prompts(problems)
        load_problems(problems)

    def output() -> None:
        render(made)
        verify(made)

    def files() -> None:
        if problems := verify(made).problems:
            raise BadInput(problems[0])

    def baseline() -> None:
        load_evaluation(answers)
        render(made)

    plan, dry = ["plan", str(spoilt)], ["prune", str(model), str(folder / "out"), "--dry-run", "--calibration"]
    targets = [
        Target("index", spoilt / INDEX, [(model / INDEX).read_bytes()], lambda: Checkpoint.open(spoilt), plan),
        Target(
            "config",
            model / "config.json",
            [(model / "config.json").read_bytes()],
            lambda: Model.open(Checkpoint.open(model)),
            ["plan", str(model)],
        ),
        Target("header", single / "model.safetensors", _headers(), header, ["plan", str(single)]),
        Target("quantized", coded / "model.safetensors", _coded(), quantized, ["plan", str(coded)]),
        Target("parquet", table, _tables(), calibration(table), [*dry, str(table)]),
        Target("jsonl", lines, [_records()], calibration(lines), [*dry, str(lines)]),
        Target(
            "recipe",
            recipe,
            [_RECIPE.encode()],
            lambda: load_recipe(recipe),
            [*dry, str(lines), "--recipe", str(recipe)],
        ),
        Target(
            "problems",
            problems,
            [_PROBLEMS.encode()],
            questions,
            ["eval", str(folder / "none"), "--problems", str(problems), "--out", str(folder / "answers.json")],
        ),
        Target("journal", journal, [b"", _line(record) * 3], lambda: records_of(journal), []),
        Target("metrics", rac / "metrics.jsonl", [(rac / "metrics.jsonl").read_bytes()], output, []),
        Target("manifest", rac / "manifest.json", [(rac / "manifest.json").read_bytes()], files, []),
        Target("answers", answers, [given], baseline, []),
    ]
    return {target.name: target for target in targets}


def _line(text: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(text).hexdigest()[:32].encode() + b" " + text + b"\n"


def _headers() -> list[bytes]:
    def entry(start: int, stop: int, shape: list[int], dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}

    made = []
    for entries, size in (
        ({"a": entry(0, 24, [2, 6], "BF16"), "b": entry(24, 32, [2], "F32"), "__metadata__": {"format": "pt"}}, 32),
        ({"x": entry(0, 8, [8], "U8"), "empty": entry(8, 8, [0, 3], "F64")}, 8),
        ({}, 0),
    ):
        text = json.dumps(entries).encode()
        made.append(struct.pack("<Q", len(text)) + text + bytes(size))
    return made


_QUANTIZED: tuple[dict[str, Any], ...] = (
    {"quant_method": "fp8", "weight_block_size": [2, 2]},
    {"quant_method": "mxfp4"},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}}},
    },
)


def _coded() -> list[bytes]:
    """Weights that each of `_QUANTIZED` reads some of."""
    parts: list[tuple[str, str, list[int], int]] = [
        ("a.weight", "F8_E4M3", [3, 4], 12),
        ("a.weight_scale_inv", "F32", [2, 2], 16),
        ("b.experts_blocks", "U8", [2, 3, 1, 16], 96),
        ("b.experts_scales", "U8", [2, 3, 1], 6),
        ("c.weight_scale", "BF16", [2, 2], 8),
        ("c.weight_packed", "I32", [2, 2], 16),
        ("d.weight", "I8", [2, 3], 6),
        ("d.weight_scale", "F16", [2, 1], 4),
    ]
    entries, at = dict[str, Any](), 0
    for name, dtype, shape, size in parts:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + size]}
    text = json.dumps(entries).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(index % 251 for index in range(at))]


def _tables() -> list[bytes]:
    made = []
    for options in ({"compression": "zstd"}, {"compression": None, "use_dictionary": False}, {"version": "1.0"}):
        rows = {"prompt_token_ids": [[5, 6], [7]], "completion_token_ids": [[8, 9, 10], []], "text": ["a", "b"]}
        kinds = pa.schema(
            [
                ("prompt_token_ids", pa.list_(pa.int32())),
                ("completion_token_ids", pa.list_(pa.int32())),
                ("text", pa.string()),
            ]
        )
        target = io.BytesIO()
        pq.write_table(pa.table(rows, schema=kinds), target, **options)
        made.append(target.getvalue())
    return made


def _records() -> bytes:
    records: list[dict[str, Any]] = [
        {"prompt_token_ids": [4, 5], "completion_token_ids": [6, 7]},
        {"input_ids": [4, 5, 6, 7], "num_prompt_tokens": 2, "num_decode_tokens": 2, "text": "1 + 2"},
        {"prompt": "1 + 2", "completion": "6"},
        {"messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "<think> 5"}]},
        {"text": "3 = 3"},
        {"problem": "7"},
        {
            "messages": [
                {"role": "user", "content": "4"},
                {"role": "assistant", "content": "5", "reasoning_content": "6"},
            ]
        },
        {"problem": "7", "generations": ["8", "9"], "correctness": [True, False], "uuid": "u"},
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "3"},
        {"prompt": "[{'role': 'user', 'content': '1'}]", "response": "2", "thinking": "3"},
        {"prompt_token_ids": [5], "outputs": [{"token_ids": [6], "text": "7"}, {"text": "8"}]},
        {"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]], "labels": [[-100, -100, 6]]},
        {"prompt": "1", "text": "2", "output_ids": [5, 6], "meta_info": {}},
        {
            "doc": {"query": "1", "choices": ["2"], "gold_index": 0},
            "model_response": {"text": ["3"], "reasonings": ["4"]},
        },
        {
            "custom_id": "1",
            "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]},
            "response": {"status_code": 200, "body": {"choices": [{"message": {"content": "2", "reasoning": "3"}}]}},
        },
    ]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


_PROBLEMS = """\
{"problem": "1 + 2", "answer": "3", "id": "a", "kind": "sum"}
{"prompt": "4", "answer": 2.5}
{"messages": [{"role": "user", "content": "4"}], "answer": "7"}
{"question": "4", "choices": {"text": ["5", "6"], "label": ["A", "B"]}, "answerKey": "B"}
{"Question": "4", "Correct Answer": "5", "Incorrect Answer 1": "6", "Record ID": "r"}
{"prompt": [{"role": "user", "content": "4"}], "reward_model": {"ground_truth": "['7']"}}
{"query": "4", "options": ["5", "6"], "final_answer": [1, 2], "solution": "so \\boxed{1}"}
"""
_RECIPE = """\
model: model
name: traces-50
trace: {prompts: prompts.jsonl, tokens: 1M, samples: 2, temperature: 0.6}
calibration:
  source: "text:file.txt"   # a comment
  part: all
prune: {method: sparsegpt, pattern: 2:4, dense: ['model\\.layers\\.0\\..*'], damping: 1e-2}
evaluate: &e {problems: q.jsonl, limit: 10}
compare:
  - {name: other, prune: {sparsity: 0.6, pattern: null}}
"""

_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_armed = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _armed:
        return
    if event in _WRITES or event.startswith(("subprocess.", "os.exec", "os.posix_spawn", "socket.connect")):
        raise AssertionError(f"{event} {args} while reading")
    if event == "open" and isinstance(args[2], int) and args[2] & 3 and args[0] != "/dev/null":
        raise AssertionError(f"{args[0]} opened for writing while reading")
    if event == "pickle.find_class":
        raise AssertionError(f"{event} {args} while reading")


@contextmanager
def nothing_is_written() -> Iterator[None]:
    """While this lasts, whatever writes, runs a program or unpickles fails."""
    global _armed
    _armed = True
    try:
        yield
    finally:
        _armed = False


def install_watch() -> None:
    """Make `nothing_is_written` work; for the rest of the process, as Python's audit hooks are."""
    sys.addaudithook(_watch)


def attempt(target: Target, data: bytes) -> bool:
    """Whether the input is taken; False if it is refused as it should be. Anything else is raised."""
    target.file.write_bytes(data)
    try:
        with nothing_is_written():
            target.read()
    except BadInput as error:
        said = str(error)
        assert said
        return False
    return True


def peak_memory() -> int:
    """Bytes that this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Mutation by structure: bytes that are JSON get other values in their places, others other bytes.

_HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("inf")),
    *("", "\0", "..", "../x.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors", "\ud800", "𝒳" * 50, "%s{0}"),
    *(
        [],
        {},
        [[]],
        [None],
        [[[[[[[[]]]]]]]],
        {"": {}},
        {"__class__": 1},
        ["a"] * 300,
        "9" * 5000,
        [1 << 70],
        [-1, 2.5],
    ),
    *("F8_E4M3", "I64", "BOOL", "float16", "auto", "llama", "gemma3_text", "text", "2:4", "1e999", "nan", "[A-", "<b>"),
]


def mutate(draw: random.Random, target: Target) -> bytes:
    """An input near one of the target's seeds."""
    data = draw.choice(target.seeds)
    kind = draw.random()
    if target.name == "header" and kind < 0.7:
        size = struct.unpack("<Q", data[:8])[0]
        text = _mutate_json(draw, data[8 : 8 + size])
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    if target.name in ("index", "config", "manifest", "answers") and kind < 0.7:
        return _mutate_json(draw, data)
    if target.name in ("jsonl", "problems", "journal", "metrics") and kind < 0.7 and data:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        if target.name == "journal":
            lines[at] = _line(_mutate_json(draw, b'{"job": {"a": 1}}')).rstrip(b"\n")
        else:
            lines[at] = _mutate_json(draw, lines[at])
        return b"\n".join(lines) + b"\n" * draw.randrange(2)
    if target.name == "recipe" and kind < 0.5:
        return _mutate_recipe(draw)
    return _mutate_bytes(draw, data)


def _mutate_json(draw: random.Random, text: bytes) -> bytes:
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        value = _replace(draw, value)
    made = json.dumps(value).encode()
    if draw.random() < 0.1 and made.startswith(b'{"'):  # a key twice
        made = made[:-1] + b", " + made[1 : made.find(b",") if b"," in made else -1] + b"}"
    return made


def _replace(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        act = draw.random()
        if act < 0.1:
            return {name: child for name, child in value.items() if name != key}
        if act < 0.2:
            return {**value, str(draw.choice(_HOSTILE)): value[key]}
        return {**value, key: _replace(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _replace(draw, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, 1 << 32, -(1 << 32), 1 << 62))
    return draw.choice(_HOSTILE)


def _mutate_recipe(draw: random.Random) -> bytes:
    import yaml

    value = yaml.safe_load(_RECIPE)
    for _ in range(draw.choice((1, 1, 2))):
        value = _replace(draw, value)
    made: bytes = json.dumps(value).encode() if draw.random() < 0.5 else yaml.safe_dump(value).encode()
    return made


_BITS = [
    *(
        b"\0",
        b"\xff",
        b"{",
        b"[",
        b'"',
        b"\n",
        b"\r",
        b"\t",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/object/apply:os.system ",
    ),
    *(
        b"- ",
        b": ",
        b"? ",
        b"%",
        b"@",
        b"`",
        b"|",
        b">",
        b"#",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b"1e9",
        b"0x",
    ),
]


def _mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(made) + 1)
        act = draw.random()
        if act < 0.35 and made:
            made[at % len(made)] ^= 1 << draw.randrange(8)
        elif act < 0.5 and made:
            made[at % len(made)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif act < 0.65:
            made[at:at] = draw.choice(_BITS)
        elif act < 0.8:
            del made[at : at + draw.choice((1, 2, 8, 100))]
        elif act < 0.9:
            made[at:at] = made[at : at + draw.choice((4, 30, 200))]
        else:
            del made[at:]
    return bytes(made)
