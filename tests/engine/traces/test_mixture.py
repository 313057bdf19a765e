"""Calibrations of several sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rac_engine.base.errors import BadInput
from rac_engine.recipe.fields import with_share
from rac_engine.recipe.files import absolute, dump, load_recipe
from rac_engine.recipe.settings import CalibrationSettings, CalibrationSource, Recipe
from rac_engine.traces.calibration import Calibration, TokenSequence
from rac_engine.traces.mixture import mixed

HAS = {"A": 1000, "B": 300}


def load(source: str, tokens: int | None) -> Calibration:
    """A source of sequences of ten tokens, up to the budget."""
    budget = HAS[source] if tokens is None else min(tokens, HAS[source])
    lengths = [10] * (budget // 10) + ([budget % 10] if budget % 10 else [])
    sequences = [TokenSequence(np.full(length, ord(source)), 1) for length in lengths]
    return Calibration(source, "pieces of text" if source == "B" else "traces", "all", sequences)


@pytest.mark.parametrize(
    ("sources", "tokens", "counts"),
    [
        (["A:0.8", "B:0.2"], 1000, [800, 200]),
        (["A:.8", "B"], 501, [401, 100]),
        (["A", "B"], 400, [200, 200]),
        (["A", "B"], None, [1000, 300]),
        (["A:0.5", "B:0.5"], None, [300, 300]),
        (["A:1"], 70, [70]),
    ],
)
def test_each_source_has_its_share_of_the_tokens(sources: list[str], tokens: int | None, counts: list[int]) -> None:
    made = mixed(sources, tokens, load)
    assert [part.tokens for part in made.parts] == counts and made.tokens == sum(counts)
    for number, (part, count) in enumerate(zip(made.parts, counts, strict=True)):
        own = [sequence for sequence in made.sequences if sequence.source == number]
        assert sum(sequence.counted for sequence in own) == count
        assert all((sequence.token_ids == ord(part.source)).all() for sequence in own)
    assert made.remarks == ()


def test_a_source_that_is_too_small_is_named() -> None:
    made = mixed(["A:0.5", "B:0.5"], 1000, load)
    assert made.remarks == ("B holds 300 tokens, fewer than the 500 of its share",)
    assert made.label == "traces + text" and "62% traces, 38% text" in made.describe()


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        (["A:0.8", "B:0.1"], r"0\.8 and 0\.1 sum to 0\.9; they should sum to 1"),
        (["A:0.8", "B:0.8"], r"sum to 1\.6; they should sum to 1"),
        (["A:0.8"], r"sum to 0\.8"),
        (["A:1", "B"], "leave nothing to the sources without one"),
        (["A:0.99", "B:0.01"], "share of 20 tokens is none"),
    ],
)
def test_shares_that_cannot_be_are_refused_in_a_line(sources: list[str], why: str) -> None:
    with pytest.raises(BadInput, match=why) as caught:
        mixed(sources, 20, load)
    assert "\n" not in str(caught.value)


def test_a_share_is_told_from_a_path_with_colons(tmp_path: Path) -> None:
    there = tmp_path / "traces:0.8"
    there.touch()
    assert with_share(str(there)) == (str(there), None)
    assert with_share(f"{there}:0.2") == (str(there), 0.2)
    assert with_share(f"text:{there}") == (f"text:{there}", None)
    assert with_share("text:FILE:0.25") == ("text:FILE", 0.25)
    for name in ("traces", "traces:2", "traces:0", "traces:1.5", "C:", "traces:08", "a:b"):
        assert with_share(name) == (name, None)


def test_a_recipe_lists_them(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ncalibration:\n  source: [traces:0.8, 'text:a.txt:0.2']\n")
    recipe = load_recipe(file)
    assert recipe.calibration.sources == [f"{tmp_path}/traces:0.8", f"text:{tmp_path}/a.txt:0.2"]
    file.write_text(dump(absolute(recipe)))
    assert load_recipe(file).calibration == recipe.calibration
    for wrong in ("[]", "[1]", "{a: 1}", "['']"):
        file.write_text(f"model: m\ncalibration:\n  source: {wrong}\n")
        with pytest.raises(BadInput, match=r"calibration\.source"):
            load_recipe(file)
    assert CalibrationSettings(source=["x"]).sources == ["x"] and Recipe(model=Path("m")).calibration.sources == []


def test_a_source_has_a_weight_for_all_of_its_tokens() -> None:
    made = mixed(["A", CalibrationSource(source="B", share=0.2, weight=0.5)], 1000, load)
    assert [part.tokens for part in made.parts] == [800, 200]  # the budget counts tokens, whatever their weight
    for sequence in made.sequences:
        if sequence.source:
            assert sequence.weights is not None and (sequence.weights == np.float32(0.5)).all()
        else:
            assert sequence.weights is None
    assert made.weighting == "weighted traces × 1, text × 0.5" and made.weighting in made.describe()
    plain = mixed(["A", CalibrationSource(source="B", share=0.2)], 1000, load)
    assert made.sha256 != plain.sha256 == mixed(["A:0.8", "B:0.2"], 1000, load).sha256


def test_a_weight_multiplies_what_a_token_has() -> None:
    def weighed(source: str, tokens: int | None) -> Calibration:
        return Calibration(source, "traces", "all", [TokenSequence(np.arange(2), 1, np.array([1, 3], np.float32))])

    (one,) = mixed([CalibrationSource(source="A", weight=2)], None, weighed).sequences
    assert one.weights is not None and one.weights.tolist() == [2, 6]


def test_a_recipe_lists_sources_with_weights_and_its_own_traces(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    listed = "[{share: 0.8}, {source: 'text:a.txt', share: 0.2, weight: 2}]"
    file.write_text(f"model: m\ncalibration:\n  source: {listed}\n")
    recipe = load_recipe(file)
    own, text = recipe.calibration.sources
    assert own == CalibrationSource(share=0.8) and recipe.calibration.takes_own_traces
    assert text == CalibrationSource(source=f"text:{tmp_path}/a.txt", share=0.2, weight=2)
    file.write_text(dump(absolute(recipe)))
    assert load_recipe(file).calibration == recipe.calibration
    assert not CalibrationSettings(source=["x", "y"]).takes_own_traces and CalibrationSettings().takes_own_traces
    for wrong, why in (("[{weight: 0}]", "weight"), ("[{part: all}]", "part"), ("[{source: ''}]", "source")):
        file.write_text(f"model: m\ncalibration:\n  source: {wrong}\n")
        with pytest.raises(BadInput, match=rf"calibration\.source: {why}"):
            load_recipe(file)


def test_shares_of_prompts_are_told_from_paths_as_those_of_calibration_are(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    (tmp_path / "P:0.8").touch()
    listed = "['P:0.8', 'P:0.2']"
    file.write_text(f"model: m\ntrace: {{prompts: {listed}}}\ncalibration: {{source: {listed}}}\n")
    recipe = load_recipe(file)
    assert recipe.trace is not None
    assert [(each.file, each.share) for each in recipe.trace.sources] == [
        (tmp_path / "P:0.8", None),
        (tmp_path / "P", 0.2),
    ]
    told = [with_share(each) for each in recipe.calibration.sources if isinstance(each, str)]
    assert told == [(f"{tmp_path}/P:0.8", None), (f"{tmp_path}/P", 0.2)]
