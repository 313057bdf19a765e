"""Every family is a file, found by its name, and stands in the table for users; the plain ones are tested here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from rac_engine.base.errors import BadInput
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.stream import Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.models import configs
from rac_engine.models.chunk import Chunk
from rac_engine.models.families import find_family, known_families
from rac_engine.models.model import Model
from rac_engine.models.plans import Family
from rac_engine.recipe.settings import PruneSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Request, Sampling
from tests import tiny

Make = Callable[..., Path]
DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"
ALIASES = {"kimi_k2": "deepseek_v3"}
"""Families that transformers knows under another name only."""
WITHIN = ["qwen3_vl_text"]
"""Families that are found within another model only: test_wrappers.py has them."""
CALIBRATION = tiny.calibration((40, 17, 25, 1, 9))
FIRST, LAST = "model.layers.0.", "model.layers.1."
ON_DISK: dict[str, tuple[str, ...]] = {
    "glm4_moe": (LAST + "mlp.gate.e_score_correction_bias", LAST + "mlp.shared_experts.up_proj.weight"),
    "minimax_m2": (FIRST + "block_sparse_moe.e_score_correction_bias", FIRST + "block_sparse_moe.experts.3.w2.weight"),
    "qwen2_moe": (FIRST + "mlp.shared_expert_gate.weight", FIRST + "mlp.shared_expert.up_proj.weight"),
    "glm4_moe_lite": (LAST + "mlp.gate.e_score_correction_bias", FIRST + "self_attn.kv_a_proj_with_mqa.weight"),
    "ernie4_5_moe": (LAST + "mlp.moe_statics.e_score_correction_bias", LAST + "mlp.experts.3.down_proj.weight"),
    "hunyuan_v1_dense": (FIRST + "self_attn.query_layernorm.weight",),
    "hunyuan_v1_moe": (FIRST + "mlp.gate.wg.weight", FIRST + "mlp.shared_mlp.up_proj.weight"),
    "glm": (FIRST + "mlp.gate_up_proj.weight",),
    "glm4": (FIRST + "mlp.gate_up_proj.weight", FIRST + "post_self_attn_layernorm.weight"),
    "exaone_moe": (LAST + "mlp.e_score_correction_bias", LAST + "mlp.shared_experts.up_proj.weight"),
    "dots1": (LAST + "mlp.gate.e_score_correction_bias",),
    "phimoe": (FIRST + "block_sparse_moe.gate.weight", FIRST + "block_sparse_moe.experts.3.w3.weight", "lm_head.bias"),
    "apertus": (FIRST + "mlp.act_fn.alpha_p", FIRST + "mlp.act_fn.beta", FIRST + "attention_layernorm.weight"),
    "starcoder2": (FIRST + "mlp.c_fc.bias", "model.norm.bias"),
    "stablelm": (FIRST + "self_attn.q_layernorm.norms.3.weight", "model.norm.bias"),
    "mimo_v2_flash": (LAST + "self_attn.attention_sink_bias", LAST + "mlp.gate.e_score_correction_bias"),
    "hy_v3": (LAST + "mlp.router.gate.weight", LAST + "mlp.expert_bias", LAST + "mlp.shared_mlp.up_proj.weight"),
}
"""Names that published checkpoints have and transformers' modules have not, or that other families lack."""


PUBLISHED: dict[str, tuple[int, float, str]] = {
    "nemotron": (
        4,
        1.0,
        """
        {"partial_rotary_factor": 0.5, "rope_percent": 0.5, "norm_eps": 1e-05, "hidden_act": "relu2"}""",
    ),
    "stablelm": (
        2,
        1.0,
        """
        {"partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": true}""",
    ),
    "glm4_moe_lite": (
        4,
        1.0,
        """
        {"first_k_dense_replace": 1, "n_routed_experts": 4, "topk_method": "noaux_tc", "partial_rotary_factor": 1.0,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "rope_scaling": null}""",
    ),
    "deepseek_v2": (
        4,
        1.0,
        """
        {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "q_lora_rank": null, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"}}""",
    ),
    "phimoe": (
        8,
        1.243163121016122,
        """
        {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 131072,
        "attention_bias": true, "lm_head_bias": true, "num_local_experts": 4, "rope_theta": 10000.0,
        "rope_scaling": {"long_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096, "short_factor": [1, 1, 1, 1, 1, 1, 1, 1],
        "short_mscale": 1.243163121016122, "type": "longrope"}}""",
    ),
    "internlm3": (
        8,
        1.0,
        """
        {"qkv_bias": false, "bias": false, "head_dim": 16,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}}""",
    ),
    "minimax_m2": (
        4,
        1.0,
        """
        {"head_dim": 16, "rotary_dim": 8, "rope_theta": 5000000, "num_local_experts": 4}""",
    ),
}
"""Pairs of elements and factor of the rotary embedding, and the part of a published config.json that decides them."""


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def settings(**changes: Any) -> PruneSettings:
    return PruneSettings(**{"method": "sparsegpt", "chunk_tokens": 24, "block_size": 16, **changes})


def test_every_family_is_tested_against_transformers() -> None:
    assert known_families() == sorted([*tiny.FAMILIES, *tiny.PLAIN, *ALIASES, *WITHIN])


@pytest.mark.parametrize("name", known_families())
def test_a_file_defines_the_family_of_its_name(name: str) -> None:
    family = find_family(name)
    assert isinstance(family, Family) and family.model_type == name


def test_the_table_for_users_names_every_family() -> None:
    table = DOCUMENT.read_text().partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == known_families()


@pytest.mark.parametrize("kind", [None, 3, ["qwen2"], {}, "", "__init__", "plans", "../plans", "qwen2.x", "mamba"])
def test_what_is_no_family_is_none(kind: object) -> None:
    assert find_family(kind) is None


@pytest.mark.parametrize("family", tiny.PLAIN)
@torch.inference_mode()
def test_hidden_states_in_parts_are_those_of_transformers(checkpoint: Make, family: str) -> None:
    folder = checkpoint(family, dtype=torch.float32, shard_size="1GB")
    model = Model.open(Checkpoint.open(folder))
    assert set(ON_DISK.get(family, ())) <= model.checkpoint.tensors.keys()
    stream = Stream(model, Packing.of(CALIBRATION, 24), model.dtype)
    for layer in range(model.layers):
        tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
        for block in model.build_layer(layer, tensors, model.dtype, "cpu"):
            stream.advance(block)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").model
    start = 0
    for length in (length for chunk in stream.packing.chunks if not chunk.offset for length in chunk.lengths):
        wanted = theirs(stream.packing.token_ids[start : start + length][None]).last_hidden_state[0]
        names = [model.family.norm.removeprefix("model.").removesuffix(".weight"), "norm"]
        norm = next(theirs.get_submodule(name) for name in names if hasattr(theirs, name))
        found = norm(stream.hidden.read(start, start + length))
        # A recurrent mixer adds up a sequence in parts in another order than at once.
        recurrent = any(plan.recurrent for layer in range(model.layers) for plan in model.plans(layer))
        assert float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < (1e-4 if recurrent else 1e-5)
        start += length
    assert start == len(stream.hidden)


@pytest.mark.parametrize("family", tiny.PLAIN)
def test_half_of_every_matrix_is_pruned_and_nothing_else(checkpoint: Make, tmp_path: Path, family: str) -> None:
    """At sparsity 0 the file comes out byte for byte; what comes out at 50% decodes as transformers generates."""
    source, same, out = checkpoint(family, shard_size="1GB"), tmp_path / "same", tmp_path / "out"
    prune(source, same, settings(sparsity=0), CALIBRATION)
    assert (same / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    report = prune(source, out, settings(), CALIBRATION)
    before, after = load(source), load(out)
    pruned = {row.get("tensor", row["name"]) for row in report.matrices}
    kept = [
        "router.layer.weight",
        "mlp.gate.weight",
        "router.gate.weight",
        "moe.gate.weight",
        "wg.weight",
        "expert_gate.weight",
        "_bias",
    ]
    kept += [
        "router.layer.weight",
        "in_proj_a.weight",
        "in_proj_b.weight",
        "in_proj_ba.weight",
        "conv1d.weight",
        "conv.conv.weight",
    ]
    matrices = {
        name
        for name in before
        if name.startswith(Model.open(Checkpoint.open(source)).family.layers) and before[name].ndim > 1
    }
    assert pruned == {name for name in matrices if not name.endswith(tuple(kept)) and "layernorm" not in name}
    for name, tensor in after.items():
        if name in pruned:
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
        else:
            assert torch.equal(tensor, before[name])
    GenerationConfig().save_pretrained(out)
    decoder = Decoder(tiny.save_tokenizer(out), dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompts = [torch.arange(length) % tiny.VOCABULARY for length in (14, 3)]
    wanted = [
        model.generate(prompt[None], do_sample=False, max_new_tokens=6, eos_token_id=None)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    decoder.stops = frozenset()
    done = decoder.decode([Request(prompt.tolist(), 0) for prompt in prompts], Sampling(6, temperature=0), 2)
    assert [completion.token_ids for completion in done] == wanted


def change(source: Path, folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A copy of a checkpoint with other tensors or with `changes` of its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "part", "note"),
    [
        ("glm4_moe", "model.layers.2.eh_proj.weight", "layer 2 predicts further tokens"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight", "model.mtp_* predicts further tokens"),
        ("exaone_moe", "mtp.layers.0.mlp.up_proj.weight", "mtp.* predicts further tokens"),
        ("mimo_v2_flash", "model.mtp.layers.0.eh_proj.weight", "model.mtp.* predicts further tokens"),
    ],
)
def test_what_only_predicts_further_tokens_is_copied_and_noted(
    checkpoint: Make, tmp_path: Path, family: str, part: str, note: str
) -> None:
    source = checkpoint(family, shard_size="1GB")
    more = {**load(source), part: torch.randn(32, 64, dtype=torch.bfloat16)}
    folder = change(source, tmp_path / "model", more)
    report = prune(folder, tmp_path / "out", settings(method="magnitude"))
    assert any(note in found for found in report.end["notes"])
    assert torch.equal(load(tmp_path / "out")[part], more[part])


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("stablelm", {"use_parallel_residual": True}, "no row of blocks"),
        ("phimoe", {"sliding_window": 9}, "full attention only"),
    ],
)
def test_what_a_family_is_not_described_for_is_refused(
    checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    folder = change(checkpoint(family, shard_size="1GB"), tmp_path / "model", **changes)
    with pytest.raises(BadInput, match=reason):
        Model.open(Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("minimax_m2", ("gate.weight", "e_score_correction_bias")),
        ("glm4_moe", ("gate.weight", "gate.e_score_correction_bias")),
        ("ernie4_5_moe", ("gate.weight", "gate.moe_statics.e_score_correction_bias")),
        ("hunyuan_v1_moe", ("gate.wg.weight",)),
    ],
)
def test_routers_are_used_in_fp32_in_a_bf16_model(
    checkpoint: Make, tmp_path: Path, family: str, router: tuple[str, ...]
) -> None:
    """Pruned and sampled with what the file has, though transformers rounds what no list of its own names."""
    source = checkpoint(family, shard_size="1GB")
    wide = {
        name: tensor.float() * 1.001 for name, tensor in load(source).items() if name.endswith(("_bias", "gate.weight"))
    }
    folder = change(source, tmp_path / "model", {**load(source), **wide})
    model, last = Model.open(Checkpoint.open(folder)), 1
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(last)}
    module = model.build_layer(last, tensors, torch.bfloat16, "cpu")[1]._module
    sampled = Decoder(tiny.save_tokenizer(folder), dtype=torch.bfloat16).model.model.layers[last].mlp
    for name in router:
        ours, theirs = module.state_dict()[name], sampled.state_dict()[name]
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", PUBLISHED)
def test_rotary_embeddings_are_those_of_published_configs(tmp_path: Path, family: str) -> None:
    pairs, factor, fields = PUBLISHED[family]
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = {"model_type": family, "vocab_size": 64, "num_key_value_heads": 4, "torch_dtype": "bfloat16"}
    model = Model.of_config(tmp_path, {**config, **sizes, **json.loads(fields)})
    turned = model._positions(torch.ones(1, 3, 64), Chunk(0, 3, (3,)), 0)
    cosines = turned.real if isinstance(turned, Tensor) else turned[0][..., : turned[0].shape[-1] // 2]
    assert cosines.shape == (1, 3, pairs)
    assert float(cosines[0, 0, 0]) == pytest.approx(factor)


def test_a_family_that_this_transformers_has_not_is_named(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("hy_v3", shard_size="1GB")
    monkeypatch.setattr(configs, "CONFIG_MAPPING", {})
    with pytest.raises(BadInput, match=r"config.json: transformers \S+ has no hy_v3 models; a newer one may have"):
        Model.open(Checkpoint.open(folder))


def test_mistral_with_layer_types_is_ministral_as_for_transformers(checkpoint: Make, tmp_path: Path) -> None:
    folder = change(checkpoint("ministral", shard_size="1GB"), tmp_path / "model", model_type="mistral")
    assert Model.open(Checkpoint.open(folder)).family.model_type == "ministral"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "ministral"


def test_kimi_k2_is_a_deepseek_v3_that_keeps_its_name(checkpoint: Make, tmp_path: Path) -> None:
    """Published with code of its own, which is never run."""
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    named: dict[str, Any] = {"model_type": "kimi_k2", "auto_map": code}
    folder = change(checkpoint("deepseek_v3", shard_size="1GB"), tmp_path / "model", **named)
    prune(folder, tmp_path / "out", settings(), CALIBRATION)
    prune(checkpoint("deepseek_v3", shard_size="1GB"), tmp_path / "same", settings(), CALIBRATION)
    assert all(torch.equal(tensor, load(tmp_path / "same")[name]) for name, tensor in load(tmp_path / "out").items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["auto_map"]) == ("kimi_k2", code)
    said = []
    for name in ("out", "same"):
        GenerationConfig().save_pretrained(tmp_path / name)
        decoder = Decoder(tiny.save_tokenizer(tmp_path / name))
        assert type(decoder.model).__name__ == "DeepseekV3ForCausalLM"
        said.append(decoder.decode([Request([3, 5, 8], 0)], Sampling(12, temperature=0), 1))
    assert said[0] == said[1]


def test_a_tokenizer_that_is_code_is_not_run_but_named(checkpoint: Make, tmp_path: Path) -> None:
    """Kimi K2 and Hunyuan A13B publish theirs so."""
    folder = change(checkpoint("deepseek_v3", shard_size="1GB"), tmp_path / "model", model_type="kimi_k2")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('it was run')\n")
    said = {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_kimi.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(BadInput, match=r"is code .* never run; put a tokenizer in its place"):
        Decoder(folder)


def test_floats_that_json_lacks_are_read_in_the_form_transformers_writes(checkpoint: Make, tmp_path: Path) -> None:
    """Granite hybrids have one in `time_step_limit`, where a dict would be an error."""
    folder = checkpoint("olmoe", shard_size="1GB")
    changed = change(folder, tmp_path / "model", clip_qkv={"__float__": "Infinity"}, lists=[{"__float__": "-Infinity"}])
    config = Model.open(Checkpoint.open(changed)).config
    assert (config.clip_qkv, config.lists) == (float("inf"), [float("-inf")])
