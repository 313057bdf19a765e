"""Which sequences of a calibration are held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rac_engine.traces.calibration import Calibration, TokenSequence
from rac_engine.traces.held_out import hold_out


def calibration(prompts: int, samples: int = 1, length: int = 6, source: int = 0) -> Calibration:
    """Samples of prompts of two tokens, each with a completion of its own."""
    draw = np.random.default_rng(source)
    sequences = [
        TokenSequence(np.concatenate([[source, prompt], draw.integers(0, 99, length - 2)]), 2, source=source)
        for prompt in range(prompts)
        for _ in range(samples)
    ]
    return Calibration("made", "traces", "all", sequences)


def held(of: Calibration, share: float = 0.05) -> list[bytes]:
    return [sequence.token_ids.tobytes() for sequence in hold_out(of, share).calibration.held_out]


@pytest.mark.parametrize(
    ("sequences", "share", "count"), [(40, 0.05, 8), (400, 0.05, 20), (401, 0.1, 41), (60, 0.5, 30)]
)
def test_so_many_are_held_out(sequences: int, share: float, count: int) -> None:
    made = calibration(sequences)
    assert len(held(made, share)) == count
    assert hold_out(made, share).remark is None


def test_samples_of_a_prompt_stay_together() -> None:
    made = hold_out(calibration(30, samples=3), 0.05).calibration
    sides: dict[int, set[bool]] = {}
    for sequence in made.sequences:
        sides.setdefault(int(sequence.token_ids[1]), set()).add(sequence.held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert len(made.held_out) == 9  # the first three prompts with which there are 8


def test_no_order_changes_which() -> None:
    made = calibration(80, samples=2)
    back = replace(made, sequences=made.sequences[::-1])
    assert sorted(held(made)) == sorted(held(back))


def test_all_is_seen_where_there_is_too_little_or_nothing_was_asked_for() -> None:
    few = hold_out(calibration(39), 0.05)
    assert not few.calibration.held_out and few.remark is not None and "39" in few.remark
    one_prompt = hold_out(calibration(1, samples=50), 0.05)
    assert not one_prompt.calibration.held_out and one_prompt.remark is not None
    made = calibration(50)
    off = hold_out(made, 0)
    assert off.calibration is made and off.remark is None


def test_a_long_sequence_stays_where_the_rest_would_be_too_little() -> None:
    made = calibration(60)
    long = TokenSequence(np.arange(1000), 500)
    for sequences in ([*made.sequences, long], [long, *made.sequences]):
        kept = hold_out(replace(made, sequences=sequences), 0.5).calibration
        assert sum(len(s.token_ids) for s in kept.held_out) <= 0.5 * (1000 + 360)


def test_text_goes_by_all_of_its_tokens() -> None:
    pieces = [TokenSequence(np.array([0, piece]), 0) for piece in range(100)]
    assert len(held(Calibration("text", "pieces of text", "all", pieces))) == 8


def test_every_source_has_its_share_and_a_prompt_of_two_sources_is_on_one_side() -> None:
    first, second = calibration(50), calibration(20, source=1)
    shared = [replace(sequence, source=1) for sequence in first.sequences]
    both = hold_out(replace(first, sequences=[*first.sequences, *second.sequences]), 0.05).calibration
    assert [sum(s.source == source for s in both.held_out) for source in (0, 1)] == [8, 4]
    twice = hold_out(replace(first, sequences=[*first.sequences, *shared]), 0.05).calibration
    sides = {s.token_ids.tobytes(): s.held_out for s in twice.sequences[:50]}
    assert all(sides[s.token_ids.tobytes()] == s.held_out for s in twice.sequences[50:])


def test_the_digest_knows_what_is_held_out() -> None:
    made = calibration(60)
    held_out = hold_out(made, 0.05).calibration
    assert (
        made.sha256
        == hold_out(made, 0).calibration.sha256
        != held_out.sha256
        == hold_out(made, 0.05).calibration.sha256
    )
    assert held_out.tokens == made.tokens
