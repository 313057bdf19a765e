"""The plan: what the engine will touch, from config and index alone."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.models.dtypes import working_dtype
from rac_engine.models.model import Model
from rac_engine.plan import memory
from rac_engine.plan.phases import Machine, Tokens
from rac_engine.plan.plan import make_plan
from rac_engine.plan.shapes import Attention, Shape
from rac_engine.plan.text import render
from rac_engine.plan.work import H200, device_peaks
from rac_engine.recipe.settings import PruneSettings

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
    assert [(len(group.modules), group.columns) for group in plan.groups] == [
        (3, 3584),
        (1, 3584),
        (2, 3584),
        (1, 18944),
    ]
    assert plan.groups[3].bytes == 4 * 18944**2
    assert plan.disk == 2 * plan.parameters + (qwen2_7b / "config.json").stat().st_size


def test_the_arithmetic_is_that_of_the_kernels_limits(qwen2_7b):
    plan = make_plan(qwen2_7b, PruneSettings(method="sparsegpt"), tokens=1_000_000)
    work = {work.name: work.flops for work in plan.work}
    assert work["Hessian"] == 28 * 1e6 * (3 * 3584 * 3585 + 18944 * 18945)
    assert work["factor"] == pytest.approx(28 * (3 * 3584**3 + 18944**3) / 3)
    assert work["sweep"] == 28 * ((4608 + 3584 + 37888) * 3584**2 + 3584 * 18944**2)
    assert work["forward"] == pytest.approx(1.305e16, rel=1e-3)
    matched = make_plan(qwen2_7b, PruneSettings(method="admm"), tokens=1_000_000)
    both = {work.name: work.flops for work in matched.work}
    assert both["forward"] == 2 * work["forward"]
    assert both["outputs to match"] == 28 * 4e6 * (3 * 3584**2 + 18944 * 3584)
    long = make_plan(qwen2_7b, PruneSettings(method="alps"), tokens=1_000_000)
    assert {work.name: work.flops for work in long.work}["mask and weights"] > 300 * 2 * work["sweep"]


def test_experts_outputs_are_matched_by_the_routers_share(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = {"model_type": "mixtral", **sizes, "num_hidden_layers": 2, "num_local_experts": 8, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    work = {work.name: work.flops for work in make_plan(tmp_path, PruneSettings(method="admm"), tokens=1000).work}
    experts = 2 * (64 * 64 + 64 * 96)  # gate and up, then down, of 2 experts a token
    assert work["outputs to match"] == 2 * 1000 * 4 * (64 * 64 + 64 * 64 + experts)  # q k v, and o


def test_memory_follows_tokens_but_not_depth(tmp_path):
    def peak(layers: int, tokens: int) -> int:
        (tmp_path / "config.json").write_text(json.dumps({**QWEN2_7B, "num_hidden_layers": layers}))
        return make_plan(tmp_path, tokens=tokens).peak

    assert peak(4, 100_000) == peak(80, 100_000)
    assert peak(4, 200_000) >= peak(4, 100_000) + 100_000 * 3584 * 2


GIB = 1 << 30
LLAMA_70B = {
    **QWEN2_7B,
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
@pytest.mark.parametrize(
    ("config", "device", "host"), [(QWEN2_7B, 6, 16), (QWEN2_7B, 6, 64), (LLAMA_70B, 14, 24), (LLAMA_70B, 14, 128)]
)
def test_real_shapes_with_long_traces_fit_a_small_gpu(tmp_path, config, device, host, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = PruneSettings(method=method)
    machine = Machine(True, device * GIB, host * GIB)
    plan = make_plan(tmp_path, settings, 1_000_000, 8000, 32_768, machine)
    memory = plan.memory
    assert memory.device_peak <= device * GIB
    assert memory.host_peak <= host * GIB
    assert memory.choice.chunk_tokens >= 1024
    assert memory.choice.place == ("disk" if host < 40 else "host")
    hidden, width = config["hidden_size"], config["hidden_size"]
    streams = 2 if method == "admm" else 1  # the dense model's beside the pruned one's
    assert memory.disk == (1_000_000 * (streams * hidden + width) * 2 if host < 40 else 0)
    by_phase = {phase.name: phase for phase in memory.phases}
    assert by_phase["solve mlp.down_proj"].device["Hessian"] == 4 * config["intermediate_size"] ** 2
    assert "keys and values" in by_phase["observe self_attn.o_proj"].device
    page = render(plan)
    assert f"of {device} GiB" in page and f"of {host} GiB" in page


DEEPSEEK_R1 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("device", [80, 48])
def test_671b_goes_through_one_gpu(tmp_path, device):
    """Of 80 GiB with all of a stage's Hessians at once, of 48 in several passes over the tokens."""
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    settings = PruneSettings(method="sparsegpt")
    machine = Machine(True, device * GIB, 128 * GIB)
    plan = make_plan(tmp_path, settings, 1_000_000, 8000, 32_768, machine, H200)
    assert 660e9 < plan.parameters < 680e9
    memory = plan.memory
    assert memory.device_peak <= device * GIB
    assert memory.host_peak <= 128 * GIB
    assert (memory.choice.hessians is None) == (device == 80)
    together = memory.choice.hessians or 257  # that of all tokens is one of them
    entrance = next(phase for phase in memory.phases if phase.name.startswith("observe mlp.experts.0.gate_proj"))
    # Of the experts at once and of all tokens; a layer's weights beside them.
    assert entrance.device["Hessian"] == 4 * 7168**2 * together
    assert entrance.device["weights of the layer"] > 256 * 3 * 7168 * 2048 * 2
    assert plan.seconds is not None and plan.seconds >= 2 * plan.disk / 1e9
    # Gate and up in as many passes as it takes with that of all tokens among the first, down in one or two.
    passes = 2 if device == 80 else -(-256 // (together - 1)) + -(-256 // (together - 1))
    assert plan.passes == passes and f"{passes} passes over the tokens of each" in render(plan)
    assert ("further passes" in {work.name for work in plan.work}) == (device == 48)
    assert json.loads(plan.to_json())["seconds"] == plan.seconds


def test_lm_head_of_a_large_vocabulary_fits_the_same_small_gpu(qwen2_7b):
    """By runs of its rows: whole, its working copies in fp32 would be 15 GB."""

    def planned(*also):
        settings = PruneSettings(also=list(also))
        return make_plan(qwen2_7b, settings, max_length=32768, machine=Machine(True, 6 << 30))

    plan = planned("lm_head", "embeddings")
    assert plan.matrices == 28 * 7 + 2
    assert plan.weights == make_plan(qwen2_7b).weights + 2 * 152064 * 3584
    assert plan.groups[-1].modules == ["lm_head"]
    solving = plan.memory.phases[-1]
    assert solving.name == "solve lm_head"
    held = 152064 * 3584 * 2
    assert 2 * held < sum(solving.device.values()) <= 6 << 30
    assert solving.host["weights of the layer"] == held
    usual = planned()
    assert {w.name for w in plan.work} == {w.name for w in usual.work}
    more = {w.name: w.flops for w in plan.work}["Hessian"] - {w.name: w.flops for w in usual.work}["Hessian"]
    assert more == pytest.approx(1e6 * 3584 * 3585)


def test_what_does_not_fit_is_refused_in_a_line_that_names_the_phase(qwen2_7b):
    with pytest.raises(BadInput, match=r"^--device-memory 2 GiB: at least .* is needed \(solve mlp.*down_proj\)"):
        make_plan(qwen2_7b, PruneSettings(method="sparsegpt"), machine=Machine(True, 2 * GIB))
    with pytest.raises(BadInput, match=r"^--host-memory 1 GiB: at least .* is needed \("):
        make_plan(qwen2_7b, machine=Machine(True, 12 * GIB, GIB))


def test_less_memory_means_smaller_chunks_and_less_overlap_but_never_more_bytes(qwen2_7b):
    settings = PruneSettings(method="sparsegpt")
    before = None
    for host in (64, 24, 8, 6, 5):
        memory = make_plan(qwen2_7b, settings, machine=Machine(host_limit=host * GIB)).memory
        assert memory.host_peak <= host * GIB
        if before is not None:
            assert memory.host_peak <= before.host_peak
            assert memory.choice.chunk_tokens <= before.choice.chunk_tokens
        before = memory
    assert before is not None and before.choice.place == "disk"


def test_every_size_of_chunks_is_tried_the_small_ones_last(qwen2_7b):
    settings = PruneSettings(method="wanda")
    shape = Shape.of(Model.of_config(qwen2_7b, QWEN2_7B), settings, on_gpu=True)
    choices = [*memory._choices(shape, settings, Tokens(1_000_000, 1024), on_gpu=True, fixed=False)]
    sizes = list(dict.fromkeys(choice.chunk_tokens for choice in choices))
    assert sizes[-3:] == [1024, 512, 256] and sizes == sorted(sizes, reverse=True)
    large = [choice.chunk_tokens >= memory.SMALL_CHUNK for choice in choices]
    assert large == sorted(large, reverse=True)
    assert len(set(choices)) == len(choices)


def test_what_is_free_is_the_limit_where_none_is_given(qwen2_7b):
    settings = PruneSettings(method="sparsegpt", chunk_tokens=16384)
    shape = Shape.of(Model.of_config(qwen2_7b, QWEN2_7B), settings, on_gpu=True)

    def plan(**limits):
        return memory.plan_memory(shape, settings, Tokens(1_000_000, 32_768), Machine(on_gpu=True, **limits))

    ample = plan(device_spare=78 * GIB, host_spare=128 * GIB)
    assert (ample.choice.chunk_tokens, ample.device_limit) == (16384, None)
    tight = plan(device_spare=4 * GIB, host_spare=128 * GIB)
    assert tight.device_peak <= 4 * GIB and tight.choice.chunk_tokens < 16384
    with pytest.raises(BadInput, match=r"^the device has 2 GiB free: at least .* is needed \(solve mlp.*down_proj\)"):
        plan(device_spare=2 * GIB)
    with pytest.raises(BadInput, match=r"^the machine has 1 GiB of memory free: at least .* is needed \("):
        plan(device_limit=12 * GIB, host_spare=GIB)


def test_without_limits_the_chunks_are_those_of_the_settings(qwen2_7b):
    memory = make_plan(qwen2_7b, PruneSettings(chunk_tokens=5000), tokens=100_000_000).memory
    assert memory.choice.chunk_tokens == 5000


def test_time_is_arithmetic_at_half_the_peaks_or_the_disks(qwen2_7b):
    peaks = {"bf16": 1e12, "fp32": 5e11, "bytes": 1e11}
    plan = make_plan(qwen2_7b, PruneSettings(method="sparsegpt"), peaks=peaks)
    assert plan.seconds is not None
    assert plan.seconds > 2 * sum(work.flops for work in plan.work) / 1e12
    assert make_plan(qwen2_7b, PruneSettings(method="magnitude"), peaks=peaks).seconds == 2 * plan.disk / 1e9


def test_activations_are_priced_at_the_rate_of_their_number_format(qwen2_7b):
    def seconds(dtype, bf16):
        peaks = {"bf16": bf16, "fp16": bf16, "fp32": 1e12, "bytes": 1e11}
        plan = make_plan(qwen2_7b, PruneSettings(method="sparsegpt", dtype=dtype), peaks=peaks)
        assert plan.seconds is not None
        return plan.seconds

    assert seconds("bfloat16", 1e12) == seconds("float32", 1e12) == seconds("float32", 4e12)
    # All but factors and sweeps, which are a hundredth of it.
    assert seconds("bfloat16", 4e12) == pytest.approx(seconds("float32", 4e12) / 4, rel=0.1)


def test_a_plan_without_a_limit_says_what_the_heap_keeps(qwen2_7b):
    def said(machine):
        page = render(make_plan(qwen2_7b, tokens=20_000, machine=machine))
        return [line for line in page.splitlines() if "freed memory is kept" in line]

    memory = make_plan(qwen2_7b, tokens=20_000).memory
    chunk = max(phase.host.get("activations of a chunk", 0) for phase in memory.phases)
    (line,) = said(Machine())
    assert chunk and f"up to {format_bytes(2 * chunk)} more" in line
    assert not said(Machine(host_limit=64 << 30)) and not said(Machine(True, 24 << 30))


def test_a_cpu_has_the_peaks_of_what_the_engine_computes_in():
    peaks, _ = device_peaks(on_gpu=False)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        assert (peaks[name] == peaks["fp32"]) == (working_dtype(dtype, on_gpu=False) == torch.float32)
    assert all(rate > 0 for rate in peaks.values())


def test_what_times_rest_on_is_said_of_a_busy_machine_too(monkeypatch):
    """Peaks are measured by processor time; what other work does to them is said."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for load, said in ((0.3, ""), (11.0, "its load is 11.0 on 2 cores now: with that it takes 6.5 × as long")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        _, whose = device_peaks(on_gpu=False)
        assert whose.startswith("this CPU with 2 threads") and (said in whose) and (bool(said) == ("load" in whose))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_checkpoint_and_its_config_alone_give_the_same_plan(checkpoint, family, tmp_path):
    folder = checkpoint(family)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole, bare = make_plan(folder, tokens=1000), make_plan(tmp_path, tokens=1000)
    assert (whole.groups, whole.memory, whole.work, whole.parameters) == (
        bare.groups,
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


def test_every_name_that_the_page_prints_names_matrices(checkpoint):
    printed = re.findall(r"\S+_proj", render(make_plan(checkpoint())))
    assert {"self_attn.q_proj", "v_proj", "mlp.down_proj"} <= set(printed)
    for name in printed:
        assert len(make_plan(checkpoint(), PruneSettings(dense=[name])).left_dense) == 3


@pytest.mark.parametrize(("method", "kinds"), [("wanda", ["forward", "attention", "norms"]), ("magnitude", [])])
def test_methods_cost_what_they_need(checkpoint, method, kinds):
    plan = make_plan(checkpoint(), PruneSettings(method=method), tokens=1000)
    assert [work.name for work in plan.work] == kinds
    assert plan.groups[0].bytes == (4 * 48 if kinds else 0)


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


def test_attention_is_planned_by_the_layer_with_the_most_keys(checkpoint):
    """MiMo has twice the keys in the layers with a sliding window, and values narrower than keys."""
    attention = Attention.of(Model.open(Checkpoint.open(checkpoint("mimo_v2_flash"))))
    assert (attention.queries, attention.key_values, attention.widths) == (4 * 12, 2 * 12 + 2 * 8, 12 + 8)
    assert Attention.of(Model.open(Checkpoint.open(checkpoint("qwen2_moe", use_sliding_window=False)))).window is None


@pytest.mark.parametrize(("family", "columns"), [("nemotron_h", 4 * 12), ("qwen2", 3 * 48)])
def test_attention_is_counted_in_the_layers_that_have_one(checkpoint, family, columns):
    """Nemotron H has it in one layer of five."""
    plan = make_plan(checkpoint(family), PruneSettings(method="wanda", order="staged"), tokens=1000, length=100)
    found = {work.name: work for work in plan.work}["attention"]
    passes = 2 if "2 models" in plan.work[0].rule else 1
    assert found.flops == 2 * columns * 100 * 1000 * passes


def test_a_plan_says_how_tokens_are_sampled(tmp_path: Path) -> None:
    """7B through 6 GiB of a GPU: a step takes what the weights that are not kept take over the link."""
    config = {
        **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = make_plan(tmp_path, machine=Machine(True, 6 << 30, 32 << 30))
    assert not isinstance(plan.sampling, str)
    assert plan.sampling.device_peak <= 6 << 30 and plan.sampling.host_peak <= 32 << 30
    assert plan.sampling.seconds >= plan.sampling.linked / 25e9
    text = render(plan)
    assert "of weights over the link" in text and "tokens/s" in text
