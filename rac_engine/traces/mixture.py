"""A calibration of several sources, each with its share of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rac_engine.base.errors import BadInput
from rac_engine.recipe import CalibrationSource, with_share
from rac_engine.traces.calibration import Calibration, TokenSequence


def mixed(
    sources: Sequence[str | CalibrationSource], tokens: int | None, load: Callable[[str, int | None], Calibration]
) -> Calibration:
    """One calibration of several `sources`, each `PATH`, `text:FILE`, or one of these with `:SHARE` of the tokens.

    Sources without a share get equal parts of what the others leave. `load` reads a source up to a budget of tokens
    (None: all there are); it is called with the path, or with "" for a source without one, this job's own traces.
    Tokens of a source with a weight count so much more in H, and as before in the budget. Without a budget for all
    there are as many tokens as the shares permit; where no share is given either, all of every source. Raises
    `BadInput` for shares that do not sum to 1.
    """
    parted = [source_of(source) for source in sources]
    names = [source.source or "" for source in parted]
    told = any(source.share is not None for source in parted)
    shares = shares_of([source.share for source in parted], "calibration")
    if tokens is None:
        parts = [load(name, None) for name in names]
        if told:
            tokens = math.floor(min(part.tokens / share for part, share in zip(parts, shares, strict=True)))
    if tokens is not None:
        ends = [round(tokens * math.fsum(shares[: at + 1])) for at in range(len(shares))]
        budgets = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for name, budget in zip(names, budgets, strict=True):
            if not budget:
                raise BadInput(f"calibration {name}: its share of {tokens:,} tokens is none; give more tokens")
        parts = [load(name, budget) for name, budget in zip(names, budgets, strict=True)]
    remarks = [remark for part in parts for remark in part.remarks]
    if tokens is not None:
        remarks += [
            f"{part.source} holds {part.tokens:,} tokens, fewer than the {budget:,} of its share"
            for part, budget in zip(parts, budgets, strict=True)
            if part.tokens < budget
        ]
    weightings = dict.fromkeys(part.weighting for part in parts if part.weighting)
    if any(source.weight != 1 for source in parted):
        heavy = [f"{part.label} × {source.weight:g}" for part, source in zip(parts, parted, strict=True)]
        weightings |= {f"weighted {', '.join(heavy)}": None}
        parts = [weighted(part, source.weight) for part, source in zip(parts, parted, strict=True)]
    kinds = {part.kind for part in parts}
    return Calibration(
        source=" + ".join(part.source for part in parts),
        kind=kinds.pop() if len(kinds) == 1 else "sequences",
        part=parts[0].part,
        sequences=[replace(one, source=number) for number, part in enumerate(parts) for one in part.sequences],
        weighting=" and ".join(weightings),
        remarks=tuple(dict.fromkeys(remarks)),
        models=frozenset().union(*(part.models for part in parts)),
        parts=tuple(parts),
    )


def source_of(given: str | CalibrationSource) -> CalibrationSource:
    """A source as it is given, its share told from its path."""
    if isinstance(given, CalibrationSource):
        return given
    name, share = with_share(given)
    return CalibrationSource(source=name, share=share)


def weighted(part: Calibration, weight: float) -> Calibration:
    """The calibration of one source, each token counting `weight` times as much as before."""

    def heavier(one: TokenSequence) -> TokenSequence:
        own = np.ones(len(one.token_ids), np.float32) if one.weights is None else one.weights
        return replace(one, weights=own * np.float32(weight))

    return part if weight == 1 else replace(part, sequences=[heavier(one) for one in part.sequences])


def shares_of(told: Sequence[float | None], what: str) -> list[float]:
    """The share of each of some sources; those without one get equal parts of what the others leave.

    Raises `BadInput`, about `what`, where they do not sum to 1.
    """
    given = [share for share in told if share is not None]
    left, others = 1 - math.fsum(given), len(told) - len(given)
    if (abs(left) > 1e-6) if not others else (left <= 1e-6):
        listed = " and ".join(f"{share:g}" for share in given)
        wanted = "they should sum to 1" if not others else "they leave nothing to the sources without one"
        raise BadInput(f"{what}: the shares {listed} sum to {math.fsum(given):g}; {wanted}")
    return [left / others if share is None else share for share in told]
