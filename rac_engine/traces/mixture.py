"""A calibration of several sources, each with its share of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from rac_engine.base.errors import BadInput
from rac_engine.recipe import with_share
from rac_engine.traces.calibration import Calibration


def mixed(sources: Sequence[str], tokens: int | None, load: Callable[[str, int | None], Calibration]) -> Calibration:
    """One calibration of several `sources`, each `PATH`, `text:FILE`, or one of these with `:SHARE` of the tokens.

    Sources without a share get equal parts of what the others leave. `load` reads a source up to a budget of tokens
    (None: all there are). Without a budget for all there are as many tokens as the shares permit; where no share is
    given either, all of every source. Raises `BadInput` for shares that do not sum to 1.
    """
    parted = [with_share(source) for source in sources]
    told = any(share is not None for _, share in parted)
    shares = shares_of([share for _, share in parted], "calibration")
    if tokens is None:
        parts = [load(source, None) for source, _ in parted]
        if told:
            tokens = math.floor(min(part.tokens / share for part, share in zip(parts, shares, strict=True)))
    if tokens is not None:
        ends = [round(tokens * math.fsum(shares[: at + 1])) for at in range(len(shares))]
        budgets = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for source, budget in zip(sources, budgets, strict=True):
            if not budget:
                raise BadInput(f"calibration {source}: its share of {tokens:,} tokens is none; give more tokens")
        parts = [load(source, budget) for (source, _), budget in zip(parted, budgets, strict=True)]
    remarks = [remark for part in parts for remark in part.remarks]
    if tokens is not None:
        remarks += [
            f"{part.source} holds {part.tokens:,} tokens, fewer than the {budget:,} of its share"
            for part, budget in zip(parts, budgets, strict=True)
            if part.tokens < budget
        ]
    kinds = {part.kind for part in parts}
    return Calibration(
        source=" + ".join(part.source for part in parts),
        kind=kinds.pop() if len(kinds) == 1 else "sequences",
        part=parts[0].part,
        sequences=[replace(one, source=number) for number, part in enumerate(parts) for one in part.sequences],
        weighting=next((part.weighting for part in parts if part.weighting), ""),
        remarks=tuple(dict.fromkeys(remarks)),
        models=frozenset().union(*(part.models for part in parts)),
        parts=tuple(parts),
    )


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
