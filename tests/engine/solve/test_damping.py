"""The damping is chosen by tokens that are held out, on a sample of the rows, by the method itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_engine.solve import damping
from rac_engine.solve.damping import FIRST, PATH, SAME, settle, tried_rows
from rac_engine.solve.matrices import MatrixResult, prune_matrices
from rac_engine.solve.method import Target
from rac_engine.solve.outputs import FEWEST_TOKENS, HeldOut, Outputs

COLUMNS = 48

WIDE = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.5, -0.5, COLUMNS)


def seen_and_held(tokens: int, noise: float = 0.3) -> tuple[list[Tensor], Tensor, Outputs, HeldOut]:
    """Two matrices, H and the outputs of so many tokens, and the same of others: outputs of inputs of their own."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, COLUMNS, generator=draw) for rows in (80, 24)]

    def gathered(count: int) -> tuple[Tensor, Outputs]:
        x = torch.randn(count, COLUMNS, generator=draw) @ WIDE
        pruned = x + noise * torch.randn(count, COLUMNS, generator=draw)
        return (pruned.T @ pruned).triu(), Outputs.of_inputs(pruned.T @ x, (x.T @ x).triu(), weights)

    H, outputs = gathered(tokens)
    other, wanted = gathered(2000)
    return weights, H, outputs, HeldOut(other, wanted, 2000)


def pruned(tokens: int, target: Target, method: str = "admm", counted: int = 2000) -> list[MatrixResult]:
    weights, H, outputs, held = seen_and_held(tokens)
    return prune_matrices(weights, H, method, target, outputs=outputs, held=replace(held, tokens=counted))


@given(st.integers(0, 7), st.lists(st.integers(1, 9), min_size=8, max_size=8), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_the_way_ends_at_the_least_error(least: int, steps: list[int], first: int) -> None:
    errors = [1.0 + sum(steps[min(at, least) : max(at, least)]) for at in range(8)]
    place, known = settle(errors.__getitem__, first, 8)
    assert place == least and known == {at: errors[at] for at in known} and first in known


def test_no_more_is_tried_than_has_to_be() -> None:
    def way(error: Callable[[int], float]) -> tuple[int, list[int]]:
        place, known = settle(error, FIRST, len(PATH))
        return place, sorted(known)

    assert way(lambda at: 1 + abs(at - 4.2)) == (4, [3, 4, 5])
    assert way(lambda at: 1 + abs(at - 5.0)) == (5, [4, 5, 6])
    assert way(lambda at: 9 - at) == (7, [4, 5, 6, 7])
    assert way(lambda at: 1 + at) == (0, [0, 1, 2, 3, 4, 5])
    assert way(lambda at: math.nan) == (7, [4, 5, 6, 7])  # every one is as good


def test_of_errors_that_are_the_same_the_larger_damping_is_taken() -> None:
    little, much = 1 + SAME / 2.5, 1 + 2 * SAME
    assert settle(lambda at: little**at, FIRST, len(PATH))[0] == FIRST + 2  # all that is no worse than the best
    assert settle(lambda at: little**-at, FIRST, len(PATH))[0] == len(PATH) - 1
    assert settle(lambda at: much**at, FIRST, len(PATH))[0] == 0


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, "2:4")])
def test_what_is_chosen_gives_what_it_gives_when_asked_for(target: Target) -> None:
    chosen = pruned(100, replace(target, chooses=True))
    assert chosen[0].dampings and chosen[0].dampings == chosen[1].dampings
    (best,) = {result.damping for result in chosen}
    assert best is not None and chosen[0].dampings[best] <= min(chosen[0].dampings.values()) * (1 + SAME)
    for one, other in zip(chosen, pruned(100, replace(target, damping=best)), strict=True):
        assert torch.equal(one.weight, other.weight) and other.dampings is None
        assert (one.objective, one.held_out_error, one.notes) == (other.objective, other.held_out_error, other.notes)


def test_it_is_the_best_of_the_path_for_tokens_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all rows tried, none of the path has a smaller error on the tokens held out."""
    monkeypatch.setattr(damping, "FEWEST_ROWS", 1000)

    def error(results: Sequence[MatrixResult]) -> float:
        return sum((r.held_out_error or 0.0) * (r.held_out_power or 0.0) for r in results)

    for tokens in (70, 4000):
        found = pruned(tokens, Target(0.6, chooses=True))
        every = {each: error(pruned(tokens, Target(0.6, damping=each))) for each in PATH}
        assert error(found) <= min(every.values()) * (1 + SAME + 1e-4)
        assert found[0].dampings is not None
        whole = sum(result.held_out_power or 0.0 for result in found)
        for each, share in found[0].dampings.items():  # of X′ Wᵀ there, of X Wᵀ here
            assert share == pytest.approx(every[each] / whole, rel=0.2)


def test_few_tokens_take_more_of_it() -> None:
    few, many = (pruned(tokens, Target(0.5, chooses=True))[0].damping for tokens in (60, 20_000))
    assert few is not None and many is not None and few > many


def test_it_is_not_chosen_where_it_cannot_be() -> None:
    for method, target in (("sparsegpt", Target(0.5, chooses=True)), ("admm", Target(0.5))):
        assert all((r.damping, r.dampings, r.notes) == (0.01, None, []) for r in pruned(300, target, method))
    few = pruned(300, Target(0.5, chooses=True), counted=FEWEST_TOKENS - 1)
    assert {(r.damping, r.dampings) for r in few} == {(0.01, None)}
    assert few[0].notes == ["damping 0.01: fewer than 256 tokens held out to choose it by"]


def test_a_sample_has_an_eighth_of_the_rows_within_limits() -> None:
    assert [tried_rows(rows) for rows in (0, 8, 64, 100, 800, 4096, 50_000)] == [0, 8, 64, 64, 100, 512, 512]
