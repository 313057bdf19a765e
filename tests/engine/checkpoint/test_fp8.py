"""Source formats: block-scaled FP8 as DeepSeek publishes it, fp16 and fp32, layers that only predict further tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import tensors as module
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.checkpoint.writer import CheckpointWriter
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.model import Model
from rac_engine.pack.packing import pack_output
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import PruneSettings
from tests import tiny

Make = Callable[..., Path]
FP8 = torch.float8_e4m3fn


def quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """FP8 values and the scale of each block, one block after the other."""
    rows, columns = (-(-size // block) for size in weight.shape)
    values, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            here = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[here].float().abs().max() / 448
            values[here] = (weight[here].float() / scales[i, j]).to(FP8)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """One number after the other."""
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = values[i, j].float() * scales[i // block, j // block]
    return out


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def pair(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A DeepSeek-V3 in FP8 with a layer that predicts a further token, and the bf16 that its numbers stand for."""
    home = tmp_path_factory.mktemp("fp8")
    source = checkpoint("deepseek_v3", shard_size="1GB")
    folders = [Path(shutil.copytree(source, home / name)) for name in ("fp8", "bf16")]
    fp8 = load_file(source / "model.safetensors")
    extra = {name.replace(".2.", ".3."): value.clone() for name, value in fp8.items() if ".layers.2.mlp.shared" in name}
    fp8.update(extra)
    bf16 = dict(fp8)
    for name in list(fp8):
        if name.startswith("model.layers.") and fp8[name].ndim == 2 and not name.endswith("gate.weight"):
            fp8[name], scales = quantize(fp8[name], 16)
            fp8[name + "_scale_inv"] = scales
            bf16[name] = dequantize(fp8[name], scales, 16)
    save_file(fp8, folders[0] / "model.safetensors", {"format": "pt"})
    save_file(bf16, folders[1] / "model.safetensors", {"format": "pt"})
    for folder in folders:
        change_config(folder, num_nextn_predict_layers=1)
    change_config(
        folders[0],
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [16, 16],
        },
    )
    return folders[0], folders[1]


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (128, 128), (1, 1), (129, 3)])
def test_blocks_of_128(tmp_path: Path, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    values, scales = quantize(torch.randn(rows, columns) * torch.rand(rows, 1).exp(), 128)
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    expected = dequantize(values, scales, 128)
    assert list(checkpoint.tensors) == ["a.weight"]
    assert (checkpoint.tensors["a.weight"].dtype, checkpoint.tensors["a.weight"].nbytes) == (
        torch.bfloat16,
        2 * rows * columns,
    )
    assert torch.equal(checkpoint.read("a.weight"), expected)
    for first, last in ((0, rows), (rows // 3, rows), (rows // 2, rows // 2 + 1)):
        assert torch.equal(checkpoint.read("a.weight", (first, last)), expected[first:last])


def test_fp8_is_pruned_as_the_bf16_that_it_stands_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = PruneSettings(chunk_tokens=64, block_size=16)
    reports = [prune(source, tmp_path / source.name, settings, tiny.calibration()) for source in pair]
    out, plain = (load_file(tmp_path / source.name / "model.safetensors") for source in pair)
    assert out.keys() == plain.keys()
    for name, tensor in plain.items():
        assert out[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(out[name], tensor), name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config == json.loads((pair[1] / "config.json").read_text())
    held_out, damping, *others = reports[1].end["notes"]
    read = "weights in FP8 with a scale for each 16 × 16 were read and written as bfloat16"
    assert reports[0].end["notes"] == [held_out, damping, read, *others]
    assert others[0] == "layer 3 predicts further tokens and was not pruned: transformers does not run it"
    assert verify(tmp_path / "fp8", pair[0]).problems == []
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_blocks_larger_than_any_tensor_take_no_memory(tmp_path: Path) -> None:
    values, scales = quantize(torch.randn(30, 20), 128)
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1 << 20, 1 << 36]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, expected = Checkpoint.open(tmp_path), dequantize(values, scales, 128)
    assert torch.equal(checkpoint.read("a.weight"), expected)
    assert torch.equal(checkpoint.read("a.weight", (7, 9)), expected[7:9])


def test_nan_in_fp8_is_copied_as_it_is_where_the_settings_say_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[3, 4] = 0x7F  # NaN
    tensors["model.layers.3.extra"] = torch.ones(3, 2).to(FP8)  # without a scale
    save_file(tensors, folder / "model.safetensors")
    settings = PruneSettings(chunk_tokens=64, method="magnitude", nonfinite="dense")
    report = prune(folder, tmp_path / "out", settings)
    assert [row["name"] for row in report.matrices if row.get("skipped") == "holds NaN or Inf"] == [name]
    assert load_file(tmp_path / "out" / "model.safetensors")[name].isnan().sum() == 1
    assert verify(tmp_path / "out", folder).problems == []


def test_a_plan_needs_only_the_config_of_an_fp8_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "model"
    alone.mkdir()
    shutil.copy(pair[0] / "config.json", alone)
    plans = [make_plan(folder, tokens=1000) for folder in (alone, pair[0])]
    assert plans[0].weights == plans[1].weights
    assert plans[0].matrices == plans[1].matrices == 3 * 5 + 3 + 2 * (3 + 8 * 3)


def test_scales_must_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in (tensors[name + "_scale_inv"][:1], tensors[name + "_scale_inv"].half()):
        save_file({**tensors, name + "_scale_inv": wrong.contiguous()}, folder / "model.safetensors")
        with pytest.raises(BadInput, match="does not scale"):
            Checkpoint.open(folder)
    del tensors[name + "_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=f"{name}' is torch.float8"):
        Model.open(Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "modelopt, W4A16_AWQ"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        ({"quant_method": ["fp8"], "format": {"a": 1}}, r"\['fp8'\], \{'a': 1\}"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8"),
        ("gptq", "gptq"),
    ],
)
def test_other_quantized_weights_are_refused(checkpoint: Make, tmp_path: Path, quantization: Any, said: str) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))
    change_config(folder, quantization_config=quantization)
    with pytest.raises(BadInput, match=rf"quantized \({said}\).*prune the bf16 model"):
        Model.open(Checkpoint.open(folder))


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_dtypes_stay(checkpoint: Make, tmp_path: Path, dtype: torch.dtype, family: str) -> None:
    source, out = checkpoint(family, dtype=dtype, shard_size="1GB"), tmp_path / "out"
    prune(source, out, PruneSettings(chunk_tokens=64, block_size=16), tiny.calibration())
    after = load_file(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in load_file(source / "model.safetensors").items()
    }
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert verify(out, source).problems == []


def test_going_through_fp8_holds_runs_of_a_matrix_only(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its digest, and copied as it is: every core may be at a matrix of its own."""
    held: list[int] = []
    real = module.read_tensor

    def noted(info: Any, *rest: Any) -> Tensor:
        tensor = real(info, *rest)
        if info.quantized is not None:
            held.append(tensor.nbytes)
        return tensor

    source = Checkpoint.open(pair[0])
    whole = {name: source.read(name) for name, info in source.tensors.items() if info.quantized is not None}
    digests = {name: hashlib.sha256(module.bytes_of(tensor)).hexdigest() for name, tensor in whole.items()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_tensor", noted)
        patch.setattr(module, "PIECE", 512)
        source.sha256()
        assert source.nonfinite() == []
        writer = CheckpointWriter(source, tmp_path)
        assert {name: writer.copy(name) for name in whole} == digests
    # Runs are whole blocks of 16 rows.
    most = max(16 * tensor.shape[1] * 2 for tensor in whole.values())
    assert max(held) == most < max(tensor.nbytes for tensor in whole.values())
    for name, tensor in whole.items():
        copied = writer.reuse(name, digests[name])
        assert copied is not None and torch.equal(copied, tensor)


def test_an_output_of_fp8_is_packed_like_one_of_bf16(pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = PruneSettings(method="magnitude", sparsity=0.8, pack=True)
    for source in pair:
        prune(source, tmp_path / source.name, settings, packer=pack_output)
    out, plain = (tmp_path / source.name for source in pair)
    made, wanted = (load_file(folder / "model.safetensors") for folder in (out, plain))
    assert made.keys() == wanted.keys() and any(tensor.dtype == torch.uint8 for tensor in made.values())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert verify(out, pair[0]).problems == []
