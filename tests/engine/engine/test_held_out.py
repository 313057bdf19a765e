"""Tokens that are held out judge a pruned model, and teach it nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import DenseOutputs, Statistic
from rac_engine.calibrate.stream import DenseReference, Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.engine.metrics import load_metrics
from rac_engine.engine.pruning import prune
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.plan import memory
from rac_engine.recipe.settings import CalibrationSettings, PruneSettings, Recipe
from rac_engine.report.page import write_report
from rac_engine.traces.calibration import Calibration
from rac_engine.traces.held_out import hold_out
from rac_engine.traces.mixture import mixed
from tests import tiny

Make = Callable[..., Path]

LENGTHS = (30, 17, 40, 25, 9, 12) * 8


def recipe(source: Path, held_out: float = 0.05, **changes: Any) -> Recipe:
    prune = PruneSettings(**{"chunk_tokens": 64, "block_size": 16, **changes})
    return Recipe(model=source, calibration=CalibrationSettings(held_out=held_out), prune=prune)


def apart(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """The sequences that are seen, and those that are held out, as two calibrations."""
    seen = [s for s in calibration.sequences if not s.held_out]
    held = [replace(s, held_out=False) for s in calibration.held_out]
    return replace(calibration, sequences=seen), replace(calibration, sequences=held)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"method": "sparsegpt", "reconstruct": "residual"}),
        ("qwen2", {"method": "sparsegpt", "order": "layer"}),
        ("mixtral", {"method": "sparsegpt", "reconstruct": "residual"}),
        ("qwen2", {"damping": 0.01}),
    ],
)
def test_it_is_pruned_as_if_there_were_no_more_than_what_is_seen(
    checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    source, whole = checkpoint(family), tiny.calibration(LENGTHS)
    seen, held = apart(hold_out(whole, 0.05).calibration)
    assert len(held.sequences) == 8
    report = prune(source, tmp_path / "judged", recipe(source, **changes), whole)
    prune(source, tmp_path / "seen", recipe(source, 0, **changes), seen)
    assert weights(tmp_path / "judged") == weights(tmp_path / "seen")
    counted = report.run["calibration"]
    assert counted["tokens"] == whole.tokens
    assert counted["held_out"] == {"sequences": 8, "tokens": held.tokens}
    judged = [row["held_out_error"] for row in report.matrices if row["held_out_error"] is not None]
    assert len(judged) >= len(report.matrices) - 4 and all(error > 0 for error in judged)  # an expert may see none


def test_switched_off_nothing_is_held_out_or_judged(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    report = prune(source, tmp_path / "out", recipe(source, 0), tiny.calibration(LENGTHS))
    assert report.run["calibration"]["held_out"] == {"sequences": 0, "tokens": 0}
    assert {row["held_out_error"] for row in report.matrices} == {None}
    assert "damping 0.01 throughout: no tokens are held out to choose it by" in report.end["notes"]
    prune(source, tmp_path / "told", recipe(source, 0, damping=0.01), tiny.calibration(LENGTHS))
    assert weights(tmp_path / "out") == weights(tmp_path / "told")


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_dampings_are_chosen_by_it_and_recorded(checkpoint: Make, tmp_path: Path, family: str) -> None:
    source, whole = checkpoint(family), tiny.calibration((60, 90, 75, 40) * 10)
    report = prune(source, tmp_path / "out", recipe(source), whole)
    chosen = [row for row in report.matrices if "dampings" in row]
    assert len(chosen) >= 6 if family == "mixtral" else len(chosen) == len(report.matrices)
    for row in chosen:
        assert 0 < row["dampings"][f"{row['damping']:g}"] <= 1.005 * min(row["dampings"].values())
        assert row["ridge"] > 0
    others = [row for row in report.matrices if "dampings" not in row]
    few = "damping 0.01: fewer than 256 tokens held out to choose it by"
    assert all(row["damping"] == 0.01 and few in row["notes"] for row in others)
    (note,) = (note for note in report.end["notes"] if note.startswith("damping chosen by held-out error: "))
    dampings = sorted(row["damping"] for row in chosen)
    assert f"{dampings[0]:g} to {dampings[-1]:g}, " in note
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by held-out error" in card or len({row["damping"] for row in report.matrices}) == 1
    told = prune(source, tmp_path / "told", recipe(source, damping=0.03), whole)
    assert all(row["damping"] == 0.03 and "dampings" not in row for row in told.matrices)


@torch.inference_mode()
@pytest.mark.parametrize("matched", [False, True])
def test_what_is_held_out_is_counted_apart(checkpoint: Make, matched: bool) -> None:
    """Statistics of both parts of a stream are those of two streams, each of one part alone."""
    model = Model.open(Checkpoint.open(checkpoint("qwen2")))
    whole = hold_out(tiny.calibration(LENGTHS), 0.05).calibration
    tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(0)}

    def block(scale: float) -> Block:
        own = {name: tensor * scale if "_proj" in name else tensor for name, tensor in tensors.items()}
        return model.build_layer(0, own, torch.float32, "cpu")[1]

    def gathered(calibration: Calibration, held: bool) -> Statistic:
        stream, dense = (Stream(model, Packing.of(calibration, 64), torch.float32) for _ in range(2))
        pruned = block(0.5)
        columns = pruned.width

        def empty(other: Statistic | None = None) -> Statistic:
            match = DenseOutputs(columns, model.hidden_size, "cpu") if matched else None
            return Statistic(columns, True, "cpu", match, other)

        statistic = empty(empty() if held else None)
        statistics = {pruned.last or "": statistic}
        if matched:
            stream.observe_matched(pruned, statistics, DenseReference(dense, block(1.0)), residual=True)
        else:
            stream.observe(pruned, statistics)
        return statistic

    both = gathered(whole, held=True)
    assert both.held is not None
    for part, calibration in zip((both, both.held), apart(whole), strict=True):
        alone = gathered(calibration, held=False)
        assert part.tokens == alone.tokens == calibration.tokens
        torch.testing.assert_close(part.value, alone.value)
        if isinstance(part.match, DenseOutputs) and isinstance(alone.match, DenseOutputs):
            torch.testing.assert_close(part.match.cross, alone.match.cross)
            assert part.match.wanted == pytest.approx(alone.match.wanted)


@torch.inference_mode()
def states(folder: Path, calibration: Calibration) -> list[Tensor]:
    """The hidden states [tokens, hidden] behind each layer, of transformers' model; the last one's are normed."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    each = [
        model(torch.as_tensor(s.token_ids)[None], output_hidden_states=True).hidden_states
        for s in calibration.sequences
    ]
    return [torch.cat([layers[at][0] for layers in each]).double() for at in range(1, len(each[0]))]


def test_every_block_and_layer_is_held_against_the_dense_model(checkpoint: Make, tmp_path: Path) -> None:
    source, whole = checkpoint("qwen2"), tiny.calibration(LENGTHS)
    report = prune(source, tmp_path / "out", recipe(source, dense=[r"model\.layers\.1\.mlp.*"], dtype="float32"), whole)
    layers = len({row["layer"] for row in report.matrices})
    assert [(row["layer"], row["block"]) for row in report.blocks] == [(n, b) for n in range(layers) for b in (0, 1)]
    assert [row["layer"] for row in report.layers] == list(range(layers))
    for row, block in zip(report.layers, report.blocks[1::2], strict=True):
        assert (row["relative_error"], row["held_out_error"]) == (block["relative_error"], block["held_out_error"])
    for part, name in zip(apart(hold_out(whole, 0.05).calibration), ("relative_error", "held_out_error"), strict=True):
        dense, pruned = states(source, part), states(tmp_path / "out", part)
        for row, wanted, found in zip(report.layers[:-1], dense, pruned, strict=False):
            error = float((found - wanted).square().sum() / wanted.square().sum())
            assert row[name] == pytest.approx(error, rel=1e-3)
    read = load_metrics(tmp_path / "out" / "rac")
    assert (read.blocks, read.layers) == (report.blocks, report.layers)
    assert read.last_layer == report.layers[-1] and read.held_out_error and read.gap


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_job_that_goes_on_finds_the_same_errors(checkpoint: Make, tmp_path: Path, family: str) -> None:
    source, whole = checkpoint(family), tiny.calibration(LENGTHS)

    def stop(said: str) -> None:
        if said.startswith("layer 2/"):
            raise RuntimeError("stopped")

    once = prune(source, tmp_path / "once", recipe(source), whole)
    with pytest.raises(RuntimeError, match="stopped"):
        prune(source, tmp_path / "twice", recipe(source), whole, progress=stop)
    twice = prune(source, tmp_path / "twice", recipe(source), whole)
    assert twice.resumed == 1 and weights(tmp_path / "once") == weights(tmp_path / "twice")
    assert (once.blocks, once.layers) == (twice.blocks, twice.layers)
    assert [row["held_out_error"] for row in once.matrices] == [row["held_out_error"] for row in twice.matrices]


def test_errors_of_each_source_make_up_those_of_all(checkpoint: Make, tmp_path: Path) -> None:
    source, parts = checkpoint("qwen2"), [tiny.calibration(LENGTHS, seed=seed) for seed in (0, 1)]

    def load(name: str, tokens: int | None) -> Calibration:
        return parts[int(name)]

    report = prune(source, tmp_path / "out", recipe(source, dtype="float32"), mixed(["0", "1"], None, load))
    rows = report.run["calibration"]["sources"]
    assert [(row["tokens"], row["sequences"]) for row in rows] == [(sum(LENGTHS), len(LENGTHS))] * 2
    assert [row["held_out"]["sequences"] for row in rows] == [8, 8]
    for row in report.blocks:
        for key in ("relative_error", "held_out_error"):
            shares = [each[key] for each in row["by_source"]]
            assert len(shares) == 2 and min(shares) < row[key] < max(shares)
    page = write_report(tmp_path / "out").read_text()
    assert "Source 2" in page and "random: " in page


def test_copies_with_replaced_tokens_are_learned_from_and_reported_apart(checkpoint: Make, tmp_path: Path) -> None:
    source, whole = checkpoint("qwen2"), tiny.calibration(LENGTHS)
    tiny.save_tokenizer(folder := tmp_path / "model")
    for file in source.iterdir():
        shutil.copy(file, folder)
    asked = recipe(folder, damping=0.01)
    asked = asked.model_copy(update={"calibration": CalibrationSettings(replaced=0.5)})
    report = prune(folder, tmp_path / "out", asked, whole)
    plain = prune(folder, tmp_path / "plain", recipe(folder, damping=0.01), whole)
    assert weights(report.out) != weights(plain.out)
    first, copies = report.run["calibration"]["sources"]
    assert first["held_out"] == plain.run["calibration"]["held_out"] == report.run["calibration"]["held_out"]
    assert copies["label"] == "replaced" and copies["held_out"] == {"sequences": 0, "tokens": 0}
    assert copies["tokens"] == math.ceil(0.5 * (whole.tokens - first["held_out"]["tokens"]))
    assert all(row["by_source"][1]["held_out_error"] is None for row in report.layers)
    assert "Source 2" in write_report(report.out).read_text()


def test_without_room_for_it_matrices_are_not_judged(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = checkpoint("qwen2"), tiny.calibration(LENGTHS)
    judged = prune(source, tmp_path / "judged", recipe(source), whole)
    every = memory._choices
    monkeypatch.setattr(memory, "_choices", lambda *a, **k: (choice for choice in every(*a, **k) if not choice.judged))
    report = prune(source, tmp_path / "out", recipe(source), whole)
    assert {row["held_out_error"] for row in report.matrices} == {None}
    assert "matrices are not judged by the tokens held out, for want of memory" in report.end["notes"]
    assert report.blocks == judged.blocks
