"""Copies of a calibration's sequences in which some tokens are others."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rac_engine.traces.calibration import Calibration, TokenSequence
from rac_engine.traces.held_out import hold_out
from rac_engine.traces.replaced import LONGEST, ordinary_tokens, with_replaced

ORDINARY = np.arange(1000, 3000)


def calibration(lengths: list[int], weighted: bool = False) -> Calibration:
    """Sequences of tokens below 1000, which no copy gets as others; the prompt's weigh nothing if `weighted`."""
    sequences = [
        TokenSequence(np.arange(length) + number, 5, np.repeat([0, 1], [5, length - 5]) if weighted else None)
        for number, length in enumerate(lengths)
    ]
    return Calibration("made", "traces", "completion" if weighted else "all", sequences)


@pytest.mark.parametrize(("share", "wanted"), [(0.3, 900), (1.0, 3000), (0.001, 3)])
def test_there_are_so_many_tokens_of_them_and_three_of_ten_are_others(share: float, wanted: int) -> None:
    given = calibration([40] * 75)
    made = with_replaced(given, share, ORDINARY)
    assert made.sequences[:75] == given.sequences
    copies = made.sequences[75:]
    assert sum(len(copy.token_ids) for copy in copies) == wanted
    assert all(copy.token_ids[0] < 1000 for copy in copies)
    others = np.concatenate([copy.token_ids for copy in copies]) >= 1000
    assert others.mean() == pytest.approx(0.3, abs=0.03 if wanted > 100 else 1)
    for copy in copies:
        kept = copy.token_ids < 1000
        number = int(copy.token_ids[0])
        np.testing.assert_array_equal(copy.token_ids[kept], given.sequences[number].token_ids[: len(kept)][kept])


def test_they_are_a_source_of_their_own_and_the_same_each_time() -> None:
    given = calibration([40] * 75)
    made, again = (with_replaced(given, 0.5, ORDINARY) for _ in range(2))
    assert made.sha256 == again.sha256 != given.sha256
    assert [part.label for part in made.parts] == ["traces", "replaced"]
    assert made.parts[0] is given and made.tokens == sum(part.tokens for part in made.parts) == 4500
    assert {sequence.source for sequence in made.sequences[75:]} == {1}
    assert "67% traces, 33% replaced" in made.describe()
    mixture = replace(given, parts=(given, given))
    assert {sequence.source for sequence in with_replaced(mixture, 0.5, ORDINARY).sequences[75:]} == {2}


def test_what_is_held_out_is_not_copied_and_nothing_is_without_a_share() -> None:
    held = hold_out(calibration([40] * 75), 0.05).calibration
    made = with_replaced(held, 1, ORDINARY)
    assert made.held_out == held.held_out
    firsts = {int(sequence.token_ids[0]) for sequence in held.held_out}
    assert not firsts & {int(sequence.token_ids[0]) for sequence in made.sequences[75:]}
    assert made.tokens == held.tokens + 40 * (75 - len(firsts))
    assert with_replaced(held, 0, ORDINARY) is held


def test_a_copy_is_of_the_beginning_and_its_tokens_weigh_as_they_did() -> None:
    made = with_replaced(calibration([900, 900], weighted=True), 1, ORDINARY)
    copies = made.sequences[2:]
    assert [len(copy.token_ids) for copy in copies] == [LONGEST] * 3
    for copy in copies:
        assert copy.weights is not None and copy.prompt_length == 5
        np.testing.assert_array_equal(copy.weights, np.repeat([0, 1], [5, LONGEST - 5]))


def test_frequent_tokens_are_drawn_more_often() -> None:
    made = with_replaced(calibration([500] * 40), 1, np.arange(1000, 51000))
    drawn = np.concatenate([copy.token_ids for copy in made.sequences[40:]])
    drawn = drawn[drawn >= 1000] - 1000
    assert 0.4 < (drawn < 4500).mean() < 0.6  # log(1 + 4500 / 500) / log(1 + 50000 / 500) is a half
    assert drawn.max() > 40_000


def test_no_special_token_is_drawn() -> None:
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 6

    assert ordinary_tokens(Tokenizer(added_tokens_decoder={0: "", 5: ""}, all_special_ids=[1])).tolist() == [2, 3, 4]
    assert ordinary_tokens(Tokenizer(added_tokens_decoder=dict.fromkeys(range(6)), all_special_ids=[])).size == 6
