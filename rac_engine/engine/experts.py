"""Matrices of a mixture of experts: each expert is pruned by the tokens that the router sends to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rac_engine.calibrate import DenseReference, Statistic, Stream
from rac_engine.engine.blocks import begin_comparing, end_comparing
from rac_engine.engine.layer import Layer, batches
from rac_engine.engine.solving import ExpertTokens, solve_group
from rac_engine.models import Block, Matrix
from rac_engine.solve import Reason, ReasonCode


@dataclass(frozen=True)
class _Mixture:
    """A stage of a mixture, with what all of its experts share."""

    layer: Layer
    stream: Stream
    block: Block
    beside: DenseReference | None
    least: int
    """Tokens with which an expert is pruned by its own H alone."""
    common: Statistic | None
    """Statistic of the block's input over all tokens, where every expert of the stage has that as its input."""


def prune_experts(
    layer: Layer, stream: Stream, block: Block, groups: list[list[Matrix]], beside: DenseReference | None
) -> None:
    """Prune a stage of a mixture: each expert by H of the tokens that were routed to it.

    An expert with n tokens, fewer than m = min_tokens · columns, is not pruned by those alone. With `blend`, its H
    becomes H + (m − n)/N · H_all: H_all is that of the inputs which all N tokens of the layer give, as if they had all
    come to this expert. For the first matrices that is the block's own input, the same for every expert; for the last
    one it is estimated from min(N, m) evenly spaced tokens, which are sent through the expert.
    """
    context, rule = layer.context, layer.context.settings.experts
    context.make_room(groups[0][0])
    everyone = next((group for group in groups if group[0].group.expert is None), None)
    experts = [group for group in groups if group[0].group.expert is not None]
    entrance = experts[0][0].stage == block.groups[0].stage
    common = None
    if everyone is not None:
        common, name = layer.statistic(everyone, beside), everyone[0].group.input
    elif entrance and rule.otherwise == "blend":
        common, name = layer.statistic(experts[0], beside), block.first
    together = None if context.hessians is None else max(context.hessians - (common is not None), 1)
    least = math.ceil(rule.min_tokens * experts[0][0].columns)
    mixture = _Mixture(layer, stream, block, beside, least, common if entrance else None)
    for number, some in enumerate(batches(experts, together)):
        extra = {} if number or common is None else {name: common}
        with context.clock("calibrate"):
            statistics, seen = _gather(mixture, some, extra)
        for group, tokens in zip(some, seen, strict=True):
            scarce = None
            if tokens < least:
                text = f"{tokens} tokens, fewer than {least} ({rule.min_tokens:g} for each of its inputs)"
                scarce = Reason(ReasonCode.FEW_TOKENS, text)
            solve_group(layer, group, statistics.pop(group[0].group.input), ExpertTokens(tokens, scarce))
    if everyone is not None:
        solve_group(layer, everyone, common)


def _gather(
    mixture: _Mixture, experts: list[list[Matrix]], extra: Mapping[str, Statistic]
) -> tuple[dict[str, Statistic], list[int]]:
    """Statistics of experts' inputs, by input, gathered in one pass together with `extra`; and each one's tokens.

    Those with fewer than `least` tokens are blended with all tokens, if the settings say so.
    """
    stream, block, beside = mixture.stream, mixture.block, mixture.beside
    statistics = {group[0].group.input: mixture.layer.statistic(group, beside) for group in experts}
    if beside is None:
        stream.observe(block, {**statistics, **extra})
    else:
        drift = begin_comparing(mixture.layer)
        stream.observe_experts(block, {**statistics, **extra}, beside, drift)
        end_comparing(mixture.layer, drift)
    seen = [statistic.tokens for statistic in statistics.values()]
    if mixture.layer.context.settings.experts.otherwise == "blend":
        _blend(mixture, statistics)
    return statistics, seen


def _blend(mixture: _Mixture, statistics: Mapping[str, Statistic]) -> None:
    """Add inputs of all tokens to the statistics of those experts that saw fewer than `least` tokens."""
    total = mixture.stream.packing.weight or 1.0
    sampled: dict[str, tuple[Statistic, float]] = {}
    for name, statistic in statistics.items():
        lacking = mixture.least - statistic.tokens
        if lacking <= 0:
            continue
        if mixture.common is None:
            sampled[name] = (statistic, float(lacking))
        else:
            statistic.blend(mixture.common, lacking / total)
    if sampled:
        mixture.stream.observe_sample(mixture.block, sampled, mixture.least, mixture.beside)
