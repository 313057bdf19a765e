"""Families that no file describes: found as the described ones are, held against transformers, or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.discovery.discover import Discovered, discover
from rac_engine.models.discovery.holding import hold
from rac_engine.models.discovery.names import renames
from rac_engine.models.discovery.small import Unfit
from rac_engine.models.families import find_family, known_families
from rac_engine.models.model import Model
from rac_engine.models.plans import BlockPlan, Family
from rac_engine.plan.plan import make_plan
from rac_engine.plan.text import render
from rac_engine.recipe.settings import PruneSettings
from tests import tiny

DESCRIBED = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3", "phi3", "granite", "glm4", "exaone"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "hy_v3", "ernie4_5_moe", "mimo_v2_flash", "qwen2_moe"),
)


def config_of(family: str) -> dict[str, Any]:
    """A config.json of a described family."""
    made: dict[str, Any] = json.loads(tiny.config(family).to_json_string(use_diff=False))
    return made


def model_of(family: Family, config: Any) -> Model:
    return Model(Checkpoint(Path(), {}, {}, {}), family, config)


@pytest.fixture(scope="module")
def found() -> Discovered:
    return discover(config_of("gemma2"))


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_described_family_is_found_as_it_is_described(name: str) -> None:
    described = find_family(name)
    assert described is not None
    found = discover(config_of(name))
    hold(found, model_of(found.family, found.config))
    mine, theirs = (model_of(family, found.config) for family in (found.family, described))
    assert mine.shapes() == theirs.shapes()
    assert mine.shapes().keys() <= found.tensors.keys()
    for layer in range(theirs.layers):
        assert mine.groups(layer) == theirs.groups(layer)
        assert [around(plan) for plan in mine.plans(layer)] == [around(plan) for plan in theirs.plans(layer)]
    for what in ("layers", "embedding", "norm", "rotary", "layer", "prefix", "rotary_by_layer_type", "extra_layers"):
        if what != "extra_layers" or found.config.to_dict().get(described.extra_layers or ""):
            assert getattr(found.family, what) == getattr(described, what), what
    for dtype in (torch.float32, torch.bfloat16):
        scales = [family.embedding_scale(tiny.config(name), dtype) for family in (found.family, described)]
        assert scales[0] == scales[1]
    assert found.family.residual_scale(tiny.config(name)) == described.residual_scale(tiny.config(name))


def around(plan: BlockPlan) -> tuple[Any, ...]:
    return plan.module, plan.norm, plan.after, plan.attention, plan.experts


SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
UNDESCRIBED: dict[str, dict[str, Any]] = {
    "helium": {},
    "afmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "moe_intermediate_size": 16,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
    },
}
"""Plain blocks; norms before and after, a gate in the attention, a mixture, scaled embeddings."""


def save(folder: Path, kind: str) -> Path:
    """A tiny random checkpoint of a family that no file describes, as transformers writes it."""
    torch.manual_seed(0)
    made: Any = CONFIG_MAPPING[kind]
    config = made(**SIZES, **UNDESCRIBED[kind], tie_word_embeddings=False, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_a_model_that_no_file_describes_is_pruned_and_that_is_said(tmp_path: Path, kind: str) -> None:
    assert kind not in known_families()
    source = save(tmp_path / "model", kind)
    settings = PruneSettings(method="sparsegpt", chunk_tokens=24, block_size=16)
    calibration = tiny.calibration((40, 17, 25))
    prune(source, tmp_path / "same", settings.model_copy(update={"sparsity": 0.0}), calibration)
    whole, file = "model.safetensors", "rac/metrics.jsonl"
    assert (tmp_path / "same" / whole).read_bytes() == (source / whole).read_bytes()
    report = prune(source, tmp_path / "out", settings, calibration)
    note = f"no description names '{kind}'"
    assert any(note in each for each in report.end["notes"]) and note in (tmp_path / "out" / file).read_text()
    assert verify(tmp_path / "out").problems == []
    before, after = load_file(source / whole), load_file(tmp_path / "out" / whole)
    pruned = {row["name"] for row in report.matrices}
    linears = {
        name
        for name, tensor in before.items()
        if tensor.ndim > 1 and not any(part in name for part in ("router", "lm_head", "embed", "wte"))
    }
    assert pruned == linears
    for name, tensor in after.items():
        if name in pruned:
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
        else:
            assert torch.equal(tensor, before[name])
    assert note in render(make_plan(source, settings, tokens=100))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cohere", "self_attn and mlp are parallel branches"),
        ("gpt2", "attn.c_attn.weight .Conv1D."),
        ("gpt_neox", "behind attention the hidden states are not"),
        ("lfm3", "is recurrent"),
        ("jamba", "JambaAttentionDecoderLayer, JambaMambaDecoderLayer"),
        ("granitemoe", "stored in a form that is not known"),
        ("minicpm3", "multiplied by .* no number of its config"),
        ("glm_moe_dsa", "3 matrices between its first and its last"),
        ("minimax_m3_vl_text", "its config has .*a small model might not show"),  # how many tokens an index keeps
        ("bart", "lies within another model"),
        ("mamba", "no num_attention_heads"),
        ("vit", "no causal language model of that name"),
        ("no_such", "no causal language model of that name"),
    ],
)
def test_what_is_no_row_of_blocks_is_refused_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    made = CONFIG_MAPPING[kind]().to_json_string(use_diff=False) if kind in CONFIG_MAPPING else "{}"
    config = {**json.loads(made), "model_type": kind}
    with pytest.raises(BadInput, match=f"'{kind}' is not known; known are .*; nor could it be traced: .*{reason}"):
        Model.of_config(tmp_path, config)


@pytest.mark.parametrize(
    "changes", [{"n_layers": 1 << 20}, {"num_hidden_layers": 0}, {"num_hidden_layers": 600}, {"hidden_size": 1 << 30}]
)
def test_counts_that_no_model_has_are_refused_at_once(changes: dict[str, int]) -> None:
    with pytest.raises(Unfit, match=r"layers|above"):
        discover({"model_type": "helium", **changes})


def wrong(family: Family, **changes: Any) -> Family:
    return dataclasses.replace(family, blocks=(dataclasses.replace(family.blocks[0], **changes), *family.blocks[1:]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda family: wrong(family, norm="pre_feedforward_layernorm"), "another input"),
        (lambda family: wrong(family, after=None), "another input"),
        (lambda family: wrong(family, after="input_layernorm"), "another input"),
        (lambda family: dataclasses.replace(family, residual_scale=lambda config: 1.01), "another input"),
        (lambda family: dataclasses.replace(family, embedding_scale=lambda config, dtype: 1.0), "embeddings"),
        (lambda family: dataclasses.replace(family, blocks=family.blocks[:1]), "differ"),
        (lambda family: dataclasses.replace(family, renames=(("mlp.", "ffn."),)), "not among those"),
    ],
)
def test_a_wrong_description_does_not_hold(found: Discovered, changed: Callable[[Family], Family], reason: str) -> None:
    hold(found, model_of(found.family, found.config))
    with pytest.raises(Unfit, match=reason):
        hold(found, model_of(changed(found.family), found.config))


def test_a_window_that_the_engine_did_not_keep_would_be_seen(found: Discovered) -> None:
    blind = discover(config_of("gemma2")).config
    assert blind.sliding_window < max(len(ids) for ids in found.sequences)
    blind.sliding_window = 100
    with pytest.raises(Unfit, match=r"o_proj of layer . has another input"):
        hold(found, model_of(found.family, blind))


def test_looking_leaves_no_trace(found: Discovered) -> None:
    """The same family each time, and the numbers that others draw are the same."""
    state = torch.get_rng_state()
    again = discover(config_of("gemma2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.family == found.family
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a.b", "a.b")], ()),
        ([("mlp.gate.w", "moe.gate.w"), ("mlp.up.w", "moe.up.w")], (("mlp", "moe"),)),
        ([("mlp.gate.w", "mlp.router.w"), ("mlp.up.w", "mlp.up.w")], (("mlp.gate", "mlp.router"),)),
        ([("mlp.w", "x"), ("y", "y")], (("mlp.w", "x"),)),
    ],
)
def test_names_that_differ_are_told_by_their_beginnings(
    pairs: list[tuple[str, str]], expected: tuple[tuple[str, str], ...]
) -> None:
    assert renames(pairs) == expected


def test_names_that_no_beginnings_tell_are_refused() -> None:
    with pytest.raises(Unfit, match="on disk"):
        renames([("a", "x"), ("a.b", "y")])
