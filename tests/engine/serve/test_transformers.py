"""Packed folders in transformers: what it loads, what that answers, and what it saves again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.quantizers import auto

import rac_engine
from rac_engine.pack.packing import pack as pack_folder
from rac_engine.pack.unpacking import unpack as unpack_folder
from rac_kernels.ops.packed import Values, pack, unpack
from tests import tiny
from tests.engine.pruned import pruned

DENSE = ("embed", "lm_head", "conv", "norm", "router", ".gate.weight", "bias", "sinks")
"""Parts of names of tensors that stay dense."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def packed_folder(folder: Path, family: str = "qwen2", values: Values = "same", **changes: Any) -> tuple[Path, Path]:
    """A tiny model with every other column zero: a packed folder, and a dense one with the values it stands for."""
    source = tiny.save(folder / "source", family, shard_size="1GB", **changes)
    dense, packed = tensors_of(source), {}
    for name, tensor in dense.items():
        packed[name] = tensor
        if tensor.dim() > 1 and not any(part in name for part in DENSE):
            pruned = tensor.clone()
            pruned[..., ::2] = 0
            matrix = pack(pruned, values)
            packed[name], dense[name] = matrix.data, unpack(matrix)
    for name, tensors in (("dense", dense), ("packed", packed)):
        shutil.copytree(source, folder / name)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    file = folder / "packed" / "config.json"
    config = json.loads(file.read_text()) | {
        "quantization_config": {"quant_method": "rac", "version": 1, "note": "kept"}
    }
    file.write_text(json.dumps(config))
    return folder / "packed", folder / "dense"


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 25).view(2, 11)
    with torch.no_grad():
        return model(ids).logits.float()


def assert_close(a: Tensor, b: Tensor) -> None:
    """Equal within what sums in another order make of bf16."""
    assert float((a - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize(
    ("family", "values"), [("qwen2", "int8"), ("mixtral", "same"), ("nemotron_h", "same"), ("granitemoehybrid", "int4")]
)
def test_logits_are_those_of_the_dense_model_and_it_saves_what_it_loaded(
    tmp_path: Path, family: str, values: Values
) -> None:
    packed, dense = packed_folder(tmp_path, family, values)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))
    wanted = tensors_of(packed)
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) == sum(
        t.dtype == torch.uint8 for t in wanted.values()
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held <= 1.05 * sum(t.numel() * t.element_size() for t in wanted.values())
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "rac", "version": 1, "note": "kept"}


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "gpt_oss"])
def test_packed_folders_of_all_families_answer_as_the_unpacked_ones(tmp_path: Path, family: str) -> None:
    """What `rac pack` writes, by tokens that are few and that are many for the kernels; gpt_oss has its own test."""
    source = tiny.save_tokenizer(pruned(tmp_path / "source", family, grid=True))  # exact as "same" and as int4
    models = {}
    for values in ("same", "int4"):
        made = pack_folder(source, tmp_path / values, values)
        models[values], _ = rac_engine.load(tmp_path / values)
        assert made.matrices == sum(p.dtype == torch.uint8 for p in models[values].parameters())
    unpack_folder(tmp_path / "int4", tmp_path / "unpacked")
    dense, exact = (rac_engine.load(tmp_path / "unpacked", dtype=dtype)[0] for dtype in ("auto", torch.float32))
    for ids in (torch.arange(3, 6).view(1, 3), torch.arange(3, 25).view(2, 11)):
        with torch.no_grad():
            wanted = exact(ids).logits
            rounding = float((dense(ids).logits - wanted).norm())
            assert 0 < rounding < 0.05 * float(wanted.norm())
            for values, model in models.items():
                assert float((model(ids).logits - wanted).norm()) < 3 * rounding, values


def test_what_no_packed_layer_stands_for_is_unpacked_with_a_warning(tmp_path: Path) -> None:
    packed, dense = packed_folder(tmp_path, "gpt_oss")
    with pytest.warns(
        UserWarning, match=r"unpacked while loading, .* GptOssForCausalLM: model\.layers\.\d\.mlp\.experts"
    ):
        model = AutoModelForCausalLM.from_pretrained(packed)
    assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.weight.dtype == torch.uint8
    assert layer.mlp.experts.gate_up_proj.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_generation_pipeline_and_one_line(tmp_path: Path) -> None:
    packed, dense = packed_folder(tmp_path)
    tiny.save_tokenizer(packed)
    model, loaded = rac_engine.load(packed, device="cpu")
    assert loaded.vocab_size == tiny.VOCABULARY
    tokenizer = PreTrainedTokenizerFast.from_pretrained(packed)  # not as one of Qwen 2, which knows no such words
    given = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    answers = [
        each.generate(given, max_new_tokens=12, do_sample=False)[0].tolist()
        for each in (model, AutoModelForCausalLM.from_pretrained(dense))
    ]
    assert answers[0] == answers[1]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = run("w5 w6 w7", max_new_tokens=12, do_sample=False, return_tensors=True)
    assert made[0]["generated_token_ids"] == answers[0]


def test_it_compiles_in_one_graph(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_folder(tmp_path)[0])
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_close(compiled(x).float(), layer(x).float())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model_compiles_in_one_graph(tmp_path: Path, backend: str) -> None:
    """Packed products among the rest; with aot_eager by the shapes that the operator says it makes."""
    model = AutoModelForCausalLM.from_pretrained(packed_folder(tmp_path, "llama", "int4", num_hidden_layers=1)[0])
    torch._dynamo.reset()
    wanted = logits(model)
    assert_close(logits(torch.compile(model, backend=backend, fullgraph=True)), wanted)
    torch._dynamo.reset()


def test_damaged_and_foreign_matrices_are_refused(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path)
    tensors = tensors_of(packed)
    name = "model.layers.1.self_attn.o_proj.weight"

    def load(change: Any) -> None:
        damaged = {**tensors, name: change(tensors[name].clone())}
        save_file(damaged, packed / "model.safetensors", metadata={"format": "pt"})
        AutoModelForCausalLM.from_pretrained(packed)

    def flipped(data: Tensor) -> Tensor:
        data[64 + 4 * 49 + 60] ^= 1  # a bit of the mask
        return data

    def another(data: Tensor) -> Tensor:
        data[8] = 2
        return data

    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj: .*mask"):
        load(flipped)
    with pytest.raises(ValueError, match=r"o_proj\.weight: .*version 2"):
        load(another)
    with pytest.raises(
        ValueError, match=r"o_proj\.weight: the packed matrix is \[16, 48\], and the model's is \[48, 48\]"
    ):
        load(lambda data: pack(torch.ones(16, 48, dtype=torch.bfloat16)).data)


def test_folders_of_another_version_are_refused(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path)
    file = packed / "config.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="packed files of version 2; this release knows version 1"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_without_the_package_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of another shape under its name: transformers by itself does not make one up."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "rac")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(packed_folder(tmp_path)[0])
