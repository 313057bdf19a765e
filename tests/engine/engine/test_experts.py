"""Mixtures of experts: every expert by its own tokens, those that saw too few by the rule, in any number of passes."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import DenseInputs, DenseOutputs, Statistic
from rac_engine.calibrate.stream import DenseReference, Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine import loop, setup, stages
from rac_engine.engine.layer import Layer
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import PruneSettings
from tests import tiny
from tests.engine.inputs import inputs_of

Make = Callable[..., Path]
Inputs = dict[str, torch.Tensor]
TOKENS = 4 * (40 + 17 + 40 + 25 + 1 + 9)


def settings(**changes: Any) -> PruneSettings:
    return PruneSettings(**{"chunk_tokens": 64, "block_size": 16, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture
def lonely(checkpoint: Make, tmp_path: Path) -> Path:
    """A DeepSeek-V3 whose router never chooses expert 3 of the last layer."""
    source = checkpoint("deepseek_v3", dtype=torch.float32, shard_size="1GB")
    folder = Path(shutil.copytree(source, tmp_path / "lonely"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][3] = -100.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_matrices_of_a_mixture(checkpoint: Make) -> None:
    model = Model.open(Checkpoint.open(checkpoint("deepseek_v3")))
    assert [model.is_mixture(layer) for layer in range(3)] == [False, True, True]
    found = [(m.stage, m.group.expert, m.module, m.rows, m.columns) for m in model.matrices(2)]
    assert found[:5] == [
        (0, None, "self_attn.q_a_proj", 24, 48),
        (0, None, "self_attn.kv_a_proj_with_mqa", 20, 48),
        (1, None, "self_attn.q_b_proj", 48, 24),
        (1, None, "self_attn.kv_b_proj", 64, 16),
        (2, None, "self_attn.o_proj", 48, 32),
    ]
    assert found[5:9] == [
        (3, None, "mlp.shared_experts.gate_proj", 32, 48),
        (3, None, "mlp.shared_experts.up_proj", 32, 48),
        (3, 0, "mlp.experts.0.gate_proj", 32, 48),
        (3, 0, "mlp.experts.0.up_proj", 32, 48),
    ]
    assert found[-1] == (4, 7, "mlp.experts.7.down_proj", 48, 32)
    assert len({m.group for m in model.matrices(2)}) == 4 + 2 * (1 + 8)
    mixtral = Model.open(Checkpoint.open(checkpoint("mixtral"))).matrices(0)
    assert mixtral[4].name == "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.mark.parametrize(("family", "least"), [("mixtral", 9.0), ("deepseek_v3", 9.0), ("gpt_oss", 1.0)])
def test_passes_change_no_byte(checkpoint: Make, tmp_path: Path, family: str, least: float) -> None:
    """However many Hessians are gathered in one pass, and what ties them to the dense model, blended or not."""
    rows = []
    for hessians in (None, 1, 3):
        out = tmp_path / str(hessians)
        rules = settings(experts={"min_tokens": least})
        report = prune(checkpoint(family), out, rules, tiny.calibration(), hessians=hessians)
        rows.append([{**row, "seconds": 0} for row in report.matrices])
        for file in (tmp_path / "None").glob("*.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert rows[0] == rows[1] == rows[2]


def given_to_experts(
    given: Inputs, dense: Inputs, before: Inputs, after: Inputs, path: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What all tokens would give an expert's matrix in the pruned model and in the dense one [tokens, columns], and
    which of them the pruned model's router sends there [tokens]; all in fp64."""
    experts, number, part = path.rsplit(".", 2)
    pair = [given[experts], dense[experts]]
    if part in ("down_proj", "w2"):
        first = ("w1", "w3") if part == "w2" else ("gate_proj", "up_proj")
        for at, weights in enumerate((after, before)):
            gate, up = (weights[f"{experts}.{number}.{name}.weight"].double() for name in first)
            pair[at] = torch.nn.functional.silu(pair[at] @ gate.T) * (pair[at] @ up.T)
    return pair[0], pair[1], (given[f"{experts}: chosen"] == int(number)).any(dim=1)


@pytest.mark.parametrize("reconstruct", ["layer", "dense"])
def test_scarce_experts_are_blended_with_all_tokens(lonely: Path, tmp_path: Path, reconstruct: str) -> None:
    """The objective of a pruned matrix is its error by the blended H, as the docstring of the engine states it."""
    out = tmp_path / "out"
    rules = settings(experts={"min_tokens": 20.0}, reconstruct=reconstruct)
    report = prune(lonely, out, rules, tiny.calibration())
    ids = [torch.as_tensor(sequence.token_ids) for sequence in tiny.calibration().sequences]
    given, dense, before, after = inputs_of(out, ids), inputs_of(lonely, ids), weights(lonely), weights(out)
    of_experts = [row for row in report.matrices if ".experts." in row["name"]]
    assert len(of_experts) == 2 * 8 * 3
    assert [row["tokens"] for row in of_experts if ".2.mlp.experts.3." in row["name"]] == [0, 0, 0]
    for row in of_experts:
        x, theirs, here = given_to_experts(given, dense, before, after, row["name"].removesuffix(".weight"))
        tokens = int(here.sum())
        assert (row["tokens"], len(x)) == (tokens, TOKENS)
        W, Q = before[row["name"]].double(), after[row["name"]].double()
        errors = (x @ Q.T - (theirs if reconstruct == "dense" else x) @ W.T).square().sum(1)
        scarce = max(20 * row["columns"] - tokens, 0)
        objective = errors[here].sum() + scarce / TOKENS * errors.sum()
        assert row["objective"] == pytest.approx(float(objective), rel=2e-3), row["name"]
        assert row["sparsity"] == pytest.approx(0.5, abs=0.01)
        note = f"{tokens} tokens, fewer than {20 * row['columns']} (20 for each of its inputs): H blended"
        assert (scarce > 0) == any(text.startswith(note) for text in row["notes"])
    assert verify(out, lonely).problems == []


@pytest.mark.parametrize("reconstruct", ["layer", "dense"])
def test_few_tokens_are_blended_with_a_sample(lonely: Path, tmp_path: Path, reconstruct: str) -> None:
    """With fewer tokens wanted than there are, the last matrix's input is estimated by that many of them."""
    out = tmp_path / "out"
    rules = settings(experts={"min_tokens": 3.0}, reconstruct=reconstruct)
    report = prune(lonely, out, rules, tiny.calibration())
    row = next(row for row in report.matrices if row["name"].endswith("layers.2.mlp.experts.3.down_proj.weight"))
    ids = [torch.as_tensor(sequence.token_ids) for sequence in tiny.calibration().sequences]
    ids.sort(key=lambda sequence: -len(sequence))
    given, dense, before, after = inputs_of(out, ids), inputs_of(lonely, ids), weights(lonely), weights(out)
    x, theirs, _ = given_to_experts(given, dense, before, after, row["name"].removesuffix(".weight"))
    sample = torch.arange(96) * TOKENS // 96
    W, Q = before[row["name"]].double(), after[row["name"]].double()
    off = x[sample] @ Q.T - (theirs if reconstruct == "dense" else x)[sample] @ W.T
    assert row["objective"] == pytest.approx(float(off.square().sum()), rel=2e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_tied_to_the_dense_ones_at_the_pruned_routers_tokens(
    checkpoint: Make, tmp_path: Path, family: str
) -> None:
    """H, and X′ᵀX and XᵀX or C = X′ᵀ(X Wᵀ), of every input of a mixture, by fp64 sums over what both models are given
    in transformers; tokens have weights."""
    source, out, calibration = checkpoint(family, dtype=torch.float32), tmp_path / "out", tiny.weighted()
    prune(source, out, settings(method="magnitude"))
    sequences = sorted(calibration.sequences, key=lambda sequence: -len(sequence.token_ids))
    ids = [torch.as_tensor(sequence.token_ids) for sequence in sequences]
    given, dense, before, after = inputs_of(out, ids), inputs_of(source, ids), weights(source), weights(out)
    streams, blocks = [], []
    with torch.inference_mode():
        for folder in (out, source):
            model = Model.open(Checkpoint.open(folder))
            stream = Stream(model, Packing.of(calibration, 64), model.dtype)
            for layer in range(model.layers):
                tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
                parts = model.build_layer(layer, tensors, model.dtype, "cpu")
                for block in parts[: None if layer < 2 else 1]:
                    stream.advance(block)
            streams.append(stream)
            blocks.append(parts[1])
        paths = {m.group.input: m.path for m in model.matrices(2) if m.group.block == 1 and m.module == m.group.input}
        columns = {m.module: m.columns for m in model.matrices(2)}
        ties = {name: DenseInputs(columns[name], "cpu") for name in paths}
        statistics = {name: Statistic(columns[name], True, "cpu", tie) for name, tie in ties.items()}
        wide = {m.module: DenseOutputs(m.columns, m.rows, "cpu") for m in model.matrices(2) if m.module.endswith(".w2")}
        statistics |= {name: Statistic(columns[name], True, "cpu", tie) for name, tie in wide.items()}
        streams[0].observe_experts(blocks[0], statistics, DenseReference(streams[1], blocks[1]))
    counts, differ = torch.cat([torch.as_tensor(s.weights) for s in sequences if s.weights is not None]).double(), 0
    for name, path in paths.items():
        if blocks[0].is_routed(name):
            x, theirs, here = given_to_experts(given, dense, before, after, path)
            experts = path.rsplit(".", 2)[0]
            differ += int((given[f"{experts}: chosen"] != dense[f"{experts}: chosen"]).sum())
        else:
            x, theirs, here = given[path], dense[path], torch.ones(TOKENS, dtype=torch.bool)
        w, statistic = (counts * here)[:, None], statistics[name]
        assert statistic.tokens == int((w > 0).sum())
        match = statistic.match
        pairs = [(statistic.value.triu(), ((x * w).T @ x).triu())]
        if isinstance(match, DenseInputs):
            pairs += [(match.cross, (x * w).T @ theirs), (match.gram.triu(), ((theirs * w).T @ theirs).triu())]
        else:
            assert isinstance(match, DenseOutputs)
            outputs = theirs @ before[f"{path}.weight"].double().T
            pairs.append((match.cross, (x * w).T @ outputs))
            assert match.wanted == match.dense == pytest.approx(float((outputs.square() * w).sum()), rel=1e-4)
        for found, exact in pairs:
            assert float((found.double() - exact).abs().max()) <= 1e-4 * float(exact.abs().max()), name
    assert differ  # or nothing was said about which router it is


def test_matching_brings_a_mixture_nearer_to_the_dense_model(checkpoint: Make, tmp_path: Path) -> None:
    source, calibration = checkpoint("qwen3_moe", dtype=torch.float32), tiny.calibration()
    ids = [torch.as_tensor(sequence.token_ids) for sequence in calibration.sequences]
    wanted, far = inputs_of(source, ids)["lm_head"], {}
    for reconstruct in ("layer", "dense", "residual"):
        out = tmp_path / reconstruct
        prune(source, out, settings(reconstruct=reconstruct), calibration)
        far[reconstruct] = float((inputs_of(out, ids)["lm_head"] - wanted).square().sum() / wanted.square().sum())
    assert far["dense"] < 0.9 * far["layer"]
    assert far["residual"] < 0.9 * far["layer"]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("otherwise", ["magnitude", "dense"])
def test_scarce_experts_otherwise(lonely: Path, tmp_path: Path, otherwise: str, method: str) -> None:
    out = tmp_path / "out"
    rule = {"min_tokens": 3.0, "otherwise": otherwise}
    report = prune(lonely, out, settings(experts=rule, method=method), tiny.calibration())
    before, after = weights(lonely), weights(out)
    scarce = [row for row in report.matrices if ".experts." in row["name"] and row["tokens"] < 3 * row["columns"]]
    assert {row["name"] for row in scarce} >= {
        f"model.layers.2.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    for row in scarce:
        why = f"{row['tokens']} tokens, fewer than {3 * row['columns']} (3 for each of its inputs)"
        if otherwise == "dense":
            assert row["skipped"] == why
            assert torch.equal(after[row["name"]], before[row["name"]])
        else:
            assert row["notes"] == [f"{why}: pruned by magnitude"]
            kept = before[row["name"]].abs() > before[row["name"]].abs().median()
            assert torch.equal(after[row["name"]], before[row["name"]] * kept)
    others = [row for row in report.matrices if row not in scarce]
    assert others and all("skipped" not in row and not row["notes"] for row in others)


def test_a_layer_at_once_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="order: staged"):
        prune(checkpoint("mixtral"), tmp_path / "out", settings(order="layer"), tiny.calibration())


def test_a_plan_counts_what_the_router_sends(checkpoint: Make, tmp_path: Path) -> None:
    """From the config alone, of a tiny model with the parts of DeepSeek-R1."""
    shutil.copy(checkpoint("deepseek_v3") / "config.json", tmp_path)
    plan = make_plan(tmp_path, PruneSettings(method="sparsegpt", reconstruct="layer"), tokens=1000, length=100)
    latent = 48 * (24 + 20) + 24 * 48 + 16 * 64 + 32 * 48
    mlp, expert = 3 * 48 * 80, 3 * 48 * 32
    assert plan.weights == 3 * latent + mlp + 2 * 9 * expert
    work = {each.name: each.flops for each in plan.work}
    assert work["attention"] == 2 * 1000 * 100 * 32 * 3
    assert work["forward"] == 2 * 1000 * (3 * latent + mlp + 2 * (1 + 3) * expert)  # 3 of 8 experts, and the shared one
    triangle = {n: n * (n + 1) for n in (16, 24, 32, 48, 80)}
    layer = triangle[48] + triangle[24] + triangle[16] + triangle[32]
    of_all = 3 * layer + triangle[48] + triangle[80] + 2 * (triangle[48] + triangle[32])
    assert work["Hessian"] == pytest.approx(1000 * (of_all + 2 * 3 * (triangle[48] + triangle[32])))
    modules = [group.modules[0] for group in plan.groups]
    assert modules == [
        *("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.down_proj", "mlp.shared_experts.gate_proj", "mlp.experts.0.gate_proj"),
        *("mlp.shared_experts.down_proj", "mlp.experts.0.down_proj"),
    ]


def test_stacked_experts_leave_the_dense_model_beside_as_it_is(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss has all experts in one tensor, which is pruned in place: not in the one that the dense model reads."""
    source, calibration, beside = checkpoint("gpt_oss"), tiny.calibration(), list[torch.Tensor]()
    begin = stages.prune_layer

    def noted(layer: Layer) -> None:
        assert layer.context.dense is not None
        beside.append(layer.context.dense.hidden.read(0, TOKENS).clone())
        begin(layer)

    monkeypatch.setattr(loop, "prune_layer", noted)
    prune(source, tmp_path / "whole", settings(dtype="bfloat16"), calibration)
    model = Model.open(Checkpoint.open(source))
    stream = Stream(model, Packing.of(calibration, 64), model.dtype)
    for layer, hidden in enumerate(beside):
        assert torch.equal(hidden, stream.hidden.read(0, TOKENS)), layer
        tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
        with torch.inference_mode():
            for block in model.build_layer(layer, tensors, model.dtype, "cpu"):
                stream.advance(block)


def test_a_job_with_stacked_experts_goes_on_to_the_same_bytes(checkpoint: Make, tmp_path: Path) -> None:
    source, calibration = checkpoint("gpt_oss"), tiny.calibration()
    prune(source, tmp_path / "whole", settings(), calibration)

    def stop(line: str) -> None:
        if line.startswith("layer 3/"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prune(source, tmp_path / "out", settings(), calibration, progress=stop)
    assert prune(source, tmp_path / "out", settings(), calibration).resumed == 2
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("hessians", [1, 3])
def test_no_pass_holds_the_hessians_of_the_one_before(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessians: int
) -> None:
    """At most as many as a pass may gather are alive at a time, and the one that scarce experts are blended with."""
    alive, most = weakref.WeakSet[Statistic](), [0]
    begin = Statistic.__init__

    def noted(self: Statistic, *words: Any) -> None:
        begin(self, *words)
        alive.add(self)
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(Statistic, "__init__", noted)
    source = checkpoint("deepseek_v3")
    rules = settings(reconstruct="layer", experts={"min_tokens": 9.0})
    prune(source, tmp_path / "out", rules, tiny.calibration(), hessians=hessians)
    assert most[0] <= hessians + 1


def test_a_limit_that_not_all_hessians_fit_in_means_more_passes_and_the_same_bytes(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's shape in small, in the host memory that a CPU's job may take: as many passes as the plan says."""
    monkeypatch.setattr(setup, "resident", lambda: 600 << 20)  # what of the tests' own is in memory is not the job's
    shape = {"hidden_size": 256, "n_routed_experts": 32, "n_group": 4, "num_experts_per_tok": 4, "num_hidden_layers": 2}
    source, rules = checkpoint("deepseek_v3", shard_size="1GB", **shape), settings(method="sparsegpt")
    calibration = tiny.calibration()
    whole = prune(source, tmp_path / "whole", rules, calibration)
    plan = whole.end["plan"]
    assert plan["hessians"] is None
    passes: list[int] = []
    observe = Stream.observe

    def counted(self: Stream, block: Block, statistics: dict[str, Statistic], *rest: Any) -> Any:
        if any(name.startswith("mlp.experts") for name in statistics):
            passes.append(len(statistics))
        return observe(self, block, statistics, *rest)

    monkeypatch.setattr(Stream, "observe", counted)
    limit = plan["host_peak"] - 20 * 4 * 256**2  # a Hessian of gate and up has 256² numbers
    report = prune(source, tmp_path / "few", rules, calibration, host_memory=limit)
    assert report.end["plan"]["host_peak"] <= limit
    together = report.end["plan"]["hessians"]
    assert together is not None and together <= 16
    entrance = passes[: -(-32 // (together - 1))]  # that of all tokens is among those of the first pass
    assert entrance[0] == together and sum(entrance) == 32 + 1 and len(entrance) > 2
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "few")
    assert all(torch.equal(after[name], before[name]) for name in before)
