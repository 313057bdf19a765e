"""The pruning job from end to end, and what becomes of it when it is killed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rac_engine
from rac_engine.base import process
from rac_engine.base.errors import BadInput, Damaged, Interrupted
from rac_engine.calibrate.activations import _Resident
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.checkpoint.writer import CheckpointWriter
from rac_engine.engine import limits as module
from rac_engine.engine import setup
from rac_engine.engine import solving as solving_module
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.jobs.journal import records_of
from rac_engine.jobs.layout import PRUNE_JOURNAL
from rac_engine.jobs.publish import write_manifest
from rac_engine.jobs.surroundings import machine
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.plan.memory import MemoryPlan, plan_memory
from rac_engine.plan.phases import Tokens
from rac_engine.recipe.files import dump, load_recipe
from rac_engine.recipe.settings import PruneSettings, Recipe
from rac_engine.report.page import write_report
from rac_engine.solve import matrices
from tests import tiny
from tests.engine.inputs import inputs_of

Make = Callable[..., Path]


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def settings(**changes: Any) -> PruneSettings:
    return PruneSettings(**{"chunk_tokens": 64, "block_size": 16, **changes})


ORDERS = ("staged", "layer")
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
STAGED_ONLY = [(family, "layer") for family in MIXTURES]


def matrix_of(tensors: dict[str, Tensor], row: dict[str, Any]) -> Tensor:
    """The matrix of a row of metrics.jsonl, out of a stack of experts if it is in one."""
    if "tensor" not in row:
        return tensors[row["name"]]
    own = tensors[row["tensor"]][row["expert"]]
    return own if own.shape == (row["rows"], row["columns"]) else own.T


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times."""
    timed = {"rac/metrics.jsonl", "rac/manifest.json", PRUNE_JOURNAL}
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in timed}


@pytest.mark.parametrize(
    ("family", "order"),
    [(family, order) for family in tiny.FAMILIES for order in ORDERS if (family, order) not in STAGED_ONLY],
)
def test_prunes_half_of_every_matrix_and_nothing_else(
    checkpoint: Make, tmp_path: Path, family: str, order: str
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = prune(source, out, settings(order=order), tiny.calibration())
    before, after = load(source), load(out)
    assert before.keys() == after.keys()
    pruned = {row.get("tensor", row["name"]) for row in report.matrices}
    modules = {name for name in before if ".layers." in name and before[name].ndim > 1}
    kept = ["gate.weight", "router.weight", "_bias", "in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight"]
    kept += ["conv1d.weight", "conv.conv.weight"]
    assert pruned == {name for name in modules if not name.endswith(tuple(kept))}  # the routers' are not
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        zero = tensor == 0
        if name in pruned:
            assert float(zero.float().mean()) == pytest.approx(0.5, abs=0.01)
            assert not tensor.signbit()[zero].any()
        else:
            assert torch.equal(tensor, before[name])
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert not out.with_name("out.partial").exists()
    assert verify(out, source).problems == []


def test_what_is_written_beside_the_weights(checkpoint: Make, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2"), tmp_path / "out"
    calibration = tiny.calibration()
    report = prune(source, out, settings(method="sparsegpt", dense=["model.layers.1.mlp.down_proj"]), calibration)
    lines = [json.loads(line) for line in (out / "rac" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [report.run, *report.matrices, report.end]
    run, rows, end = lines[0], lines[1:-1], lines[-1]
    assert run["model"]["sha256"] == Checkpoint.open(source).sha256()
    assert run["model"]["parameters"] == sum(tensor.numel() for tensor in load(source).values())
    assert run["calibration"]["tokens"] == 4 * (40 + 17 + 40 + 25 + 1 + 9)
    assert run["calibration"]["sha256"] == calibration.sha256
    assert run["settings"]["block_size"] == 16
    assert [row["module"] for row in rows[:7]] == [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ]
    assert [row["layer"] for row in rows] == [0] * 7 + [1] * 7 + [2] * 7
    left = rows[13]
    assert left["skipped"] == "left dense by 'model.layers.1.mlp.down_proj'"
    own_zeros = int((load(source)[left["name"]] == 0).sum())
    assert (left["zeros"], left["objective"], left["tokens"]) == (own_zeros, None, None)
    for row in (row for row in rows if row is not left):
        assert row["tokens"] == run["calibration"]["tokens"]
        assert 0 < row["relative_error"] < 0.5
        assert row["damping"] == 0.01
        assert row["notes"] == []
    assert end["seconds"] > 0
    assert {"embed", "read", "calibrate", "solve", "write"} <= end["phases"].keys()
    recipe = load_recipe(out / "rac" / "recipe.yaml")
    assert (recipe.model, recipe.prune) == (
        source,
        settings(method="sparsegpt", dense=["model.layers.1.mlp.down_proj"]),
    )
    assert "sparse" in (out / "README.md").read_text()
    files = json.loads((out / "rac" / "manifest.json").read_text())["files"]
    for name, data in contents(out).items():
        assert files[name]["sha256"] == hashlib.sha256(data).hexdigest(), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_matrix_is_calibrated_on_what_the_pruned_model_gives_it(
    checkpoint: Make, tmp_path: Path, family: str
) -> None:
    """Pruned stage by stage, the objective of each matrix is its error on the inputs that it has in the final model."""
    source, out = checkpoint(family, dtype=torch.float32), tmp_path / "out"
    calibration = tiny.calibration()
    report = prune(
        source,
        out,
        settings(method="sparsegpt", sparsity=0.6, chunk_tokens=24, experts={"min_tokens": 0.0}),
        calibration,
    )
    inputs = inputs_of(out, [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences])
    before, after = load(source), load(out)
    for row in report.matrices:
        x = inputs[row["name"].removesuffix(".weight")]
        W, Q = (matrix_of(tensors, row).double() for tensors in (before, after))
        objective, whole = float((x @ (W - Q).T).square().sum()), float((x @ W.T).square().sum())
        assert row["tokens"] == len(x)
        assert row["objective"] == pytest.approx(objective, rel=1e-3), row["name"]
        assert row["relative_error"] == pytest.approx(objective / whole, rel=1e-3), row["name"]


@pytest.mark.parametrize(
    ("family", "reconstruct"),
    [
        ("phi3", "dense"),
        ("gemma2", "dense"),
        ("deepseek_v3", "dense"),
        ("mixtral", "residual"),
        ("qwen2", "residual"),
        ("granite", "residual"),
        ("olmo2", "residual"),
    ],
)
def test_what_is_reconstructed_is_what_the_dense_model_gives(
    checkpoint: Make, tmp_path: Path, family: str, reconstruct: str
) -> None:
    """The objective of each matrix is the distance of its outputs, in the final model, from the dense model's; with
    `residual`, of those that are added to the hidden states, from what would make up for how these have drifted."""
    source, out = checkpoint(family, dtype=torch.float32), tmp_path / "out"
    calibration = tiny.calibration()
    report = prune(
        source, out, settings(method="admm", sparsity=0.6, chunk_tokens=24, reconstruct=reconstruct), calibration
    )
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    given, dense = inputs_of(out, ids), inputs_of(source, ids)
    before, after = load(source), load(out)
    for row in report.matrices:
        name, module = row["name"].removesuffix(".weight"), row["module"]
        if "expert" in module:
            continue  # other tokens come to it than in the dense model
        W, Q = before[row["name"]].double(), after[row["name"]].double()
        own = dense[name] @ W.T
        wanted = own
        if reconstruct == "residual" and module in ("self_attn.o_proj", "mlp.down_proj") and family != "olmo2":
            norm = "input_layernorm" if module == "self_attn.o_proj" else "post_attention_layernorm"
            norm = f"model.layers.{row['layer']}.{norm}"
            wanted = own + (dense[norm] - given[norm]) / tiny.FAMILIES[family].get("residual_multiplier", 1.0)
        objective = float((given[name] @ Q.T - wanted).square().sum())
        assert row["objective"] == pytest.approx(objective, rel=1e-3), row["name"]
        assert row["relative_error"] == pytest.approx(objective / float(own.square().sum()), rel=1e-3), row["name"]
        assert row["ridge"] > 0
        assert row["iterations"] > 0


def test_weights_count_in_what_is_reconstructed_too(checkpoint: Make, tmp_path: Path) -> None:
    """Shared inputs (DenseInputs) and a matrix's own outputs (DenseOutputs)."""
    source, out, calibration = checkpoint("qwen2", dtype=torch.float32), tmp_path / "out", tiny.weighted()
    report = prune(source, out, settings(method="admm", sparsity=0.6, reconstruct="dense"), calibration)
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    weights = torch.cat([torch.as_tensor(s.weights).double() for s in calibration.sequences if s.weights is not None])
    given, dense = inputs_of(out, ids), inputs_of(source, ids)
    before, after = load(source), load(out)
    for row in report.matrices:
        name = row["name"].removesuffix(".weight")
        off = given[name] @ after[row["name"]].double().T - dense[name] @ before[row["name"]].double().T
        assert row["objective"] == pytest.approx(float((off.square().sum(1) * weights).sum()), rel=1e-3), name


def test_matching_outputs_brings_the_model_nearer_to_the_dense_one(checkpoint: Make, tmp_path: Path) -> None:
    source, calibration = checkpoint("qwen2", dtype=torch.float32), tiny.calibration()
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    last = "model.layers.2.mlp.down_proj"
    wanted = inputs_of(source, ids)[last]
    far = {}
    for reconstruct in ("layer", "dense", "residual"):
        out = tmp_path / reconstruct
        prune(source, out, settings(method="admm", reconstruct=reconstruct), calibration)
        far[reconstruct] = float((inputs_of(out, ids)[last] - wanted).square().sum() / wanted.square().sum())
    assert far["dense"] < 0.9 * far["layer"]
    assert far["residual"] < 0.9 * far["layer"]


def test_layer_order_calibrates_on_the_dense_layer_behind_pruned_ones(checkpoint: Make, tmp_path: Path) -> None:
    """As published: with only layer 1 pruned, its matrices see the inputs that they have in the dense model."""
    source, out = checkpoint("qwen2", dtype=torch.float32), tmp_path / "out"
    calibration = tiny.calibration()
    report = prune(
        source, out, settings(method="sparsegpt", order="layer", dense=[r"model\.layers\.[02]\..*"]), calibration
    )
    inputs = inputs_of(source, [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences])
    before, after = load(source), load(out)
    pruned = [row for row in report.matrices if "skipped" not in row]
    assert [row["layer"] for row in pruned] == [1] * 7
    for row in pruned:
        D = before[row["name"]].double() - after[row["name"]].double()
        objective = float((inputs[row["name"].removesuffix(".weight")] @ D.T).square().sum())
        assert row["objective"] == pytest.approx(objective, rel=1e-3), row["name"]


def test_only_the_part_asked_for_counts(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2", dtype=torch.float32)
    calibration = tiny.calibration(part="completion")
    report = prune(source, tmp_path / "out", settings(method="sparsegpt"), calibration)
    assert {row["tokens"] for row in report.matrices} == {4 * (20 + 9 + 20 + 13 + 1 + 5)}
    inputs = inputs_of(tmp_path / "out", [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences])
    counts = torch.cat([torch.as_tensor(sequence.weights) for sequence in calibration.sequences]).bool()
    row = report.matrices[10]
    D = load(source)[row["name"]].double() - load(tmp_path / "out")[row["name"]].double()
    objective = float((inputs[row["name"].removesuffix(".weight")][counts] @ D.T).square().sum())
    assert row["objective"] == pytest.approx(objective, rel=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sparsity_zero_gives_the_same_files(checkpoint: Make, tmp_path: Path, family: str) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = prune(source, out, settings(sparsity=0), tiny.calibration())
    for file in source.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert {row["skipped"] for row in report.matrices} == {"sparsity 0"}


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "alps", "wanda", "magnitude"])
def test_patterns(checkpoint: Make, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    report = prune(checkpoint("llama"), out, settings(method=method, pattern="2:4"), tiny.calibration())
    assert {row["sparsity"] for row in report.matrices} == {0.5}
    for row in report.matrices:
        kept = (load(out)[row["name"]] != 0).unflatten(1, (-1, 4)).sum(-1)
        assert (kept == 2).all()
        assert (row["objective"] is None) == (method in ("wanda", "magnitude"))
    assert verify(out).problems == []


def test_magnitude_needs_no_calibration_and_reads_no_tokens(checkpoint: Make, tmp_path: Path) -> None:
    report = prune(checkpoint("qwen2"), tmp_path / "out", settings(method="magnitude"))
    assert report.run["calibration"] is None
    assert "calibrate" not in report.end["phases"]
    assert {row["tokens"] for row in report.matrices} == {None}
    with pytest.raises(BadInput, match="calibration is missing"):
        prune(checkpoint("qwen2"), tmp_path / "out2", settings())


def test_activations_in_another_dtype_leave_the_checkpoint_in_its_own(checkpoint: Make, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2", dtype=torch.float32), tmp_path / "out"
    prune(source, out, settings(dtype="bfloat16", dense=["mlp.up_proj"]), tiny.calibration())
    before, after = load(source), load(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name])
    corrected = after["model.layers.0.mlp.gate_proj.weight"]
    assert not torch.equal(corrected, corrected.bfloat16().float())


def test_tokens_go_no_further_than_the_last_layer_that_is_pruned(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = Model.build_layer

    def noted(self: Model, layer: int, *rest: Any) -> list[Block]:
        built.append(layer)
        return build(self, layer, *rest)

    monkeypatch.setattr(Model, "build_layer", noted)
    prune(checkpoint("qwen2"), tmp_path / "out", settings(dense=[r".*layers\.2\..*", "mlp.*"]), tiny.calibration())
    assert sorted(set(built)) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "inner", "hidden"),
    [
        ({"method": "sparsegpt"}, 2, 1 + 5 + 3),  # embeddings; all blocks but the last; every attention's kept input
        (
            {"method": "admm", "reconstruct": "residual"},
            3,
            (1 + 6) * 2 + 3,
        ),  # and the dense model's, to the end
        ({"method": "sparsegpt", "order": "layer"}, 0, 1 + 4),
        ({"method": "sparsegpt", "allocation": "error"}, 2 * 2, (1 + 5 + 3) * 2),
    ],
    ids=["staged", "beside", "layer", "first pass"],
)
def test_nothing_is_kept_of_the_last_block_that_nobody_reads(
    checkpoint: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    inner: int,
    hidden: int,
) -> None:
    """What is written of activations in all, in times the tokens: an MLP's inner ones of 80, the others of 48."""
    written: dict[int, int] = {}
    write, room = _Resident.write, _Resident.room

    def noted(self: _Resident, start: int, values: Tensor) -> None:
        written[self.width] = written.get(self.width, 0) + len(values)
        write(self, start, values)

    def filled(self: _Resident, start: int, stop: int) -> Tensor | None:
        written[self.width] = written.get(self.width, 0) + stop - start
        return room(self, start, stop)

    monkeypatch.setattr(_Resident, "write", noted)
    monkeypatch.setattr(_Resident, "room", filled)
    calibration = tiny.calibration()
    prune(checkpoint("qwen2"), tmp_path / "out", settings(**changes), calibration)
    tokens = sum(len(sequence.token_ids) for sequence in calibration.sequences)
    assert (written.get(80, 0), written[48]) == (inner * tokens, hidden * tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "1:3", "block_size": 126}, r"layers\.0\.mlp\.down_proj: its 80 columns are no whole groups"),
        ({"dense": ["self_atn.*"]}, "'self_atn.*' names no matrix"),
        (
            {"overrides": [{"modules": "mlp.*", "sparsity": 0.6}, {"modules": ["mlp_.*"], "damping": 0.1}]},
            r"overrides\.1: 'mlp_",
        ),
        ({"overrides": [{"modules": "mlp.*", "pattern": "1:7"}]}, "no whole groups for pattern 1:7"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    checkpoint: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        prune(checkpoint("qwen2"), tmp_path / "out", settings(**changes), tiny.calibration())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda", "magnitude"])
def test_overrides_prune_some_matrices_otherwise(checkpoint: Make, tmp_path: Path, method: str) -> None:
    """Of those that share an input too; the last that fits a matrix wins."""
    overrides = [
        {"modules": ".*(q|down)_proj", "sparsity": 0.75},
        {"modules": ["self_attn.v_proj"], "pattern": "2:4"},
        {"modules": r".*layers\.1\.mlp\.down_proj", "sparsity": 0.25, "damping": 0.1},
        {"modules": r".*layers\.2\.self_attn.*", "sparsity": 0},
    ]
    wanted = settings(method=method, sparsity=0.5, overrides=overrides)
    report = prune(checkpoint("qwen2"), tmp_path / "out", wanted, tiny.calibration())
    for row in report.matrices:
        layer, module = row["layer"], row["module"]
        if layer == 2 and module.startswith("self_attn"):
            assert row["skipped"] == "sparsity 0"
            continue
        share = 0.75 if module.endswith(("q_proj", "down_proj")) else 0.5
        if layer == 1 and module == "mlp.down_proj":
            share = 0.25
        assert row["sparsity"] == pytest.approx(share, abs=0.01)
        assert row["target"] == {"sparsity": share, "pattern": "2:4" if module == "self_attn.v_proj" else None}
        if method in ("admm", "sparsegpt"):
            assert row["damping"] == (0.1 if share == 0.25 else 0.01)
    assert verify(tmp_path / "out", checkpoint("qwen2")).problems == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50% unstructured, 4 overrides" in card


UNTIED = [family for family, config in tiny.FAMILIES.items() if not config["tie_word_embeddings"]]


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "admm") for family in UNTIED), *(("llama", other) for other in ("sparsegpt", "wanda", "magnitude"))],
)
def test_lm_head_and_embeddings_are_pruned_if_asked_for(
    checkpoint: Make, tmp_path: Path, family: str, method: str
) -> None:
    """The head's objective is the distance of the logits from what is wanted; the model follows the pruned table."""
    source, out = checkpoint(family, dtype=torch.float32), tmp_path / "out"
    calibration = tiny.calibration()
    wanted = settings(method=method, also=["lm_head", "embeddings"], sparsity=0.5)
    report = prune(source, out, wanted, calibration)
    assert verify(out, source).problems == []
    page, card = write_report(out).read_text(), (out / "README.md").read_text()
    assert 'title="lm_head (64 × ' in page
    assert "layer -1" not in page
    model = Model.open(Checkpoint.open(source))
    assert f"layer {model.layers}" not in page
    assert "in its decoder layers, `lm_head` and `embeddings` set to zero" in card
    assert "| Left dense | norms, biases |" in card
    before, after = load(source), load(out)
    rows = {row["module"]: row for row in report.matrices}
    embedding = model.family.embedding
    assert (rows[embedding.split(".")[-2]]["layer"], rows["lm_head"]["layer"]) == (-1, model.layers)
    table, dense = after[embedding], before[embedding]
    gone = table == 0
    assert bool((gone.sum(1) == table.shape[1] // 2).all())  # each token keeps its largest
    assert torch.equal(table[~gone], dense[~gone])
    assert bool((dense.abs().masked_fill(~gone, 0).amax(1) <= dense.abs().masked_fill(gone, torch.inf).amin(1)).all())
    assert rows["lm_head"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert rows["lm_head"]["sparsity"] == float((after["lm_head.weight"] == 0).float().mean())
    if method in ("admm", "sparsegpt"):
        ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
        given, own = inputs_of(out, ids)["lm_head"], inputs_of(source, ids)["lm_head"]
        goal = (own if method == "admm" else given) @ before["lm_head.weight"].double().T
        objective = float((given @ after["lm_head.weight"].double().T - goal).square().sum())
        assert rows["lm_head"]["objective"] == pytest.approx(objective, rel=1e-3)


def test_lm_head_alone_is_calibrated_on_the_whole_model(checkpoint: Make, tmp_path: Path) -> None:
    """Nothing else pruned: every layer is gone through all the same. By order: layer too."""
    for order, method in (("staged", "admm"), ("layer", "sparsegpt")):
        source, out = checkpoint("llama", dtype=torch.float32), tmp_path / order
        wanted = settings(method=method, order=order, also=["lm_head"], dense=[r"model\.layers.*"])
        report = prune(source, out, wanted, tiny.calibration())
        ids = [torch.as_tensor(sequence.token_ids) for sequence in tiny.calibration().sequences]
        D = load(source)["lm_head.weight"].double() - load(out)["lm_head.weight"].double()
        (row,) = (row for row in report.matrices if not row.get("skipped"))
        assert row["objective"] == pytest.approx(
            float((inputs_of(source, ids)["lm_head"] @ D.T).square().sum()), rel=1e-3
        )


def test_tied_lm_head_is_refused_and_pruned_with_the_embeddings(checkpoint: Make, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2"), tmp_path / "out"
    with pytest.raises(BadInput, match="tied to the embeddings; ask for embeddings"):
        prune(source, out, settings(also=["lm_head"]), tiny.calibration())
    report = prune(source, out, settings(also=["embeddings"], pattern="2:4"), tiny.calibration())
    assert any("tied: lm_head has the same zeros" in note for note in report.end["notes"])
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert float((model.lm_head.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.001)
    assert verify(out, source).problems == []
    shutil.copytree(out, tmp_path / "lies")
    lines = (tmp_path / "lies" / "rac" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "lies" / "rac" / "metrics.jsonl").write_text("".join(x for x in lines if '"embed_tokens"' not in x))
    assert any("embed_tokens.weight: metrics.jsonl does not say" in p for p in verify(tmp_path / "lies").problems)


def test_a_table_of_a_large_vocabulary_is_solved_by_runs_of_rows(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of the whole is what the whole gives, and half of each run is zero."""
    monkeypatch.setattr(matrices, "WHOLE", 2000)
    monkeypatch.setattr(matrices, "TOGETHER", 1000)
    source, out, calibration = checkpoint("llama", dtype=torch.float32), tmp_path / "out", tiny.calibration()
    report = prune(source, out, settings(also=["lm_head"]), calibration)
    row = report.matrices[-1]
    columns = row["columns"]
    W, Q = load(source)["lm_head.weight"], load(out)["lm_head.weight"]
    step = 1000 // columns
    assert len(W) > 2 * step
    for run in Q.split(step):
        assert int((run == 0).sum()) == pytest.approx(run.numel() / 2, abs=columns // 16 + 1)
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    given, own = inputs_of(out, ids)["lm_head"], inputs_of(source, ids)["lm_head"]
    wanted = own @ W.double().T
    objective = float((given @ Q.double().T - wanted).square().sum())
    assert row["objective"] == pytest.approx(objective, rel=1e-3)
    assert row["relative_error"] == pytest.approx(objective / float(wanted.square().sum()), rel=1e-3)
    assert row["relative_error"] < row["magnitude_error"]
    assert row["zeros"] == int((Q == 0).sum())


def test_dense_may_name_what_is_dense_anyway(checkpoint: Make, tmp_path: Path) -> None:
    prune(checkpoint("llama"), tmp_path / "out", settings(method="magnitude", dense=["lm_head", "model.embed_tokens"]))


def test_nothing_is_left_behind_by_a_job_that_could_not_start(checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BadInput, match="exists"):
        prune(checkpoint("qwen2"), out, settings(), tiny.calibration())
    out.rmdir()
    with pytest.raises(BadInput, match="no such folder"):
        prune(checkpoint("qwen2"), tmp_path / "a" / "out", settings(), tiny.calibration())
    strange = tiny.calibration()
    strange.sequences[0].token_ids[3] = tiny.VOCABULARY + 5
    with pytest.raises(BadInput, match="another model"):
        prune(checkpoint("qwen2"), out, settings(), strange)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(checkpoint: Make, tmp_path: Path) -> None:
    """No file may grow beyond 10 kB, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(BadInput, match="free some space"):
            prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_device_that_is_not_there(checkpoint: Make, tmp_path: Path) -> None:
    for name in ("cuda:99", "abacus"):
        with pytest.raises(BadInput, match=f"device '{name}'"):
            prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration(), device=name)


def test_a_device_goes_by_its_full_name_and_its_limit_is_no_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch, "empty", lambda *_, **__: OnGpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {torch.device(device).index}")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert (found := module.device_name("cuda")) == "cuda:0" and machine(found)["device"] == "card 0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    limits = module.machine_limits("cuda:0", 8 << 30, None, 0)
    assert (limits.device_limit, limits.device_spare) == (8 << 30, 7 << 30)
    with pytest.raises(BadInput, match=r"--device-memory 9 GiB: cuda:0 has 8 GiB"):
        module.machine_limits("cuda:0", 9 << 30, None, 0)


def test_memory_is_planned_for_all_tokens_those_that_do_not_count_too(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    plan = plan_memory

    def noted(shape: Any, settings: PruneSettings, tokens: Tokens, *others: Any, **options: Any) -> MemoryPlan:
        planned.append(tokens.count)
        return plan(shape, settings, tokens, *others, **options)

    monkeypatch.setattr("rac_engine.engine.setup.plan_memory", noted)
    report = prune(checkpoint("qwen2"), tmp_path / "out", settings(method="wanda"), tiny.calibration(part="completion"))
    assert planned == [4 * (40 + 17 + 40 + 25 + 1 + 9)]
    assert report.run["calibration"]["tokens"] < planned[0]


def test_nan_in_the_source_is_named_and_nothing_is_left(checkpoint: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("qwen2", shard_size="1GB"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj\.weight' holds NaN"):
        prune(source, tmp_path / "out", settings(), tiny.calibration())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_recipe_file_and_lazy_names(checkpoint: Make, tmp_path: Path) -> None:
    recipe = Recipe(model=Path("elsewhere"), prune=settings(method="magnitude", sparsity=0.25))
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    report = rac_engine.prune(checkpoint("qwen2"), tmp_path / "out", tmp_path / "recipe.yaml")
    assert {round(row["sparsity"], 2) for row in report.matrices} == {0.25}
    assert load_recipe(tmp_path / "out" / "rac" / "recipe.yaml").model == checkpoint("qwen2")


def test_what_takes_most_memory_waits_for_the_layer_before_to_be_written(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, sync, solve = list[str](), CheckpointWriter.sync, matrices.prune_matrices

    def late(self: CheckpointWriter) -> None:
        if (layer := events.count("written")) < 2:  # not before the next layer has nothing left to do but its last
            deadline = time.monotonic() + 60
            while events.count("else") < 3 * (layer + 2) and time.monotonic() < deadline:
                time.sleep(0.01)
        time.sleep(0.2)
        sync(self)
        events.append("written")

    def solving(weights: Sequence[Tensor], *others: Any) -> list[matrices.MatrixResult]:
        events.append("down" if weights[0].shape[1] == 80 else "else")
        return solve(weights, *others)

    monkeypatch.setattr(CheckpointWriter, "sync", late)
    monkeypatch.setattr(solving_module, "prune_matrices", solving)
    monkeypatch.setattr(MemoryPlan, "alone", {(False, 3): "mlp.down_proj"})
    prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration())
    stages = ["else", "else", "else"]
    assert events[: 4 + 5 + 5] == [*stages, "down", *[*stages, "written", "down"] * 2]


def test_a_layer_is_written_while_the_next_one_is_pruned(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer but the last is on the disk before the next one's pruning has begun, and the job ends all the same."""
    begun, sync = [threading.Event() for _ in range(3)], CheckpointWriter.sync
    overlapped: list[bool] = []

    def progress(line: str) -> None:
        if line.startswith("layer "):
            begun[int(line[6]) - 1].set()

    def late(self: CheckpointWriter) -> None:
        if len(overlapped) < 2:
            overlapped.append(begun[len(overlapped) + 1].wait(60))
        sync(self)

    monkeypatch.setattr(CheckpointWriter, "sync", late)
    report = prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration(), progress=progress)
    assert overlapped == [True, True]
    rows = {(row["lane"], row["layer"]): row for row in report.end["timeline"]}
    for layer in range(3):
        read, compute, write = (rows[lane, layer] for lane in ("read", "compute", "write"))
        assert read["start"] < compute["end"] <= write["start"] + 1e-3
        assert 0 <= compute["busy"] <= compute["end"] - compute["start"] + 1e-3
    assert rows["read", 1]["start"] < rows["compute", 0]["end"]
    assert rows["compute", 1]["start"] < rows["write", 0]["end"]
    assert report.end["busy"].keys() == {"read", "compute", "write"}


# Interruption


class Killed(Exception):
    """Stands for whatever ends a job in the middle."""


def stop_in(layer: int, how: BaseException) -> Callable[[str], None]:
    def progress(line: str) -> None:
        if line.startswith(f"layer {layer}/") and "down_proj" in line:
            raise how

    return progress


@pytest.fixture
def unfinished(checkpoint: Make, tmp_path: Path) -> Path:
    """OUT of a job that was stopped in its third layer."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        prune(checkpoint("qwen2"), out, settings(), tiny.calibration(), progress=stop_in(3, Killed()))
    return out


@pytest.fixture
def expected(checkpoint: Make, tmp_path: Path) -> dict[str, bytes]:
    """What the job gives if nothing stops it."""
    prune(checkpoint("qwen2"), tmp_path / "whole", settings(), tiny.calibration())
    return contents(tmp_path / "whole")


def test_unfinished_job_goes_on_to_the_same_bytes(
    checkpoint: Make, unfinished: Path, expected: dict[str, bytes]
) -> None:
    assert not unfinished.exists()
    report = prune(checkpoint("qwen2"), unfinished, settings(), tiny.calibration())
    assert report.resumed == 2
    assert contents(unfinished) == expected
    assert len(report.matrices) == 21
    assert verify(unfinished, checkpoint("qwen2")).problems == []


@pytest.mark.parametrize("at", ["layer 3/", "behind the layers", "done"])
def test_unfinished_job_with_lm_head_and_embeddings_goes_on(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Stopped in the last layer, in the head, and between the table's bytes and its record."""
    wanted, out = settings(also=["lm_head", "embeddings"]), tmp_path / "out"
    prune(checkpoint("llama"), tmp_path / "whole", wanted, tiny.calibration())

    def progress(line: str) -> None:
        if line.startswith(at):
            raise Killed

    with pytest.raises(Killed):
        if at == "done":
            monkeypatch.setattr(CheckpointWriter, "finish", stop)
        prune(checkpoint("llama"), out, wanted, tiny.calibration(), progress=progress)
    monkeypatch.undo()
    report = prune(checkpoint("llama"), out, wanted, tiny.calibration())
    assert report.resumed == {"layer 3/": 2, "behind the layers": 3, "done": 4}[at]
    assert contents(out) == contents(tmp_path / "whole")
    assert len(report.matrices) == 23


def stop(_: CheckpointWriter) -> dict[str, str]:
    raise Killed


def test_interrupt_is_said_to_be_resumable(checkpoint: Make, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    for layer in (2, 3):
        with pytest.raises(Interrupted, match=f"{layer - 1} of 3 layers"):
            prune(
                checkpoint("qwen2"), out, settings(), tiny.calibration(), progress=stop_in(layer, KeyboardInterrupt())
            )
    prune(checkpoint("qwen2"), out, settings(), tiny.calibration())
    assert contents(out) == expected


def damage(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("layer", [0, 1])
def test_damage_to_a_finished_layer_is_found_and_mended(
    checkpoint: Make, unfinished: Path, expected: dict[str, bytes], layer: int
) -> None:
    partial = unfinished.with_name("out.partial")
    info = Checkpoint.open(checkpoint("qwen2")).tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    damage(partial / info.file.name, info.offset + 11)
    report = prune(checkpoint("qwen2"), unfinished, settings(), tiny.calibration())
    assert report.resumed == layer
    assert contents(unfinished) == expected


def test_damaged_journal_costs_only_what_it_no_longer_says(
    checkpoint: Make, unfinished: Path, expected: dict[str, bytes]
) -> None:
    journal = unfinished.with_name("out.partial") / PRUNE_JOURNAL
    damage(journal, journal.stat().st_size - 20)
    report = prune(checkpoint("qwen2"), unfinished, settings(), tiny.calibration())
    assert report.resumed == 1
    assert contents(unfinished) == expected


def test_another_job_does_not_go_on_with_it(checkpoint: Make, unfinished: Path, expected: dict[str, bytes]) -> None:
    source = checkpoint("qwen2")
    with pytest.raises(BadInput, match=r"another settings\.sparsity: 0\.5, now 0\.6.*--restart"):
        prune(source, unfinished, settings(sparsity=0.6), tiny.calibration())
    with pytest.raises(BadInput, match="another calibration"):
        prune(source, unfinished, settings(), tiny.calibration(seed=1))
    with pytest.raises(BadInput, match="another model"):
        prune(checkpoint("qwen2", seed=1), unfinished, settings(), tiny.calibration())
    assert unfinished.with_name("out.partial").exists()
    report = prune(source, unfinished, settings(sparsity=0.6), tiny.calibration(), restart=True)
    assert report.resumed == 0
    assert contents(unfinished).keys() == expected.keys()
    assert contents(unfinished) != expected


def test_folder_that_is_no_unfinished_job_is_left_alone(checkpoint: Make, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("dear")
    for restart in (False, True):
        with pytest.raises(BadInput, match="no unfinished job"):
            prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration(), restart=restart)
    assert (partial / "thesis.txt").read_text() == "dear"


def test_second_process_on_the_same_output_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    refused: list[object] = []

    def progress(line: str) -> None:
        if not refused:
            with pytest.raises(BadInput, match="another process is working there") as caught:
                prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration(), restart=True)
            refused.append(caught)

    prune(checkpoint("qwen2"), tmp_path / "out", settings(), tiny.calibration(), progress=progress)
    assert refused
    assert verify(tmp_path / "out").problems == []


JOB = """
import os, signal, sys, torch
from pathlib import Path
from rac_engine.engine import prune
from rac_engine.recipe import PruneSettings
from tests import tiny

def progress(line):
    if line.startswith(f"layer {sys.argv[3]}/") and "up_proj" in line:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
prune(Path(sys.argv[1]), Path(sys.argv[2]), PruneSettings(chunk_tokens=64, block_size=16), tiny.calibration(),
      progress=progress)
"""


def test_killed_process_goes_on_to_the_same_bytes(checkpoint: Make, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """SIGKILL in layer 2, then in layer 3 of the job that went on, then to the end: as if nothing had happened."""
    source, out = checkpoint("qwen2"), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for layer in (2, 3):
        command = [sys.executable, "-c", JOB, str(source), str(out), str(layer)]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        assert not out.exists()
    # The layer before the one at hand may still have been on its way to the disk.
    assert prune(source, out, settings(), tiny.calibration()).resumed in (1, 2)
    assert contents(out) == expected


def test_output_that_does_not_read_back_is_not_published(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(folder: Path) -> None:
        write_manifest(folder)
        shard = max(folder.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    monkeypatch.setattr("rac_engine.engine.closing.write_manifest", flip)
    with pytest.raises(Damaged, match=r"damaged: .*safetensors"):
        prune(checkpoint("qwen2"), tmp_path / "out", PruneSettings(method="magnitude"))
    assert not (tmp_path / "out").exists()


def test_a_job_goes_on_with_the_chunks_it_began_with_whatever_memory_it_is_given(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Chunks decide the last bits, and follow from the memory that was free at the start: the journal keeps them."""
    source, settings = checkpoint("qwen2"), PruneSettings(chunk_tokens=128, block_size=16)
    chunks = [128, 64]

    def begin(text: str) -> None:
        if text.startswith("layer 3"):
            raise KeyboardInterrupt

    planned = setup.__dict__["plan_memory"]

    def smaller(*args: Any, **options: Any) -> Any:
        plan = planned(*args, **options)
        if options.get("chunk") is None:
            plan = replace(plan, choice=replace(plan.choice, chunk_tokens=chunks.pop()))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(setup.__dict__, "plan_memory", smaller)
        with pytest.raises(Interrupted):
            prune(source, tmp_path / "out", settings, tiny.calibration(), progress=begin)
        report = prune(source, tmp_path / "out", settings, tiny.calibration())
    assert report.resumed and report.end["plan"]["chunk_tokens"] == 64 and chunks == [128]
    record = records_of(tmp_path / "out" / "rac" / "journal.jsonl")[0]
    assert record["chunk_tokens"] == 64 and record["activations"].startswith("replay: ")


@pytest.mark.parametrize(
    "changes", [{"method": "sparsegpt"}, {"method": "admm", "reconstruct": "residual", "damping": 0.01}]
)
def test_a_job_with_activations_on_disk_goes_on_to_the_same_bytes_within_any_limit(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Stopped under a limit that sends activations to disk; gone on with under it, under a lower one, and without."""
    monkeypatch.setattr(setup, "resident", lambda: 600 << 20)  # what of the tests' own is in memory is not the job's
    source, rules = checkpoint("qwen2"), settings(dtype="bfloat16", **changes)
    calibration = tiny.calibration([40, 17, 40, 25, 1, 9] * 16)
    whole = prune(source, tmp_path / "whole", rules, calibration)
    activations = 16 * 132 * (48 * (2 if rules.reconstructs == "residual" else 1) + 80) * 2
    limit, places = whole.end["plan"]["host_peak"] - 3 * activations // 4, list[str]()
    for goes_on in (limit, limit - 1, None):
        out = tmp_path / str(goes_on)
        with pytest.raises(Killed):
            prune(source, out, rules, calibration, host_memory=limit, progress=stop_in(3, Killed()))
        report = prune(source, out, rules, calibration, host_memory=goes_on)
        places.append(report.end["plan"]["place"])
        assert report.resumed == 2 and report.end["plan"]["host_peak"] <= (goes_on or limit + activations)
        assert contents(out) == contents(tmp_path / "whole")
    assert places == ["disk", "disk", "host"]


def test_what_decides_the_result_is_said_alike_by_a_larger_process(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much the process had resident when it began, and so what was planned, is told beside the times."""
    source, settings = checkpoint("qwen2"), PruneSettings(chunk_tokens=64, block_size=16)
    one = prune(source, tmp_path / "one", settings, tiny.calibration())
    resident = process.resident()
    monkeypatch.setattr(setup, "resident", lambda: resident + (1 << 30))
    other = prune(source, tmp_path / "other", settings, tiny.calibration())
    assert other.run == one.run and other.end["plan"] != one.end["plan"]


def test_lm_head_is_pruned_where_blocks_are_tuned_and_is_not_tuned_itself(checkpoint: Make, tmp_path: Path) -> None:
    rules = settings(method="admm", also=["lm_head"], tune=1)
    report = prune(checkpoint("llama"), tmp_path / "out", rules, tiny.calibration())
    tuned = {row["module"]: "tuned" in row for row in report.matrices}
    assert tuned.pop("lm_head") is False and set(tuned.values()) == {True}
