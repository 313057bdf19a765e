"""The order in which a layer's matrices are pruned: in stages, as the data goes through them, or all at once."""

from __future__ import annotations

import itertools

from rac_engine.base.process import trim_memory
from rac_engine.calibrate import Activations, Stream
from rac_engine.engine.blocks import begin_comparing, compare, end_comparing
from rac_engine.engine.context import Left
from rac_engine.engine.experts import prune_experts
from rac_engine.engine.layer import Layer, batches
from rac_engine.engine.reorder import reorder_neurons
from rac_engine.engine.solving import solve_group
from rac_engine.engine.tuning import tune_block
from rac_engine.models import Matrix
from rac_engine.solve import left_dense

_LARGE = 8 << 20  # bytes of a statistic that make solving the time of most memory


def prune_layer(layer: Layer) -> None:
    """Prune all matrices of a layer that are to be pruned, and move the tokens on to the next layer."""
    context = layer.context
    every = context.model.matrices(layer.number)
    for matrix in every:
        if not context.wants(matrix):
            dense = matrix.of(layer.tensors[matrix.tensor])
            layer.note(matrix, left_dense(dense, context.skipped[matrix.name]), 0.0)
    if context.stream is None:
        for group in layer.groups:
            solve_group(layer, group, None)
    elif layer.number <= context.last:
        layer.build()
        if context.settings.order == "layer":
            _prune_at_once(layer, context.stream)
        else:
            for number in range(len(layer.blocks)):
                _prune_block(layer, context.stream, number)
            if layer.number == context.last:
                compare(layer, context.stream)
    order = {matrix.name: number for number, matrix in enumerate(every)}
    layer.rows.sort(key=lambda row: order[row["name"]])


def _prune_at_once(layer: Layer, stream: Stream) -> None:
    """Prune a layer whose matrices are all calibrated on the dense layer's activations, as published methods do."""
    context = layer.context
    for some in batches(layer.groups, context.hessians):
        context.make_room(some[0][0])
        with context.clock("calibrate"):
            statistics = {group[0].group.input: layer.statistic(group) for group in some}
            stream.observe_layer(layer.blocks, statistics)
        for group in some:
            solve_group(layer, group, statistics.pop(group[0].group.input), install=False)
    layer.install(layer.groups)
    if layer.number < context.last:
        with context.clock("forward"):
            for block in layer.blocks:
                stream.advance(block)


def _prune_block(layer: Layer, stream: Stream, number: int) -> None:
    """Prune a block in stages: every matrix is calibrated on what the pruned matrices before it give.

    The tokens leave the block if anything behind it is to be pruned, or they are compared with the dense model's there.
    """
    context, block = layer.context, layer.blocks[number]
    here = [group for group in layer.groups if group[0].group.block == number]
    further = layer.number < context.last or any(group[0].group.block > number for group in layer.groups)
    within = layer.number < context.model.layers  # not lm_head, behind which there is nothing to compare
    further = further or (within and context.dense is not None)
    tuned = bool(context.settings.epochs and here and within and block.plan.experts is None)
    if context.settings.reorders:
        reorder_neurons(layer, stream, block, number)
    kept = None
    for _, stage in itertools.groupby(here, key=lambda group: group[0].stage):
        groups = list(stage)
        if groups[-1][0].group.expert is None:
            kept = _prune_stage(layer, stream, number, groups, keep=further and not tuned, further=further or tuned)
        else:
            prune_experts(layer, stream, block, groups, layer.beside.get(number))
    if number in layer.beside:
        compare(layer, stream)  # where nothing was observed
    if number in layer.beside and (further or tuned):
        with context.clock("forward"):
            layer.beside[number].stream.advance(layer.beside[number].block)
    if tuned:
        tune_block(layer, stream, block, here)
    if further:
        _leave(layer, stream, number, kept)


def _prune_stage(
    layer: Layer, stream: Stream, number: int, groups: list[list[Matrix]], *, keep: bool, further: bool
) -> Activations | None:
    """Prune the groups of a stage, as many in a pass over the tokens as their Hessians may be; see `Stream.observe`.

    With the input of the block's last matrix, number `number`, the dense block beside has given all that is asked of it
    and goes; the dense model's tokens leave it unless they go no `further`. With `keep`, returns the activations that
    the pruned model's tokens gave there.
    """
    context, block, kept = layer.context, layer.blocks[number], None
    residual = context.settings.reconstructs == "residual"
    context.make_room(groups[0][0])
    for some in batches(groups, context.hessians):
        with context.clock("calibrate"):
            statistics = {group[0].group.input: layer.statistic(group, layer.beside.get(number)) for group in some}
            if number not in layer.beside:
                kept = stream.observe(block, statistics, keep)
            else:
                drift = begin_comparing(layer)
                kept = stream.observe_matched(block, statistics, layer.beside[number], residual, keep, further, drift)
                end_comparing(layer, drift)
                if block.last in statistics:
                    del layer.beside[number]
        if any(statistic.value.nbytes > _LARGE for statistic in statistics.values()):
            trim_memory()  # of what the pass has left in the heap; solving takes other sizes
        for group in some:
            solve_group(layer, group, statistics.pop(group[0].group.input))
    return kept


def _leave(layer: Layer, stream: Stream, number: int, kept: Activations | None) -> None:
    """Let the tokens go through a pruned block, at once or on the next pass over them.

    The next block's first pass takes them through this one, if there is room for what that holds on to: with a mixture
    on either side, or nothing `kept` of an attention, there is not.
    """
    context, block = layer.context, layer.blocks[number]
    if number + 1 == len(layer.blocks):
        room = context.memory.choice.overlap and block.plan.experts is None
    else:
        room = layer.blocks[number + 1].plan.experts is None
    if room and (kept is not None or not block.plan.mixes):
        stream.advance_later(block, kept)
    else:
        with context.clock("forward"):
            stream.advance(block, kept)
    if context.dense is not None:
        context.left = Left(layer.number, number, block.plan.module)
