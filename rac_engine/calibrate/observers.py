"""Observers that feed statistics with the inputs of a block's matrices."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from torch import Tensor

from rac_engine.calibrate.statistics import DenseOutputs, Statistic
from rac_engine.models import Block, Chunk, Observer


def counting(statistics: Mapping[str, Statistic], weights: Tensor | None) -> dict[str, Observer]:
    """Observers that add the inputs they see to `statistics`, tokens with `weights` [tokens of the chunk] (None: 1)."""

    def add(statistic: Statistic, x: Tensor, tokens: Tensor | None) -> None:
        statistic.add(x, weights if weights is None or tokens is None else weights[tokens])

    return {name: functools.partial(add, statistic) for name, statistic in statistics.items()}


def recording(place: dict[str, Tensor], names: Iterable[str]) -> dict[str, Observer]:
    """Observers that put the inputs they see, which all tokens of a chunk have, into `place`."""

    def record(name: str, x: Tensor, _: Tensor | None) -> None:
        place[name] = x

    return {name: functools.partial(record, name) for name in names}


def matching(
    statistics: Mapping[str, Statistic], weights: Tensor | None, dense: Block, theirs: Tensor, chunk: Chunk
) -> dict[str, Observer]:
    """Observers like `counting`'s of a mixture that also match each input with that in the `dense` model's block.

    `theirs` [tokens, hidden] is the dense block's normalised input. Inputs that all tokens have are computed there at
    once, those of an expert for the tokens that come to the expert when these are seen.
    """
    of_all = dict[str, Tensor]()
    dense.observe(theirs, chunk, recording(of_all, [name for name in statistics if not dense.is_routed(name)]))

    def add(name: str, given: Tensor, tokens: Tensor | None) -> None:
        if tokens is None:
            statistics[name].add_matched(given, [of_all.pop(name)], weights)
        else:
            own = None if weights is None else weights[tokens]
            statistics[name].add_matched(given, expert_match(statistics[name], dense, name, theirs[tokens]), own)

    return {name: functools.partial(add, name) for name in statistics}


def expert_match(statistic: Statistic, dense: Block, name: str, x: Tensor) -> list[Tensor]:
    """The tensors to match an expert's input with, if tokens x [tokens, hidden] come to that expert of the dense block.

    Its own input there, or for `DenseOutputs` what is wanted of its matrix and what the dense matrix gives, the same.
    """
    inner = dense.expert_input(name, x)
    return [dense.expert_output(name, inner)] * 2 if isinstance(statistic.match, DenseOutputs) else [inner]
