"""Sequences of a calibration that no solver learns from: what is made of the others is judged by them.

Chosen by a hash of the prompt, so that all samples of a prompt are on one side, and no order of files changes which.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rac_engine.traces.calibration import Calibration, TokenSequence

LEAST = 8  # sequences that are held out at least

FEWEST = 40  # sequences, with fewer than which all are needed

MOST = 0.2  # share of the sequences, and of their tokens, that may be held out unless more was asked for


@dataclass(frozen=True)
class HoldingOut:
    """A calibration of which some sequences are held out, and a remark where none could be."""

    calibration: Calibration
    remark: str | None = None


def hold_out(calibration: Calibration, share: float) -> HoldingOut:
    """Mark a `share` of the calibration's sequences as held out, 8 at least; 0: none.

    Of each source the same share. Not more than a fifth of a source's sequences and tokens, or `share` where that is
    more. A calibration of fewer than 40 sequences is left whole, as is one in which no prompt has so few of them that
    it could go.
    """
    sequences = calibration.sequences
    if not share:
        return HoldingOut(calibration)
    if len(sequences) < FEWEST:
        few = f"no calibration sequence is held out: there are {len(sequences)}, and {FEWEST} are needed"
        return HoldingOut(calibration, few)
    keys = [_key(sequence) for sequence in sequences]
    chosen = set[bytes]()
    for source in sorted({sequence.source for sequence in sequences}):
        own = [at for at, sequence in enumerate(sequences) if sequence.source == source]
        chosen |= _chosen([keys[at] for at in own], [sequences[at] for at in own], share, chosen)
    if not chosen:
        return HoldingOut(
            calibration, f"no calibration sequence is held out: each prompt has more than {MOST:.0%} of them"
        )
    marked = [
        replace(sequence, held_out=True) if key in chosen else sequence
        for sequence, key in zip(sequences, keys, strict=True)
    ]
    return HoldingOut(replace(calibration, sequences=marked))


def _chosen(keys: Sequence[bytes], sequences: Sequence[TokenSequence], share: float, chosen: set[bytes]) -> set[bytes]:
    """Keys to hold out of a source beside those that are `chosen` already, the smallest hashes first."""
    limit = max(MOST, share)
    wanted = max(math.ceil(share * len(sequences)), min(LEAST, int(MOST * len(sequences))))
    rooms = [limit * len(sequences), limit * sum(len(sequence.token_ids) for sequence in sequences)]
    groups: dict[bytes, list[int]] = {}
    for key, sequence in zip(keys, sequences, strict=True):
        group = groups.setdefault(key, [0, 0])
        group[0] += 1
        group[1] += len(sequence.token_ids)
    taken = [sum(group[place] for key, group in groups.items() if key in chosen) for place in (0, 1)]
    found = set[bytes]()
    for key in sorted(groups.keys() - chosen):
        if taken[0] >= wanted:
            break
        after = [count + more for count, more in zip(taken, groups[key], strict=True)]
        if all(count <= room for count, room in zip(after, rooms, strict=True)):
            taken = after
            found.add(key)
    return found


def _key(sequence: TokenSequence) -> bytes:
    """A hash of the prompt's tokens; of all tokens where there is no prompt, as in text."""
    ids = sequence.token_ids
    prompt = ids[: sequence.prompt_length] if sequence.prompt_length else ids
    return hashlib.sha256(prompt.astype("<i8", copy=False).tobytes()).digest()
