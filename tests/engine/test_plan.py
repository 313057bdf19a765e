"""The plan: what the engine will touch, from config and index alone."""

from __future__ import annotations

import json
import math

import pytest

from rac_engine.errors import BadInput
from rac_engine.plan import make_plan, render
from rac_engine.recipe import PruneSettings

QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def qwen2_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B))
    return tmp_path


def test_a_config_alone_is_enough_for_a_plan(qwen2_7b):
    plan = make_plan(qwen2_7b, tokens=1_000_000)
    assert plan.parameters == 7_615_616_512  # as published
    assert plan.matrices == 28 * 7
    assert [(len(stage.modules), stage.columns) for stage in plan.stages] == [
        (3, 3584),
        (1, 3584),
        (2, 3584),
        (1, 18944),
    ]
    assert plan.stages[3].bytes == 4 * 18944**2
    assert plan.disk == 2 * plan.parameters + (qwen2_7b / "config.json").stat().st_size


def test_the_arithmetic_is_that_of_the_kernels_limits(qwen2_7b):
    work = {work.name: work.flops for work in make_plan(qwen2_7b, tokens=1_000_000).work}
    assert work["Hessian"] == 28 * 1e6 * (3 * 3584 * 3585 + 18944 * 18945)
    assert work["factor"] == pytest.approx(28 * (3 * 3584**3 + 18944**3) / 3)
    assert work["sweep"] == 28 * ((4608 + 3584 + 37888) * 3584**2 + 3584 * 18944**2)
    assert work["forward"] == pytest.approx(1.305e16, rel=1e-3)


def test_memory_follows_tokens_but_not_depth(tmp_path):
    def peak(layers: int, tokens: int) -> int:
        (tmp_path / "config.json").write_text(json.dumps({**QWEN2_7B, "num_hidden_layers": layers}))
        return make_plan(tmp_path, tokens=tokens).peak

    assert peak(4, 100_000) == peak(80, 100_000)
    assert peak(4, 200_000) >= peak(4, 100_000) + 100_000 * 3584 * 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_checkpoint_and_its_config_alone_give_the_same_plan(checkpoint, family, tmp_path):
    folder = checkpoint(family)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole, bare = make_plan(folder, tokens=1000), make_plan(tmp_path, tokens=1000)
    assert (whole.stages, whole.memory, whole.work, whole.parameters) == (
        bare.stages,
        bare.memory,
        bare.work,
        bare.parameters,
    )


def test_what_is_left_dense_is_counted_out_and_named(checkpoint):
    settings = PruneSettings(dense=["mlp.down_proj", r"model\.layers\.0\..*"])
    plan = make_plan(checkpoint(), settings)
    assert plan.matrices == 2 * 6
    assert len(plan.left_dense) == 7 + 2
    assert "left dense by 'mlp.down_proj': model.layers." in render(plan)


@pytest.mark.parametrize(("method", "kinds"), [("wanda", ["forward", "attention", "norms"]), ("magnitude", [])])
def test_methods_cost_what_they_need(checkpoint, method, kinds):
    plan = make_plan(checkpoint(), PruneSettings(method=method), tokens=1000)
    assert [work.name for work in plan.work] == kinds
    assert plan.stages[0].bytes == (4 * 48 if kinds else 0)


def test_the_page_and_the_json_say_the_same(checkpoint):
    plan = make_plan(checkpoint(), tokens=1000)
    page = render(plan)
    assert "self_attn.q_proj, k_proj, v_proj" in page and "n³/3" in page
    told = json.loads(plan.to_json())
    assert told["peak"] == plan.peak
    assert math.isclose(sum(work["flops"] for work in told["work"]), sum(work.flops for work in plan.work))


@pytest.mark.parametrize(
    ("config", "said"),
    [(None, "config.json"), ("{", "not valid JSON"), ('{"model_type": "gpt9"}', "model_type 'gpt9' is not known")],
)
def test_what_cannot_be_planned_is_named(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=said):
        make_plan(tmp_path)


def test_settings_that_do_not_fit_the_model_are_refused(checkpoint):
    with pytest.raises(BadInput, match="names no matrix"):
        make_plan(checkpoint(), PruneSettings(dense=["nonsense"]))
    with pytest.raises(BadInput, match="pattern 3:7"):
        make_plan(checkpoint(), PruneSettings(pattern="3:7"))
