"""Recovery: the whole pruned model learns from the dense one, a layer in memory at a time, on its masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rac_engine.base.errors import Interrupted
from rac_engine.calibrate import recovery
from rac_engine.calibrate.activations import Place, Storage
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.recovery import Lessons, Piece
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.checkpoint.writer import CheckpointWriter
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.jobs.layout import PRUNE_JOURNAL, RECOVERY
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import PruneSettings, Recipe
from rac_engine.traces.calibration import Calibration
from rac_engine.traces.held_out import hold_out
from rac_kernels.solvers import distillation
from tests import tiny

Make = Callable[..., Path]

LENGTHS = (30, 17, 40, 25, 9, 12) * 8


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "BATCH", 128)
        patch.setattr(recovery, "PIECE", 64)
        patch.setattr(distillation, "STEP", 0.01)
        yield


@pytest.fixture(scope="module")
def whole(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that went through at once."""
    out = tmp_path_factory.mktemp("recovery") / "out"
    torch.set_num_threads(1)  # as within a test
    prune(checkpoint("qwen2"), out, recipe(checkpoint("qwen2")), tiny.calibration(LENGTHS))
    return out


def recipe(source: Path, recover: int = 2, **changes: Any) -> Recipe:
    given = {
        "chunk_tokens": 64,
        "block_size": 16,
        "method": "sparsegpt",
        "sparsity": 0.6,
        "recover": recover,
        **changes,
    }
    return Recipe(model=source, prune=PruneSettings(**given))


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    return {f.name: f.read_bytes() for f in one.glob("*.safetensors")} == {
        f.name: f.read_bytes() for f in other.glob("*.safetensors")
    }


@torch.no_grad()
def divergence(dense: Path, pruned: Path, calibration: Calibration) -> float:
    """The mean KL divergence over tokens of completions held out, by transformers' own models in fp32."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (dense, pruned)]
    lost, tokens = 0.0, 0
    for sequence in calibration.held_out:
        ids = torch.as_tensor(sequence.token_ids)[None]
        p, q = (model(ids).logits[0, max(sequence.prompt_length - 1, 0) : -1].log_softmax(-1) for model in models)
        lost, tokens = lost + float((p.exp() * (p - q)).sum()), tokens + len(p)
    return lost / tokens


class Whole:
    """A learner whose weights stay, and the gradients that it was given."""

    def __init__(self, model: Model, tensors: dict[str, Tensor]) -> None:
        self.model, self.tensors = model, tensors
        self.gradients: dict[str, Tensor] = {}

    def build(self, layer: int) -> list[Block]:
        own = {name: self.tensors[name] for name in self.model.tensor_names(layer)}
        return self.model.build_layer(layer, own, torch.float32, "cpu")

    def parameters(self, layer: int, blocks: list[Block]) -> list[nn.Parameter]:
        linears = {name: linear for block in blocks for name, linear in block.linears.items()}
        found = [linears[matrix.module].get_parameter("weight") for matrix in self.model.matrices(layer)]
        for weight in found:
            weight.requires_grad_(True)
        return found

    def move(self, layer: int, gradients: list[Tensor]) -> None:
        names = [matrix.name for matrix in self.model.matrices(layer)]
        self.gradients |= dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
    ("family", "place"), [("qwen2", "host"), ("gemma2", "disk"), ("granite", "host"), ("mixtral", "host")]
)
def test_gradients_are_those_of_transformers_model(checkpoint: Make, tmp_path: Path, family: str, place: Place) -> None:
    """Streamed layer by layer, from hidden states that are stored, in pieces: scales and caps of logits included."""
    source, calibration = checkpoint(family), tiny.weighted()
    model, dense = Model.open(Checkpoint.open(source)), load(source)
    other = {
        name: tensor + 0.02 * torch.randn_like(tensor) if "proj" in name else tensor for name, tensor in dense.items()
    }
    packing = Packing.of(calibration, 64)
    lessons = Lessons(model, packing, torch.float32, Storage("cpu", place, tmp_path))
    lessons.ask(Whole(model, dense).build)
    learner, pieces = Whole(model, other), [piece for batch in lessons.batches(1)[:1] for piece in batch]
    with lessons.learning() as step:
        learned = step(pieces, learner)
    assert len(pieces) > 1 and learned.tokens == sum(piece.tokens for piece in pieces)

    both = [AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() for _ in range(2)]
    names = dict(both[1].named_parameters())
    with torch.no_grad():
        for name, tensor in other.items():
            if name in names:
                names[name].copy_(tensor)
    if family == "mixtral":  # transformers has its experts in one tensor: the attention's are looked at
        own = Model.open(Checkpoint.open(source))
        assert own.is_mixture(0)
        _fuse(both[1], other)
    weights, lost, whole = recovery.next_token_weights(packing), torch.zeros(()), 0.0
    for piece in pieces:
        for start, length in piece.sequences:
            ids, w = packing.token_ids[start : start + length][None], weights[start : start + length]
            p, q = (model_(ids).logits[0].log_softmax(-1) for model_ in both)
            lost = lost + (p.exp() * (p - q)).sum(-1) @ w
            whole += float(w.sum())
    assert learned.weight == pytest.approx(whole)
    assert learned.divergence == pytest.approx(float(lost.detach()), rel=1e-3)
    (lost / whole).backward()
    compared = 0
    for name, gradient in learner.gradients.items():
        if name in names:
            wanted = names[name].grad
            assert wanted is not None
            assert (gradient - wanted).norm() < 1e-3 * wanted.norm() + 1e-8, name
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("family", ["qwen2", "phimoe"])
def test_the_readout_is_transformers_own(checkpoint: Make, family: str) -> None:
    """The bias of phimoe's lm_head included."""
    source = checkpoint(family)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if family == "phimoe":
        assert whole.lm_head.bias.abs().max() > 0
    readout = Model.open(Checkpoint.open(source)).readout(torch.float32, "cpu")
    hidden = torch.randn(5, whole.config.hidden_size)
    ((_, logits),) = readout.logits(hidden)
    with torch.no_grad():
        torch.testing.assert_close(logits, whole.lm_head(whole.model.norm(hidden)))


def _fuse(model: Any, tensors: dict[str, Tensor]) -> None:
    """Put experts' matrices of their own into transformers' fused tensors."""
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts = next(part for part in layer.modules() if hasattr(part, "gate_up_proj"))
            home = f"model.layers.{number}.block_sparse_moe.experts."
            for expert in range(len(experts.gate_up_proj)):
                one, up, down = (tensors[f"{home}{expert}.{part}.weight"] for part in ("w1", "w3", "w2"))
                experts.gate_up_proj[expert].copy_(torch.cat([one, up]))
                experts.down_proj[expert].copy_(down)


def test_it_comes_nearer_on_tokens_held_out_and_keeps_its_zeros(checkpoint: Make, tmp_path: Path) -> None:
    source, calibration = checkpoint("qwen3"), tiny.calibration(LENGTHS)
    held = hold_out(calibration, 0.05).calibration
    report = prune(source, tmp_path / "out", recipe(source, dtype="float32"), calibration)
    prune(source, tmp_path / "plain", recipe(source, 0, dtype="float32"), calibration)
    said = report.end["recovery"]
    assert said["after"] < 0.99 * said["before"] and said["held_out"] and len(said["passes"]) == 2
    assert said["before"] == pytest.approx(divergence(source, tmp_path / "plain", held), rel=1e-3)
    assert said["after"] == pytest.approx(divergence(source, tmp_path / "out", held), rel=1e-3)
    before, after = load(tmp_path / "plain"), load(tmp_path / "out")
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    pruned = {row["name"] for row in report.matrices}
    assert {name for name in before if not torch.equal(before[name], after[name])} == pruned
    assert verify(tmp_path / "out", source).problems == []
    assert not (tmp_path / "out" / RECOVERY).exists()
    assert any("recovered in 2 passes" in note and "held out" in note for note in report.end["notes"])


def test_what_learning_makes_worse_is_not_kept(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "STEP", 5.0)
    source = checkpoint("qwen2")
    report = prune(source, tmp_path / "out", recipe(source, 1), tiny.calibration(LENGTHS))
    assert report.end["recovery"]["kept"] == 0
    assert report.end["recovery"]["after"] == report.end["recovery"]["before"]
    prune(source, tmp_path / "plain", recipe(source, 0), tiny.calibration(LENGTHS))
    assert same(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    "moment",
    ["asking the dense", "pass 1/2, step 2/", "pass 1/2, judging", "pass 2/2, step 1/", "reading back: tensor 1 of"],
)
def test_a_job_stopped_anywhere_ends_with_the_same_bytes(
    checkpoint: Make, tmp_path: Path, whole: Path, moment: str
) -> None:
    source, calibration = checkpoint("qwen2"), tiny.calibration(LENGTHS)

    def stop(said: str) -> None:
        if moment in said:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prune(source, tmp_path / "out", recipe(source), calibration, progress=stop)
    prune(source, tmp_path / "out", recipe(source), calibration)
    assert same(whole, tmp_path / "out")
    journals = [(out / PRUNE_JOURNAL).read_text().splitlines() for out in (whole, tmp_path / "out")]
    learned = [[json.loads(line.partition(" ")[2]) for line in lines if '"recovery"' in line] for lines in journals]
    assert learned[0] == learned[1] and len(learned[0]) == 5


@pytest.mark.parametrize("written", [1, 9])
def test_a_job_stopped_while_it_writes_goes_on_with_what_was_learned(
    checkpoint: Make, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    source, calibration = checkpoint("qwen2"), tiny.calibration(LENGTHS)
    write, left = CheckpointWriter.write, [21 + written]  # behind those of pruning

    def stopping(self: CheckpointWriter, name: str, tensor: Tensor) -> str:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(self, name, tensor)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(CheckpointWriter, "write", stopping)
        prune(source, tmp_path / "out", recipe(source), calibration)
    assert (tmp_path / "out.partial" / RECOVERY).exists()
    prune(source, tmp_path / "out", recipe(source), calibration)
    assert same(whole, tmp_path / "out")


def test_damaged_files_of_a_pass_are_made_again(checkpoint: Make, tmp_path: Path, whole: Path) -> None:
    source, calibration = checkpoint("qwen2"), tiny.calibration(LENGTHS)

    def stop(said: str) -> None:
        if "pass 2/2, step 1/" in said:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prune(source, tmp_path / "out", recipe(source), calibration, progress=stop)
    file = next((tmp_path / "out.partial" / RECOVERY / "1").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    prune(source, tmp_path / "out", recipe(source), calibration)
    assert same(whole, tmp_path / "out")


@pytest.mark.parametrize("words", [{"method": "magnitude"}, {"also": ["embeddings"]}, {"values": "int8"}])
def test_it_is_refused_where_it_cannot_be(words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="recover: 2"):
        PruneSettings(recover=2, **words)


def test_a_token_counts_for_what_comes_next_in_its_sequence() -> None:
    packing = Packing.of(tiny.weighted(), 64)
    weights, at = recovery.next_token_weights(packing), 0
    assert packing.weights is not None
    for sequence in sorted(tiny.weighted().sequences, key=lambda sequence: -len(sequence.token_ids)):
        length = len(sequence.token_ids)
        for place in range(length):
            behind = place + 1 < length and place + 1 >= sequence.prompt_length
            assert weights[at + place] == (packing.weights[at + place + 1] if behind else 0)
        at += length


def test_a_piece_is_whole_sequences() -> None:
    piece = Piece(((10, 5), (40, 3)), 7)
    assert (piece.tokens, piece.chunk.lengths, piece.chunk.is_part) == (8, (5, 3), False)


def test_the_plan_counts_it(checkpoint: Make) -> None:
    source = checkpoint("qwen2")
    plain, learning = (make_plan(source, PruneSettings(recover=n), 4096, 64) for n in (0, 2))
    assert plain.memory.learning == 0 < learning.memory.learning
    assert "recover" in [phase.name for phase in learning.memory.phases]
    assert next(work.flops for work in learning.work if work.name == "recovery") > 0
