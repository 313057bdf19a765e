"""Extra effort for patterns that keep little: blocks tuned as a whole, inner neurons in an order that suits them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rac_engine.base.errors import Interrupted
from rac_engine.calibrate import tuning
from rac_engine.calibrate.activations import Place, Storage
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.stream import Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.recipe.settings import PruneSettings
from rac_engine.solve.method import Solution
from rac_engine.solve.methods import admm, wanda
from rac_engine.traces.calibration import Calibration
from rac_engine.traces.held_out import hold_out
from rac_kernels import packed_attention
from rac_kernels.ops.attention import is_fused
from rac_kernels.solvers import tuning as steps
from tests import tiny

Make = Callable[..., Path]
EPOCHS = admm.METHOD.epochs


def settings(**changes: Any) -> PruneSettings:
    return PruneSettings(**{"chunk_tokens": 64, "pattern": "1:4", **changes})


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.inference_mode()
def drift(dense: Path, pruned: Path, calibration: Calibration) -> float:
    """‖hidden′ − hidden‖² / ‖hidden‖² behind the last layer, in fp32, each token with its weight."""
    sums = torch.zeros(2, dtype=torch.float64)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (dense, pruned)]
    seen: list[Tensor] = []
    for model in models:
        model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double()))
    for sequence in calibration.sequences:
        weights = torch.ones(len(sequence.token_ids)) if sequence.weights is None else torch.tensor(sequence.weights)
        seen.clear()
        for model in models:
            model(torch.as_tensor(sequence.token_ids)[None])
        wanted, given = seen
        sums += torch.stack([part.square().sum(1) @ weights.double() for part in (given - wanted, wanted)])
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_block_without_experts_comes_nearer_on_its_mask(checkpoint: Make, tmp_path: Path, family: str) -> None:
    source = checkpoint(family)
    rows = {}
    for epochs in (0, 4):
        rows[epochs] = prune(source, tmp_path / str(epochs), settings(tune=epochs), tiny.calibration()).matrices
    assert not any("tuned" in row for row in rows[0])
    routed = {row["layer"] for row in rows[4] if "expert" in row or "shared_expert" in row["module"]}
    for row in rows[4]:
        if row["layer"] in routed and not row["module"].startswith(("self_attn", "linear_attn")):
            assert "tuned" not in row
        else:
            assert row["tuned"]["after"] < 0.99 * row["tuned"]["before"] < 1, row["name"]
    before, after = load(tmp_path / "0"), load(tmp_path / "4")
    block = rows[4][0]["module"].partition(".")[0]
    first = [row["name"] for row in rows[4] if row["layer"] == 0 and row["module"].startswith(block)]
    assert first
    for name in first:  # what comes before them is the same in both
        assert not torch.equal(before[name], after[name])
        assert torch.equal(before[name] == 0, after[name] == 0)
    assert verify(tmp_path / "4", source).problems == []


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_that_of_transformers_hidden_states(checkpoint: Make, tmp_path: Path, weighted: bool) -> None:
    source, calibration = checkpoint("qwen2"), tiny.weighted() if weighted else tiny.calibration()
    report = prune(source, tmp_path / "out", settings(dtype="float32"), calibration)  # 1:4 is tuned by default
    said = report.matrices[-1]["tuned"]["after"]
    assert said == pytest.approx(drift(source, tmp_path / "out", calibration), rel=1e-4)
    assert any(f"blocks tuned for {EPOCHS} epochs" in note for note in report.end["notes"])
    prune(source, tmp_path / "plain", settings(dtype="float32", tune=0), calibration)
    assert said < 0.9 * drift(source, tmp_path / "plain", calibration)


def test_what_tuning_makes_worse_is_not_kept(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("qwen2")
    prune(source, tmp_path / "plain", settings(tune=0), tiny.calibration())
    monkeypatch.setattr(steps, "RATE", 50.0)
    report = prune(source, tmp_path / "spoilt", settings(tune=1), tiny.calibration())
    assert all(row["tuned"]["before"] == row["tuned"]["after"] for row in report.matrices)
    plain, spoilt = load(tmp_path / "plain"), load(tmp_path / "spoilt")
    assert all(torch.equal(plain[name], spoilt[name]) for name in plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_job_stopped_while_it_tunes_ends_with_the_same_bytes(checkpoint: Make, tmp_path: Path, dtype: str) -> None:
    """In fp32 it shows whether the dense model's tokens went through the layer before in the same order of neurons."""
    source, calibration = checkpoint("qwen2"), tiny.calibration()
    prune(source, tmp_path / "whole", settings(tune=2, dtype=dtype), calibration)

    def stop(said: str) -> None:
        if said.startswith("layer 2/3: tuning mlp"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prune(source, tmp_path / "out", settings(tune=2, dtype=dtype), calibration, progress=stop)
    assert prune(source, tmp_path / "out", settings(tune=2, dtype=dtype), calibration).resumed == 1
    whole, out = load(tmp_path / "whole"), load(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_it_makes_no_difference_where_activations_live(checkpoint: Make, tmp_path: Path) -> None:
    """In fp32, of which what is read needs no conversion: sequences of a batch must not lie in one buffer."""
    model = Model.open(Checkpoint.open(checkpoint("qwen2", dtype=torch.float32)))
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(0)}
    packing, found = Packing.of(tiny.weighted(), 64), []
    places: tuple[Place, ...] = ("host", "disk")
    for place in places:
        with torch.inference_mode():
            block, dense = (model.build_layer(0, tensors, torch.float32, "cpu")[1] for _ in range(2))
            stream, wanted = (Stream(model, packing, torch.float32, Storage("cpu", place, tmp_path)) for _ in range(2))
            wanted.advance(dense)
            weights = {name: linear.get_parameter("weight").clone() for name, linear in block.linears.items()}
            for weight in weights.values():
                weight[:, ::2] = 0
            found.append(tuning.tune(stream, wanted, block, weights, 2))
    host, disk = found
    assert host is not None and disk is not None
    assert (host.before, host.after) == (disk.before, disk.after) and host.after < host.before
    assert all(torch.equal(host.weights[name], disk.weights[name]) for name in weights)


def test_under_autocast_attention_is_one_that_a_gpu_has_a_fused_kernel_for(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU tunes: the rotary step leaves queries and keys in fp32 beside values in bf16."""
    model = Model.open(Checkpoint.open(checkpoint("qwen2")))
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(0)}
    fused: list[bool] = []
    monkeypatch.setattr(tuning, "_computing", lambda stream: torch.autocast("cpu", torch.bfloat16))

    def attention(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
        assert q.dtype == k.dtype == v.dtype
        fused.append(is_fused(torch.device("cuda"), q.dtype, q.shape[2], None))
        return packed_attention(q, k, v, *given)

    monkeypatch.setattr("rac_engine.models.attention.packed_attention", attention)
    with torch.inference_mode():
        block, dense = (model.build_layer(0, tensors, torch.bfloat16, "cpu")[0] for _ in range(2))
        stream, wanted = (Stream(model, Packing.of(tiny.calibration(), 64), torch.bfloat16) for _ in range(2))
        wanted.advance(dense)
        fused.clear()
        weights = {name: linear.get_parameter("weight") * 0.9 for name, linear in block.linears.items()}
        found = tuning.tune(stream, wanted, block, weights, 1)
    assert found is not None and math.isfinite(found.after)
    assert fused and all(fused)


def test_the_epoch_that_is_best_for_what_is_held_out_is_kept(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors made up: nothing is kept where no epoch is better, and else that of the best."""
    model = Model.open(Checkpoint.open(checkpoint("qwen2", dtype=torch.float32)))
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(0)}
    calibration = hold_out(tiny.calibration((20, 30, 9, 12, 17) * 8), 0.05).calibration
    measured = tuning._error

    def tuned(epochs: int, errors: list[float]) -> tuning.Tuned:
        judged = iter(errors)

        def error(stream: Stream, wanted: Stream, block: Block, some: Sequence[tuple[int, int]], size: int) -> float:
            assert all(start >= stream.packing.held_from for start, _ in some)
            assert measured(stream, wanted, block, some, size) >= 0
            return next(judged)

        monkeypatch.setattr(tuning, "_error", error)
        with torch.inference_mode():
            block, dense = (model.build_layer(0, tensors, torch.float32, "cpu")[1] for _ in range(2))
            stream, wanted = (Stream(model, Packing.of(calibration, 64), torch.float32) for _ in range(2))
            wanted.advance(dense)
            weights = {name: linear.get_parameter("weight") * 0.9 for name, linear in block.linears.items()}
            found = tuning.tune(stream, wanted, block, weights, epochs)
        assert found is not None and next(judged, None) is None
        return found

    best = tuned(3, [1.0, 0.9, 0.8, 0.85, 0.8])  # before, behind each epoch, and as it is stored
    assert (best.epochs, best.before, best.after) == (2, 1.0, 0.8)
    longer = tuned(3, [1.0, 0.9, 0.8, 0.7, 0.7])
    assert longer.epochs == 3
    assert any(not torch.equal(best.weights[name], longer.weights[name]) for name in best.weights)
    worse = tuned(2, [1.0, 1.1, math.nan])
    assert (worse.epochs, worse.after, worse.weights) == (0, 1.0, {})


def test_what_is_left_dense_in_a_tuned_block_stays(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    report = prune(source, tmp_path / "out", settings(dense=[".*o_proj", ".*mlp.*"]), tiny.calibration())
    assert {row["module"] for row in report.matrices if "tuned" in row} == {
        f"self_attn.{name}_proj" for name in ("q", "k", "v")
    }
    assert all(row["tuned"]["after"] < row["tuned"]["before"] for row in report.matrices if "tuned" in row)
    assert verify(tmp_path / "out", source).problems == []


def test_of_a_sequence_in_parts_attention_sees_the_first_and_an_mlp_all() -> None:
    packing = Packing.of(tiny.calibration([70, 20, 9, 3]), 32)
    assert tuning.sequences_of(packing.chunks, attention=True) == [(0, 32), (70, 20), (90, 9), (99, 3)]
    every = tuning.sequences_of(packing.chunks, attention=False)
    assert every == [(0, 32), (32, 32), (64, 6), (70, 20), (90, 9), (99, 3)]
    for size in (1, 30, 64, 1000):
        batches = list(tuning.batches_of(every, size))
        assert sorted(each for some in batches for each in some) == every
        assert all(len(some) == 1 or sum(length for _, length in some) <= size for some in batches)


def test_tuning_is_for_patterns_that_keep_little_unless_asked_for() -> None:
    assert all(settings(pattern=pattern).epochs == EPOCHS > 0 for pattern in ("1:4", "2:8"))
    assert not any(settings(pattern=pattern).epochs for pattern in ("2:4", "4:8", "1:3"))
    assert settings(pattern=None, sparsity=0.9).epochs == 0
    assert settings(pattern=None, sparsity=0.9, tune=3).epochs == 3
    assert settings(tune=0).epochs == 0
    assert settings(method="sparsegpt").epochs == settings(order="layer").epochs == 0
    assert settings(reconstruct="layer").epochs == 0
    with pytest.raises(ValueError, match="tune: 2 needs the dense model beside"):
        settings(method="sparsegpt", tune=2)
    assert settings(method="sparsegpt", reconstruct="dense", tune=2).epochs == 2
    assert settings().reorders and settings(pattern="2:4", reorder="mlp").reorders
    assert not settings(pattern="2:4").reorders and not settings(reorder="none").reorders
    with pytest.raises(ValueError, match="reorder: mlp needs order: staged"):
        settings(order="layer", reorder="mlp")


def reordered(rows: list[dict[str, Any]]) -> set[str]:
    return {row["name"] for row in rows if "reordered" in row}


def test_in_another_order_the_model_is_the_same(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a method that changes no weight: what is left is the order."""
    source, out = checkpoint("qwen2", dtype=torch.float32), tmp_path / "out"
    nothing = dataclasses.replace(wanda.METHOD, solve=lambda problem: Solution(problem.weights))
    monkeypatch.setattr(wanda, "METHOD", nothing)
    monkeypatch.setattr("rac_engine.engine.pruning._read_back", lambda *_: None)  # which would miss the zeros
    report = prune(source, out, settings(method="wanda", reorder="mlp"), tiny.calibration())
    assert reordered(report.matrices) == {row["name"] for row in report.matrices if "mlp" in row["module"]}
    assert any("3 MLPs have their inner neurons in another order" in note for note in report.end["notes"])
    before, after = load(source), load(out)
    for layer in range(3):
        path = f"model.layers.{layer}.mlp"
        gate = before[f"{path}.gate_proj.weight"]
        order = [int((gate == row).all(1).nonzero()) for row in after[f"{path}.gate_proj.weight"]]
        assert order != sorted(order) == list(range(80))
        assert torch.equal(after[f"{path}.up_proj.weight"], before[f"{path}.up_proj.weight"][order])
        assert torch.equal(after[f"{path}.down_proj.weight"], before[f"{path}.down_proj.weight"][:, order])
    ids = torch.arange(30)[None] % tiny.VOCABULARY
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, out)]
    with torch.inference_mode():
        torch.testing.assert_close(*(model(ids).logits for model in models), rtol=1e-4, atol=1e-4)


def test_the_order_makes_a_pattern_cost_less(tmp_path: Path) -> None:
    """Where the weights that matter stand four by four in one group."""
    source, name = tiny.save(tmp_path / "model"), "model.layers.0.mlp.down_proj.weight"
    file = next(file for file in source.glob("*.safetensors") if name in load_file(file))
    held = load_file(file)
    large = 1 + 9 * (torch.arange(80) // 4 % 4 == 0)
    save_file({**held, name: held[name] * large}, file, {"format": "pt"})
    errors = {}
    for reorder in ("none", "mlp"):
        asked = settings(reconstruct="layer", reorder=reorder)
        report = prune(source, tmp_path / reorder, asked, tiny.calibration())
        errors[reorder] = next(row["relative_error"] for row in report.matrices if row["name"] == name)
        assert bool(reordered(report.matrices)) == (reorder == "mlp")
    assert errors["mlp"] < 0.7 * errors["none"]


@pytest.mark.parametrize(
    ("family", "sizes", "changes"),
    [
        ("llama", {"mlp_bias": True}, {}),
        ("phi3", {}, {}),
        ("qwen2", {}, {"dense": [".*up_proj"]}),
        ("qwen2", {}, {"overrides": [{"modules": ".*down_proj", "sparsity": 0.5}]}),
        ("qwen2", {}, {"pattern": "2:4"}),
    ],
    ids=["bias", "fused", "dense", "no pattern", "2:4"],
)
def test_an_order_that_could_not_be_told_or_does_not_pay_is_left(
    tmp_path: Path, family: str, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = tiny.save(tmp_path / "model", family, **sizes)
    report = prune(source, tmp_path / "out", settings(**{"tune": 0, **changes}), tiny.calibration())
    assert not reordered(report.matrices)
    assert verify(tmp_path / "out", source).problems == []


def test_hidden_states_too_large_to_square_are_not_tuned_on(tmp_path: Path) -> None:
    source, name = tiny.save(tmp_path / "model", dtype=torch.float32), "model.layers.2.mlp.down_proj.weight"
    file = next(file for file in source.glob("*.safetensors") if name in load_file(file))
    held = load_file(file)
    save_file({**held, name: held[name] * 1e22}, file, {"format": "pt"})
    report = prune(source, tmp_path / "out", settings(tune=1), tiny.calibration())
    for row in report.matrices:
        large = row["layer"] == 2 and "mlp" in row["module"]
        assert ("tuned" in row, any("not tuned" in note for note in row["notes"])) == (not large, large), row["name"]
    assert verify(tmp_path / "out", source).problems == []


def test_what_was_reordered_is_not_left_dense(tmp_path: Path) -> None:
    """Its rows stand elsewhere than in the source, which `dense` would promise: where H is no use, by magnitude."""
    source = tiny.save(tmp_path / "model", shard_size="1GB", dtype=torch.float32)
    tensors, path = load_file(source / "model.safetensors"), "model.layers.1."
    scales = {"post_attention_layernorm": 1e22, "mlp.gate_proj": 1e-22, "mlp.up_proj": 1e-22}
    for name, scale in scales.items():
        tensors[f"{path}{name}.weight"] *= scale
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for reorder in ("mlp", "none"):
        asked = settings(tune=0, unseen="dense", reorder=reorder)
        report = prune(source, tmp_path / reorder, asked, tiny.calibration())
        rows = [row for row in report.matrices if row["layer"] == 1 and row["module"] in scales]
        assert len(rows) == 2 and all(("skipped" in row) == (reorder == "none") for row in rows)
        assert verify(tmp_path / reorder, source).problems == []
