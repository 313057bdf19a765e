"""The benchmarks of how many tokens a calibration needs, and of what: sequences as they are cut, fits and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rac_engine.traces.calibration import TokenSequence

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """benchmarks/tokens.py and shares.py, as scripts of their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import shares
        import tokens

        yield tokens, shares
    finally:
        sys.path.remove(str(BENCHMARKS))


def sequence(*ids: int, prompt: int = 1) -> TokenSequence:
    return TokenSequence(np.array(ids), prompt)


def test_a_budget_is_met_to_the_token(scripts: tuple[ModuleType, ModuleType]) -> None:
    tokens, _ = scripts
    ten = [sequence(*range(10)), sequence(*range(10, 20))]
    assert [len(one.token_ids) for one in tokens.first(ten, 13)] == [10, 3]
    half = tokens.first([tokens.thinned(one, 2) for one in ten], 7)
    assert [one.counted for one in half] == [5, 2] and half[0].weights.tolist() == [0, 1] * 5
    assert sum(one.counted for one in tokens.first(ten, 50)) == 20


def test_samples_of_a_prompt_stand_together(scripts: tuple[ModuleType, ModuleType]) -> None:
    tokens, _ = scripts
    found = tokens.pairs([sequence(1, 5), sequence(2, 6), sequence(3, 7)], [sequence(3, 8), sequence(1, 9)])
    assert [one.token_ids.tolist() for one in found] == [[1, 5], [1, 9], [3, 7], [3, 8]]


def cell(tokens: int, ratio: float, way: str | None = None) -> dict[str, Any]:
    matrices = [
        {"columns": n, "relative_error": 0.01, "held_out_error": 0.01 * (1 + 0.4 * ratio * n / tokens)}
        for n in (576, 1536)
    ]
    found = {"method": "admm", "sparsity": 0.6, "tokens": tokens, "run": tokens, "prompts": 3, "way": way}
    return {**found, "matrices": matrices, "hidden": {"relative_error": 0.1, "held_out_error": 0.25}}


def test_the_fit_finds_the_constant_of_the_law(scripts: tuple[ModuleType, ModuleType]) -> None:
    tokens, _ = scripts
    cells = [cell(2000, 17), cell(8000, 17), cell(8000, 3, "the longest")]
    assert tokens.fitted(cells, "admm") == pytest.approx(17, rel=1e-3)
    shown = tokens.table({"cells": cells})
    assert "| admm, 0.6 | 2,000 | 3 | 576 | 0.0100 | 0.0296 | 2.96 |" in shown and "admm c = 17.0" in shown
    assert "| 8,000, the longest | 8,000 | 3 | 0.0109 | 0.0123 | 0.25000 |" in shown


def test_shares_of_text_are_shown_beside_text_alone(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, shares = scripts

    def quality(text: float) -> dict[str, dict[str, float]]:
        each = {"kl": 0.5, "kl_error": 0.01, "perplexity": 3.0}
        return {"held-out": each, "seen": each, "text": {**each, "perplexity": text}}

    cells = [{"sparsity": "0.6", "share": share, "quality": quality(p)} for share, p in ((1, 30.0), (0.2, 36.0))]
    shown = shares.table({"dense": quality(20.0), "cells": cells}).splitlines()
    assert shown[-2].startswith("| 0.6 | 20% |") and shown[-2].endswith("| 3.00, 3.00, 36.00 | 1.20 |")
    assert shown[-1].endswith("| 3.00, 3.00, 30.00 | 1.00 |")
