"""Copies of a calibration's sequences in which some tokens are others: inputs that no trace shows.

Traces are narrow. A solver that is held to nothing but them changes what the model does with all else. What the dense
model makes of the copies it says itself, so that no other data is needed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from rac_engine.traces.calibration import REPLACED, Calibration, TokenSequence
from rac_engine.traces.sampling import uniforms

PROBABILITY = 0.3  # that a token of a copy is replaced

LONGEST = 600  # tokens of a copy, so that there are copies of many sequences

EVEN = 500  # of so many tokens at the vocabulary's beginning each is about as likely as any other


def with_replaced(calibration: Calibration, share: float, ordinary: np.ndarray) -> Calibration:
    """The calibration and, as a source of its own, copies of the beginnings of its sequences: `share` as many tokens.

    Sequences that are held out are not copied. Each token but a sequence's first is replaced with probability 0.3 by
    one of `ordinary` [n] int64, ids in the vocabulary's order. That is by falling frequency in most vocabularies, so a
    token at place i is drawn with a probability of about 1 / (500 + i). The same copies are made each time.
    """
    seen = [sequence for sequence in calibration.sequences if not sequence.held_out]
    wanted = math.ceil(share * sum(len(sequence.token_ids) for sequence in seen))
    if not wanted:
        return calibration
    order = np.argsort(uniforms([0] * len(seen), range(len(seen))), kind="stable")
    before = calibration.parts or (calibration,)
    copies = list[TokenSequence]()
    while wanted:
        sequence = seen[order[len(copies) % len(order)]]
        copy = _copy(sequence, min(len(sequence.token_ids), LONGEST, wanted), len(copies) + 1, ordinary)
        copies.append(replace(copy, source=len(before)))
        wanted -= len(copy.token_ids)
    made = Calibration("replaced tokens", REPLACED, calibration.part, copies, calibration.weighting)
    return replace(calibration, sequences=[*calibration.sequences, *copies], parts=(*before, made))


def ordinary_tokens(tokenizer: Any) -> np.ndarray:
    """Ids [n] int64 of the tokens that stand for text, in the vocabulary's order; all where there are no such."""
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    every = range(len(tokenizer))
    return np.array([token for token in every if token not in special] or every, np.int64)


def _copy(sequence: TokenSequence, length: int, number: int, ordinary: np.ndarray) -> TokenSequence:
    """The first `length` tokens of a sequence, some of them replaced; `number` decides which."""
    draws = uniforms([number] * (2 * length), range(2 * length)).astype(np.float64)
    goes, which = draws[:length] < PROBABILITY, draws[length:]
    goes[0] = False
    place = EVEN * np.expm1(which * np.log1p(len(ordinary) / EVEN))
    drawn = ordinary[np.minimum(place.astype(np.int64), len(ordinary) - 1)]
    return replace(
        sequence,
        token_ids=np.where(goes, drawn, sequence.token_ids[:length]),
        prompt_length=min(sequence.prompt_length, length),
        weights=None if sequence.weights is None else sequence.weights[:length],
    )
