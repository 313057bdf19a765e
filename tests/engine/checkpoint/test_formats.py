"""Formats of quantized weights, in files written number by number in the form in which others publish them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import tensors as module
from rac_engine.checkpoint.formats import find_format, unread_format
from rac_engine.checkpoint.reader import Checkpoint, other_files
from rac_engine.engine.metrics import load_metrics
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.model import Model
from rac_engine.recipe.settings import PruneSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Request, Sampling
from tests import tiny

Make = Callable[..., Path]
FP8 = torch.float8_e4m3fn
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
MISTRAL = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
NVIDIA = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


def compressed(form: str | None, *weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors, as llm-compressor writes it."""
    default = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "symmetric": True}
    groups = {
        f"group_{number}": {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
        | {"weights": {**default, **given}}
        for number, given in enumerate(weights)
    }
    return {
        "config_groups": groups,
        "format": form,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **changes,
    }


BY_ROW = {"num_bits": 8, "strategy": "channel", "type": "float"}
WHOLE = {"num_bits": 8, "strategy": "tensor", "type": "float"}
BY_BLOCK = {"num_bits": 8, "strategy": "block", "type": "float", "block_structure": [16, 16]}
ROW_INT8 = {"num_bits": 8, "strategy": "channel", "type": "int"}
KIMI = {"num_bits": 4, "strategy": "group", "type": "int", "group_size": 32}
PACKED_INT8 = {"num_bits": 8, "strategy": "group", "type": "int", "group_size": 32}


def save(folder: Path, quantization: object, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**(config or {}), "quantization_config": quantization}))
    return folder


def values(*shape: int, dtype: torch.dtype = FP8) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (drawn * 40).to(torch.int8) if dtype == torch.int8 else drawn.to(dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1).to(dtype)


def spread(given: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each number times the scale of its block, one after the other."""
    out = torch.empty(given.shape, dtype=dtype)
    for i in range(given.shape[0]):
        for j in range(given.shape[1]):
            out[i, j] = given[i, j].float() * scales[i // block[0], j // block[1]].float()
    return out


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers [rows, columns] in words of 32 bits, half of their range added, the first in the lowest bits."""
    count, words = 32 // bits, torch.zeros(len(integers), integers.shape[1] * bits // 32, dtype=torch.int64)
    for column in range(integers.shape[1]):
        words[:, column // count] += (integers[:, column].long() + (1 << (bits - 1))) << bits * (column % count)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def check(folder: Path, expected: dict[str, Tensor]) -> None:
    """The checkpoint has these tensors, whole, by rows, and run by run."""
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(checkpoint.read(name, (1, 3)), tensor[1:3]), name
        whole = torch.frombuffer(bytearray(b"".join(module.pieces_of(info))), dtype=tensor.dtype)
        assert torch.equal(whole, tensor.flatten()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_of_a_matrix_and_of_stacked_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    """Qwen's scales are in bf16; the last block of rows is not whole."""
    flat, stack = values(37, 48), values(3, 37, 48)
    scales, many = numbers(3, 3, dtype=dtype), numbers(3, 3, 3, dtype=dtype)
    tensors = {
        "a.weight": flat,
        "a.weight_scale_inv": scales,
        "b.experts.gate_up_proj": stack,
        "b.experts.gate_up_proj_scale_inv": many,
    }
    experts = torch.stack([spread(part, scale, (16, 16)) for part, scale in zip(stack, many, strict=True)])
    expected = {"a.weight": spread(flat, scales, (16, 16)), "b.experts.gate_up_proj": experts}
    check(save(tmp_path / "model", DEEPSEEK, tensors), expected)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_a_scale_for_each_tensor_or_stacked_expert(tmp_path: Path, suffix: str) -> None:
    """Mistral's files; scales of activations lie beside."""
    flat, stack, scale, many = values(5, 8), values(3, 5, 8), numbers(), numbers(3, 1, 1)
    tensors = {
        "a.weight": flat,
        f"a.weight{suffix}": scale,
        "a.activation_scale": numbers(),
        "a.input_scale": numbers(),
        "b.experts.down_proj": stack,
        f"b.experts.down_proj{suffix}": many,
        "b.experts.down_proj_activation_scale": numbers(),
    }
    folder = save(tmp_path / "model", MISTRAL, tensors)
    experts = torch.stack([spread(part, s, (5, 8)) for part, s in zip(stack, many, strict=True)])
    check(folder, {"a.weight": spread(flat, scale.view(1, 1), (5, 8)), "b.experts.down_proj": experts})
    assert Checkpoint.open(folder).left_out == 3


@pytest.mark.parametrize(
    ("quantization", "shape", "block", "dtype", "scale_dtype"),
    [
        (compressed("float-quantized", BY_ROW), (24, 1), (1, 32), FP8, torch.bfloat16),
        (compressed("float-quantized", BY_ROW), (24,), (1, 32), FP8, torch.float32),
        (compressed("float-quantized", BY_ROW), (24, 1), (1, 32), FP8, torch.float16),
        (compressed("naive-quantized", WHOLE), (1,), (24, 32), FP8, torch.bfloat16),
        (compressed("float-quantized", BY_BLOCK), (2, 2), (16, 16), FP8, torch.bfloat16),
        (compressed("int-quantized", ROW_INT8), (24, 1), (1, 32), torch.int8, torch.bfloat16),
        (NVIDIA, (), (24, 32), FP8, torch.float32),
    ],
    ids=["row", "flat", "fp16", "tensor", "block", "int8", "modelopt"],
)
def test_weight_scale(
    tmp_path: Path,
    quantization: dict[str, Any],
    shape: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> None:
    given, scales = values(24, 32, dtype=dtype), numbers(*shape, dtype=scale_dtype)
    tensors = {"a.weight": given, "a.weight_scale": scales, "b.weight": values(3, 4, dtype=torch.bfloat16)}
    made = torch.float16 if scale_dtype == torch.float16 else torch.bfloat16
    grid = scales.view(-(-24 // block[0]), -(-32 // block[1]))
    expected = {"a.weight": spread(given, grid, block, made), "b.weight": tensors["b.weight"]}
    check(save(tmp_path / "model", quantization, tensors), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [3, 1])
def test_packed_integers(tmp_path: Path, bits: int, groups: int) -> None:
    """Kimi K2 Thinking has them for its experts; with one group a row, they are by channel."""
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, (5, 96), generator=torch.Generator().manual_seed(0))
    integers[0, :2] = torch.tensor([-half, half - 1])
    scales = numbers(5, groups, dtype=torch.bfloat16)
    tensors = {
        "a.weight_packed": pack(integers, bits),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([5, 96], dtype=torch.int32),
    }
    quantization = compressed("pack-quantized", KIMI if bits == 4 else PACKED_INT8)
    folder = save(tmp_path / "model", quantization, tensors)
    check(folder, {"a.weight": spread(integers, scales, (1, 96 // groups))})


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NVFP4 = {"num_bits": 4, "strategy": "tensor_group", "type": "float", "group_size": 16}
MXFP4 = {"num_bits": 4, "strategy": "group", "type": "float", "group_size": 32}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (compressed("nvfp4-pack-quantized", NVFP4), "FP4 with a scale for each 16 columns of a row"),
        (compressed("mxfp4-pack-quantized", MXFP4), "FP4 with a scale for each 32 columns of a row"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "NVFP4"),
    ],
    ids=["nvfp4", "mxfp4", "modelopt"],
)
def test_fp4_in_single_matrices(tmp_path: Path, quantization: dict[str, Any], words: str) -> None:
    """NVFP4 has a scale for the whole tensor beside those of its groups, which divides or multiplies them."""
    which = torch.randint(16, (5, 64), generator=torch.Generator().manual_seed(0))
    stored, given = (which[:, 0::2] | which[:, 1::2] << 4).to(torch.uint8), torch.tensor(FP4)[which]
    scales, powers = numbers(5, 4).to(FP8), torch.arange(120, 130, dtype=torch.uint8).view(5, 2)
    tensors: dict[str, Tensor] = {"a.weight_packed": stored, "a.weight_scale": scales}
    group, expected = 16, dict[str, Tensor]()
    if words == "NVFP4":
        tensors = {"a.weight": stored, "a.weight_scale": scales, "a.weight_scale_2": torch.tensor(0.25)}
        tensors |= {"a.input_scale": numbers(), "b.weight": values(3, 4), "b.weight_scale": torch.tensor(0.5)}
        expected["b.weight"] = spread(tensors["b.weight"], torch.full((1, 1), 0.5), (3, 4))  # in FP8
    elif words.endswith("16 columns of a row"):
        tensors |= {"a.weight_global_scale": torch.tensor([4.0]), "a.input_global_scale": numbers(1)}
    else:
        group, tensors["a.weight_scale"], scales = 32, powers, torch.exp2(powers.float() - 125)
    expected["a.weight"] = spread(given, scales.float() / 4, (1, group))
    folder = save(tmp_path / "model", quantization, tensors)
    check(folder, expected)
    form = find_format({"quantization_config": quantization})
    assert form is not None and form.words == words


def test_a_word_is_what_compressed_tensors_makes_of_eight_integers() -> None:
    """By its version 0.20.1."""
    assert pack(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]]), 4).item() == -22444272


def test_the_language_model_within_a_larger_config(tmp_path: Path) -> None:
    """Kimi K2.5 says how its weights are quantized in text_config."""
    form = compressed("pack-quantized", KIMI)
    config = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "quantization_config": form}}
    integers, scales = torch.arange(-8, 8).repeat(4, 2), numbers(4, 1, dtype=torch.bfloat16)
    tensors = {"language_model.a.weight_packed": pack(integers, 4), "language_model.a.weight_scale": scales}
    folder = save(tmp_path / "model", None, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, {"language_model.a.weight": spread(integers, scales, (1, 32))})
    copied = json.loads(Checkpoint.open(folder).copied_file("config.json"))
    assert copied == {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}


def test_a_model_is_read_and_the_report_says_what_was_left_out(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen3", shard_size="1GB")
    tensors, expected = load_file(source / "model.safetensors"), dict[str, Tensor]()
    for name, tensor in list(tensors.items()):
        if "_proj" in name:
            scales = tensor.abs().amax(1, keepdim=True) / 448
            tensors[name] = (tensor / scales).to(FP8)
            tensors[f"{name}_scale"] = scales
            expected[name] = (tensors[name].float() * scales.float()).bfloat16()
        else:
            expected[name] = tensor
    tensors |= {f"model.layers.{layer}.self_attn.{kind}_scale": numbers(1) for layer in range(3) for kind in "kv"}
    config = json.loads((source / "config.json").read_text())
    folder = save(tmp_path / "model", compressed("float-quantized", BY_ROW), tensors, config)
    (folder / "hf_quant_config.json").write_text("{}")
    model = Model.open(Checkpoint.open(folder))
    for name, tensor in expected.items():
        assert torch.equal(model.checkpoint.read(name), tensor), name
    assert model.notes() == [
        "weights in FP8 with a scale for each row were read and written as bfloat16",
        "6 scales of quantized activations and caches were left out: plain weights have no use for them",
    ]
    assert other_files(folder) == ["config.json"]


def test_kimi_k2_thinking_is_pruned_and_sampled_as_the_bf16_that_it_stands_for(tmp_path: Path) -> None:
    """Its experts are packed; attention, shared experts and the first layer are not."""
    source = tiny.save(tmp_path / "bf16", "deepseek_v3", shard_size="1GB", num_hidden_layers=2, n_routed_experts=4)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
    plain, packed = load_file(source / "model.safetensors"), dict[str, Tensor]()
    for name, tensor in list(plain.items()):
        if ".mlp.experts." not in name:
            packed[name] = tensor
            continue
        grouped = tensor.float().unflatten(1, (-1, 16))
        scales = (grouped.abs().amax(-1) / 7.5).bfloat16()
        integers = (grouped / scales[..., None].float()).round().clamp(-8, 7).flatten(1).to(torch.int8)
        packed[f"{name}_packed"], packed[f"{name}_scale"] = pack(integers, 4), scales
        packed[f"{name}_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
        plain[name] = spread(integers, scales, (1, 16))
    (source / "config.json").write_text(json.dumps(config))
    save_file(plain, source / "model.safetensors")
    group = {**KIMI, "group_size": 16}
    thinking = save(tmp_path / "int4", compressed("pack-quantized", group), packed, config)
    tokens = []
    for folder in (source, thinking):
        tiny.save_tokenizer(folder)
        prune(folder, tmp_path / f"{folder.name}-out", PruneSettings(method="sparsegpt"), tiny.calibration((9, 30)))
        requests = [Request([5, 6], 0), Request([7], 1)]
        tokens.append(Decoder(folder).decode(requests, Sampling(max_new_tokens=8), 2))
    assert tokens[0] == tokens[1]
    out, wanted = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("int4", "bf16"))
    assert out.keys() == wanted.keys() and all(torch.equal(out[name], tensor) for name, tensor in wanted.items())
    made = tmp_path / "int4-out"
    assert json.loads((made / "config.json").read_text()) == config
    assert "int4 with a scale for each 16 columns of a row" in load_metrics(made / "rac").end["notes"][1]
    assert verify(made, thinking).problems == []
    # K2.5 is the same within a model that also sees images.
    parts = {f"language_model.{name}": tensor for name, tensor in packed.items()} | {"vision_tower.a": numbers(2)}
    seeing = save(tmp_path / "seeing", None, parts)
    inner = {**config, "quantization_config": compressed("pack-quantized", group)}
    whole = {"model_type": "kimi_k25", "text_config": inner, "tie_word_embeddings": False, "vision_config": {}}
    (seeing / "config.json").write_text(json.dumps(whole))
    model = Model.open(Checkpoint.open(seeing))
    prunable = {matrix.name.removeprefix("language_model.") for matrix in model.prunable()}
    assert prunable == {matrix.name for matrix in Model.open(Checkpoint.open(thinking)).prunable()}
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(model.checkpoint.read(f"language_model.{expert}"), plain[expert])


def test_a_config_that_speaks_of_quantized_weights_where_there_are_none(checkpoint: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": DEEPSEEK}))
    model = Model.open(Checkpoint.open(folder))
    assert model.notes() == ["weights in FP8 with a scale for each 16 × 16 are none: all are plain"]


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (compressed("mxfp8-quantized", {**KIMI, "type": "float"}), "compressed-tensors, mxfp8-quantized"),
        (compressed("marlin-24", KIMI), "compressed-tensors, marlin-24"),
        (compressed("pack-quantized"), "compressed-tensors, pack-quantized"),
        (compressed("pack-quantized", {**KIMI, "num_bits": 3}), "compressed-tensors, pack-quantized"),
        (compressed("pack-quantized", {**KIMI, "num_bits": 4.0}), "compressed-tensors, pack-quantized"),
        (compressed("pack-quantized", {**KIMI, "symmetric": False}), "compressed-tensors, pack-quantized"),
        (compressed("mixed-precision", KIMI, ROW_INT8), "compressed-tensors, mixed-precision"),
        (compressed(None, BY_ROW, sparsity_config={"format": "sparse-24-bitmask"}), "compressed-tensors"),
        (compressed("pack-quantized", KIMI, transform_config={"a": 1}), "compressed-tensors, pack-quantized"),
        (compressed("pack-quantized", config_groups=[1]), "compressed-tensors, pack-quantized"),
        (compressed(["a"], KIMI), r"compressed-tensors, ['a']"),  # type: ignore[arg-type]
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt, W4A8_AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "a\nb" + "c" * 200}, "a b" + "c" * 97),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [16]}, "fp8"),
        (False, "False"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(quantization: object, said: str) -> None:
    assert unread_format({"quantization_config": quantization}) == said
    assert find_format({"quantization_config": quantization}) is None


def test_a_null_says_nothing() -> None:
    for config in ({"quantization_config": None}, {"text_config": {"quantization_config": None}}):
        assert unread_format(config) is None and find_format(config) is None


PACKED = {"a.weight_packed": torch.zeros(4, 8, dtype=torch.int32), "a.weight_scale": torch.ones(4, 2)}
BYTES = {"a.weight_packed": torch.zeros(4, 32, dtype=torch.uint8), "a.weight_scale": values(4, 4)}


@pytest.mark.parametrize(
    ("quantization", "tensors", "said"),
    [
        (compressed("pack-quantized", KIMI), {"a.weight_packed": PACKED["a.weight_packed"]}, "has no 'a.weight_scale'"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_scale": torch.ones(4, 3)}, "does not scale"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_scale": torch.ones(4, 0)}, "does not scale"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_scale": torch.ones(4)}, "does not scale"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_packed": torch.ones(4, 8)}, "does not scale"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight": torch.ones(4, 64)}, "are the same weights"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_zero_point": torch.ones(1)}, "zero points"),
        (compressed("pack-quantized", KIMI), {**PACKED, "a.weight_g_idx": torch.ones(1)}, "columns' order"),
        (compressed("float-quantized", BY_ROW), {"a.weight": values(4, 8), "a.weight_scale": torch.ones(3)}, "by row"),
        (compressed("mxfp4-pack-quantized", MXFP4), {**BYTES, "a.weight_scale": torch.ones(4, 2)}, "in groups of 32"),
        (compressed("mxfp4-pack-quantized", MXFP4), {**BYTES, "a.weight_scale": torch.ones(4, 3)}, "in groups of 32"),
        (compressed("nvfp4-pack-quantized", NVFP4), {**BYTES, "a.weight_global_scale": torch.ones(2)}, "as a whole"),
        (MISTRAL, {"a.weight": values(2, 4, 8), "a.weight_scale_inv": torch.ones(3, 1, 1)}, "does not scale"),
        (MISTRAL, {"a.weight": values(4), "a.weight_scale_inv": torch.ones(())}, "does not scale"),
        (DEEPSEEK, {"a.weight": values(2, 4, 8), "a.weight_scale_inv": torch.ones(1, 1)}, "in blocks of 16 × 16"),
    ],
)
def test_tensors_that_do_not_fit_end_in_one_line(
    tmp_path: Path, quantization: dict[str, Any], tensors: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        Checkpoint.open(save(tmp_path / "model", quantization, tensors))
    assert "\n" not in str(raised.value)
