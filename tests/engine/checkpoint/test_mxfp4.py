"""gpt-oss as OpenAI publishes it: experts in MXFP4, `original/` beside, shards counted from 0, no torch_dtype."""

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
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import tensors as module
from rac_engine.checkpoint.reader import INDEX, Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.model import Model
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import PruneSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Request, Sampling
from tests import tiny

LAYERS, HIDDEN, WIDTH, EXPERTS, HEADS, HEAD = 2, 64, 96, 4, 4, 16
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "experts_per_token": 2,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initial_context_length": 64,
    "initializer_range": 0.02,
    "intermediate_size": WIDTH,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 2048,
    "model_type": "gpt_oss",
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "output_router_logits": False,
    "pad_token_id": 1,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 8,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": tiny.VOCABULARY,
}


def published(draw: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a model of CONFIG, random, as they are published."""

    def plain(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) * 0.2).bfloat16()

    tensors = {
        "lm_head.weight": plain(tiny.VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": plain(tiny.VOCABULARY, HIDDEN),
        "model.norm.weight": plain(HIDDEN) + 1,
    }
    for layer in range(LAYERS):
        inside: dict[str, Tensor] = {
            "input_layernorm.weight": plain(HIDDEN) + 1,
            "post_attention_layernorm.weight": plain(HIDDEN) + 1,
            "mlp.router.weight": plain(EXPERTS, HIDDEN),
            "mlp.router.bias": plain(EXPERTS),
            "self_attn.sinks": plain(HEADS),
        }
        for name, rows, columns in (
            ("q", HEADS * HEAD, HIDDEN),
            ("k", 32, HIDDEN),
            ("v", 32, HIDDEN),
            ("o", HIDDEN, 64),
        ):
            inside |= {
                f"self_attn.{name}_proj.weight": plain(rows, columns),
                f"self_attn.{name}_proj.bias": plain(rows),
            }
        for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            groups = (EXPERTS, rows, columns // 32)
            inside[f"mlp.experts.{name}_bias"] = plain(EXPERTS, rows)
            inside[f"mlp.experts.{name}_blocks"] = torch.randint(256, (*groups, 16), generator=draw, dtype=torch.uint8)
            inside[f"mlp.experts.{name}_scales"] = torch.randint(122, 126, groups, generator=draw, dtype=torch.uint8)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in inside.items()}
    return tensors


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """In two shards, the scales not in those of their blocks, and what else is published beside them."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in sorted(tensors.items()):
        shards["layers.1" in name or name.endswith("_scales")][name] = tensor
    files = [f"model-{number:05d}-of-00001.safetensors" for number in range(2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, {"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": [2, 4]}))
    (folder / "original").mkdir()
    (folder / "original" / "dtypes.json").write_text('{"embedding.weight": "BF16"}')
    save_file({"embedding.weight": torch.zeros(2, 2)}, folder / "original" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A gpt-oss in MXFP4, and the bf16 that its numbers stand for by transformers' own reading of them."""
    home = tmp_path_factory.mktemp("mxfp4")
    tensors = published(torch.Generator().manual_seed(0))
    bf16 = dict(tensors)
    for name in tensors:
        if name.endswith("_blocks"):
            kept = name.removesuffix("_blocks")
            bf16[kept] = convert_moe_packed_tensors(bf16.pop(name), bf16.pop(kept + "_scales"))
    plain = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    return save(home / "mxfp4", tensors, CONFIG), save(home / "bf16", bf16, plain)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_experts_are_read_as_transformers_reads_them(pair: tuple[Path, Path]) -> None:
    checkpoint, plain = Checkpoint.open(pair[0]), tensors_in(pair[1])
    assert checkpoint.tensors.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (checkpoint.tensors[name].shape, checkpoint.tensors[name].nbytes) == (tensor.shape, tensor.nbytes)
        found = checkpoint.read(name)
        assert torch.equal(found.view(torch.int16), tensor.view(torch.int16)), name
        assert torch.equal(checkpoint.read(name, (1, 3)), tensor[1:3]), name


def test_going_through_experts_holds_one_at_a_time(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real = module.read_tensor

    def noted(info: Any, *rest: Any) -> Tensor:
        tensor = real(info, *rest)
        held.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(module, "read_tensor", noted)
    monkeypatch.setattr(module, "PIECE", 512)
    source = Checkpoint.open(pair[0])
    assert source.nonfinite() == []
    assert sorted(set(held)) == [2 * WIDTH * HIDDEN, 2 * 2 * WIDTH * HIDDEN]


def test_mxfp4_is_pruned_as_the_bf16_that_it_stands_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = PruneSettings(chunk_tokens=64, block_size=16)
    calibration = tiny.calibration([40, 17, 40, 25, 1, 9])
    reports = [prune(source, tmp_path / source.name, settings, calibration) for source in pair]
    out, plain = (tensors_in(tmp_path / source.name) for source in pair)
    assert out.keys() == plain.keys()
    for name, tensor in plain.items():
        assert out[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(out[name], tensor), name
    made = tmp_path / "mxfp4"
    assert json.loads((made / "config.json").read_text()) == json.loads((pair[1] / "config.json").read_text())
    index = json.loads((made / INDEX).read_text())
    assert index["weight_map"].keys() == plain.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plain.values())
    assert sorted(file.name for file in made.rglob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (made / "original" / "dtypes.json").is_file()
    held_out, damping, *others = reports[1].end["notes"]
    read = "weights in MXFP4 were read and written as bfloat16"
    assert reports[0].end["notes"] == [held_out, damping, read, *others]
    assert verify(made, pair[0]).problems == []
    model: Any = AutoModelForCausalLM.from_pretrained(made)
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_sampling_is_that_of_the_bf16_that_it_stands_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sampled = []
    for source in pair:
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        tiny.save_tokenizer(folder)
        decoder = Decoder(folder)
        assert decoder.stops == {0, 2, 4}
        requests = [Request([5, 6 + number], number) for number in range(3)]
        sampled.append(decoder.decode(requests, Sampling(max_new_tokens=12, temperature=1.0), 2))
    assert sampled[0] == sampled[1]
    assert decoder.model.config._attn_implementation == "rac_decode"


def test_a_plan_needs_only_the_config_of_an_mxfp4_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "model"
    alone.mkdir()
    shutil.copy(pair[0] / "config.json", alone)
    plans = [make_plan(folder, tokens=1000) for folder in (alone, *pair)]
    assert plans[0].weights == plans[1].weights == plans[2].weights
    assert plans[0].memory.host_peak == plans[1].memory.host_peak
    assert plans[1].memory.host_peak - plans[2].memory.host_peak == 2 * WIDTH * HIDDEN  # being read


def drop_scales(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name + "_scales"]


def cut_scales(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_scales"] = tensors[name + "_scales"][:, :-1].contiguous()


def widen_scales(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_scales"] = tensors[name + "_scales"].int()


def regroup(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_blocks"] = tensors[name + "_blocks"].unflatten(3, (2, 8)).flatten(2, 3)
    tensors[name + "_scales"] = tensors[name + "_scales"].repeat_interleave(2, dim=2)


def flatten(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_blocks"] = tensors[name + "_blocks"].flatten(2)


def lose_a_row(tensors: dict[str, Tensor], name: str) -> None:
    for part in ("_blocks", "_scales"):
        tensors[name + part] = tensors[name + part][:, :-1].contiguous()


def lose_blocks(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name + "_blocks"]


def have_both(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(EXPERTS, WIDTH, HIDDEN, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_scales, "has no 'model.layers.1.mlp.experts.down_proj_scales' to be read with; fetch"),
        (cut_scales, r"uint8 \[4, 63, 3\], which does not scale .*_blocks' \[4, 64, 3, 16\] in groups of 32"),
        (widen_scales, "int32 .*does not scale"),
        (regroup, "does not scale .* in groups of 32"),
        (flatten, "does not scale .* in groups of 32"),
        (lose_a_row, r"down_proj' has shape \(4, 96, 63\), config.json says \(4, 96, 64\)"),
        (lose_blocks, "down_proj' is missing"),
        (have_both, "are the same weights"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor], str], None], said: str
) -> None:
    tensors = published(torch.Generator().manual_seed(0))
    spoil(tensors, "model.layers.1.mlp.experts.down_proj")
    with pytest.raises(BadInput, match=said) as raised:
        Model.open(Checkpoint.open(save(tmp_path / "model", tensors, CONFIG)))
    assert "\n" not in str(raised.value)
