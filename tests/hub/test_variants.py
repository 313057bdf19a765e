"""Forms in which checkpoints are published besides those of the layouts, and which transformers loads all the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rac_engine.cli.app import main
from tests.hub.published import publish
from tests.hub.test_layouts import check_streamed, loaded

FUSED = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """Another form of a layout."""

    layout: str
    tensors: Callable[[Tensors], Tensors] = dict
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    copied: tuple[str, ...] = ()
    """Parts of the names of tensors that transformers has no use for, and which stay as they are."""

    def write(self, folder: Path) -> Path:
        """The checkpoint, in one file."""
        given, path = publish(self.layout, folder), folder / "variant"
        shutil.copytree(given.path, path, ignore=shutil.ignore_patterns("*.safetensors*"))
        (path / "config.json").write_text(json.dumps(self.config(given.config), indent=2))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors(given.tensors).items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path


def without_prefix(tensors: Tensors) -> Tensors:
    """The names of a model without its head, which has nothing before `layers`."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def without_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in without_prefix(tensors).items() if name != "lm_head.weight"}


def with_frequencies(tensors: Tensors) -> Tensors:
    """As transformers before 4.32 wrote them, in every layer."""
    layers = {name.rpartition(".self_attn")[0] for name in tensors if ".self_attn" in name}
    return tensors | {f"{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in sorted(layers)}


def fused(tensors: Tensors) -> Tensors:
    """Experts as transformers 5 has them in memory: gate and up of all of them in one tensor, down in another."""
    made: Tensors = {}
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for name, tensor in tensors.items():
        if (found := FUSED.fullmatch(name)) is None:
            made[name] = tensor
        else:
            parts.setdefault(found[1], {}).setdefault(found[3], []).append(tensor)
    for home, part in parts.items():
        gate, up, down = (torch.stack(part[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        made |= {f"{home}.gate_up_proj": torch.cat((gate, up), 1), f"{home}.down_proj": down}
    return made


def with_further_layer(tensors: Tensors) -> Tensors:
    """A layer that predicts further tokens, as DeepSeek publishes it, behind the last one."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1."):
            made[name.replace("layers.1.", "layers.2.")] = tensor.clone()
    width = tensors["model.norm.weight"].shape[0]
    made |= {f"model.layers.2.{name}.weight": tensors["model.norm.weight"].clone() for name in ("enorm", "hnorm")}
    made["model.layers.2.eh_proj.weight"] = torch.randn(width, 2 * width).bfloat16()
    made["model.layers.2.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    for name in ("embed_tokens", "shared_head.head"):
        made[f"model.layers.2.{name}.weight"] = tensors["model.embed_tokens.weight"].clone()
    return made


def saying(**fields: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda config: {**config, **fields}


def not_saying(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda config: {key: value for key, value in config.items() if key not in names}


VARIANTS = {
    "no prefix, tied": Variant("Qwen3-0.6B", without_head),
    "no prefix, with a head": Variant("Qwen3-8B", without_prefix),
    "frequencies": Variant("DeepSeek-R1-Distill-Llama-8B", with_frequencies, copied=("inv_freq",)),
    "fused experts": Variant("Qwen3-30B-A3B", fused),
    "fused experts beside a shared one": Variant("DeepSeek-R1-BF16", fused),
    "quantization_config: null": Variant(
        "Qwen3-8B", config=saying(quantization_config=None, sparsity_config=None, compression_config=None)
    ),
    "a further layer without its count": Variant(
        "DeepSeek-R1-BF16", with_further_layer, not_saying("num_nextn_predict_layers"), copied=("layers.2.",)
    ),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_transformers_loads_is_pruned(variant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = variant.write(tmp_path)
    Path("p.jsonl").write_text('{"problem": "Add 2 and 2."}\n')
    for words in (
        f"prune {path} out --calibration p.jsonl --method sparsegpt --sparsity 0.6",
        f"verify out --source {path}",
        "trace out --prompts p.jsonl --tokens 40 --max-new-tokens 2 --samples 1 --out traces",
    ):
        assert main(words.split()) == 0, (words, capsys.readouterr())
    before, after = load_file(path / "model.safetensors"), load_file(Path("out/model.safetensors"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "_proj" in name and not any(part in name for part in variant.copied):
            assert float((tensor == 0).float().mean()) == pytest.approx(0.6, abs=0.02), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert Path("out/config.json").read_bytes() == (path / "config.json").read_bytes()
    model, said = loaded(Path("out"))
    assert not said["missing_keys"] and not said["mismatched_keys"]
    with torch.inference_mode():
        check_streamed(Path("out"), model)
