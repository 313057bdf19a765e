"""Checkpoints as the hub has them, made from what is known of the published ones: `layouts` has a folder for each.

A layout's folder holds its config.json, generation_config.json and tokenizer_config.json with the keys, spellings and
values of the published files, sizes aside; `tensors.txt`; and whatever else lies beside the weights there. None of that
is derived from the engine or from transformers: it is what they are held against.

`tensors.txt` begins with the names of the weight files, `files 3 model-%05d-of-%06d.safetensors`, with `from 0`
behind where they are not counted from 1. Each line behind is a tensor, with its dtype in safetensors' words and its
shape (or `=` and the tensor that it is a copy of), and `pruned` at the end if it is one of those that a pruning job
prunes. A range `{0-2}` or a list `{q,k}` in a name stands for a tensor each. Lines beginning with # are remarks; `also
FILE` is a file of weights in another form, which no index names.

The weights are random; block-scaled FP8 is the value and the scale of each block that `weight_scale_inv` has, and
MXFP4, `_blocks` and `_scales`, stands for what transformers makes of it; `weight_packed` holds four-bit integers,
eight in a word. Every layout has the same byte-level BPE of 272 tokens, with the special tokens of its
tokenizer_config.json at their ids. A chat template is named there by its file in `templates`, and put in its place.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HOME = Path(__file__).parent
LAYOUTS = sorted(folder.name for folder in (HOME / "layouts").iterdir())
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
}
MERGES = "Ġ t|h e|i n|Ġ a|e r|o n|Ġt he|r e|a t|Ġ s|e n|o r|Ġ w|i s|n d|i t"
SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
PACKED, BESIDE = "_packed", ("weight_scale", "weight_shape")


@dataclass(frozen=True)
class Published:
    """A checkpoint in the form of a published one."""

    name: str
    path: Path
    plain: Path
    """The same checkpoint, with bf16 in the place of quantized weights; the same folder if there are none."""
    tensors: dict[str, Tensor]
    """What the weights are, in bf16 where they are quantized, by the names that they have on disk in bf16."""
    pruned: frozenset[str]
    """Names of the tensors that a pruning job prunes."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return json.loads((self.path / "config.json").read_text())

    @property
    def beside(self) -> dict[str, bytes]:
        """The files that are no weights, but for the card, by their names."""
        files = (file for file in self.path.rglob("*") if file.is_file())
        names = {file.relative_to(self.path).as_posix(): file for file in files}
        return {
            name: file.read_bytes()
            for name, file in names.items()
            if not name.endswith((".safetensors", ".safetensors.index.json")) and name != "README.md"
        }


def publish(name: str, folder: Path) -> Published:
    """Write the checkpoint of the layout `name` into `folder`."""
    source, path, plain = HOME / "layouts" / name, folder / name, folder / "plain" / name
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("tensors.txt"))
    config = json.loads((path / "config.json").read_text())
    for module in {value.split(".")[0] for value in config.get("auto_map", {}).values() if "/" not in value}:
        (path / f"{module}.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    _write_tokenizer(path)
    lines = [line for line in (source / "tensors.txt").read_text().splitlines() if line and line[0] != "#"]
    for file in [line.removeprefix("also ") for line in lines if line.startswith("also ")]:
        (path / file).parent.mkdir(exist_ok=True)
        save_file({"tok_embeddings.weight": torch.zeros(2, 3)}, path / file)
    lines = [line for line in lines if not line.startswith("also ")]
    stored = _random_tensors(lines[1:], config)
    _write_weights(path, lines[0], stored)
    tensors = {
        key.removesuffix(BLOCKS).removesuffix(PACKED): _without_scales(key, stored, config)
        for key in stored
        if not key.endswith((SCALE, SCALES, *BESIDE))
    }
    if len(tensors) < len(stored):
        shutil.copytree(path, plain, ignore=shutil.ignore_patterns("*.safetensors*"))
        config.pop("quantization_config")
        (plain / "config.json").write_text(json.dumps(config))
        _write_weights(plain, lines[0], tensors)
    marked = (line.split()[0] for line in lines[1:] if line.endswith(" pruned"))
    pruned = (key.removesuffix(BLOCKS).removesuffix(PACKED) for name in marked for key in _names(name))
    return Published(name, path, plain if plain.exists() else path, tensors, frozenset(pruned))


def _write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json with the special tokens of tokenizer_config.json, and put the chat template into that."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if "chat_template" in config:
        config["chat_template"] = (HOME / "templates" / config["chat_template"]).read_text()
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False))
    added = {int(number): token for number, token in config["added_tokens_decoder"].items()}
    free = (number for number in itertools.count() if number not in added)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES.split("|"))]
    vocabulary = {token: next(free) for token in tokens}
    vocabulary |= {token["content"]: number for number, token in added.items() if number < len(tokens)}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in MERGES.split("|"))]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    words = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(added.items()):
        flags = {key: value for key, value in token.items() if key != "content"}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        assert tokenizer.token_to_id(token["content"]) == number, f"{folder}: {token['content']} is not {number}"
    tokenizer.save(str(folder / "tokenizer.json"))


def _names(text: str) -> list[str]:
    """The names that a name with ranges and lists stands for."""
    choices: list[list[str]] = []
    for place, part in enumerate(re.split(r"{(.+?)}", text)):
        if place % 2 == 0:
            choices.append([part])
        elif ends := re.fullmatch(r"(\d+)-(\d+)", part):
            choices.append([str(number) for number in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]


def _random_tensors(lines: list[str], config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors of the names, dtypes and shapes of a table."""
    draw = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for line in lines:
        name, dtype, sizes = line.removesuffix(" pruned").split(maxsplit=2)
        shape = [] if dtype == "=" else json.loads(sizes)
        for key in _names(name):
            assert key not in made, f"{key} is there twice"
            if dtype == "=":
                made[key] = made[sizes].clone()
                continue
            if key.endswith(SCALE):
                made[key] = scales.pop(key).to(DTYPES[dtype])
                assert list(made[key].shape) == shape, key
                continue
            if dtype == "U8":  # FP4 with exponents around -4
                ends = (121, 126) if key.endswith(SCALES) else (0, 256)
                made[key] = torch.randint(*ends, shape, generator=draw, dtype=torch.uint8)
                continue
            if key.endswith((PACKED, *BESIDE)):
                made[key] = _packed_part(key, shape, made, draw).to(DTYPES[dtype])
                continue
            tensor = torch.randn(shape, generator=draw)
            # Norms around one, biases around zero, and matrices that keep the size of what goes through them.
            tensor = 1 + tensor / 10 if len(shape) == 1 and key.endswith("weight") else tensor / math.sqrt(shape[-1])
            if dtype == "F8_E4M3":
                tensor, scales[key + SCALE] = _to_fp8(tensor, config["quantization_config"])
            made[key] = tensor.to(DTYPES[dtype])
    assert not scales, f"no scales in the table for {sorted(scales)}"
    return made


def _packed_part(key: str, shape: list[int], made: dict[str, Tensor], draw: torch.Generator) -> Tensor:
    """What a weight of four-bit integers lies in: words of eight, a scale for each group, and the shape."""
    if key.endswith(PACKED):
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=draw)
    if key.endswith(BESIDE[0]):
        return (torch.rand(shape, generator=draw) + 0.5) / 32
    rows, words = made[key.replace(BESIDE[1], f"weight{PACKED}")].shape
    return torch.tensor([rows, 8 * words])


def _spread(scales: Tensor, block: list[int], shape: torch.Size) -> Tensor:
    """The scale of each element of a matrix."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def _to_fp8(tensor: Tensor, quantization: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, and the scales of its blocks, which may have to be powers of two."""
    block = quantization["weight_block_size"]
    rows, columns = (-(-size // part) for size, part in zip(tensor.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    for i, j in itertools.product(range(rows), range(columns)):
        here = tensor[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        scales[i, j] = here.abs().max() / 448
    if quantization.get("scale_fmt") == "ue8m0":
        scales = scales.log2().ceil().exp2()
    return (tensor / _spread(scales, block, tensor.shape)).to(torch.float8_e4m3fn), scales


def _without_scales(name: str, stored: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The tensor, in bf16 if it is block-scaled, MXFP4 or packed integers."""
    if name.endswith(BLOCKS):
        return convert_moe_packed_tensors(stored[name], stored[name.removesuffix(BLOCKS) + SCALES])
    if name.endswith(PACKED):
        integers = torch.stack([(stored[name] >> 4 * place & 15) - 8 for place in range(8)], -1).flatten(1)
        scales = stored[name.replace(PACKED, "_scale")].float()
        return (integers * scales.repeat_interleave(integers.shape[1] // scales.shape[1], 1)).bfloat16()
    tensor, block_scales = stored[name], stored.get(name + SCALE)
    if block_scales is None:
        return tensor
    block = config["quantization_config"]["weight_block_size"]
    return (tensor.float() * _spread(block_scales.float(), block, tensor.shape)).bfloat16()


def _write_weights(folder: Path, files: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors into as many files of about one size as `files` says, and the index where there is one."""
    _, count, pattern, *counted = files.split()
    first = int(counted[1]) if counted else 1
    shards: list[dict[str, Tensor]] = [{} for _ in range(int(count))]
    total = sum(tensor.nbytes for tensor in tensors.values())
    seen = 0
    for name, tensor in tensors.items():
        shards[seen * len(shards) // total][name] = tensor
        seen += tensor.nbytes
    numbers = range(first, first + len(shards))
    names = [pattern % (number, len(shards))[: pattern.count("%")] for number in numbers]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    if pattern != "model.safetensors":
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
