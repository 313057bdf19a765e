"""An order of an MLP's inner neurons in which a pattern N:M costs least; the model is the same in any order."""

from __future__ import annotations

from torch import nn

from rac_engine.calibrate import Statistic, Stream
from rac_engine.engine.layer import Layer
from rac_engine.models import Block, Matrix
from rac_kernels import all_finite, pattern_order


def reorder_neurons(layer: Layer, stream: Stream, block: Block, number: int) -> None:
    """Give an MLP's inner neurons an order in which the pattern of its last matrix costs least.

    Rows of the matrices before it and columns of the last one move together. So all of them have to be pruned: a matrix
    that stays dense is to be found as it was. `number` is the block's within the layer.
    """
    context = layer.context
    own = [matrix for matrix in context.model.matrices(layer.number) if matrix.group.block == number]
    last = next((matrix for matrix in own if matrix.module == block.last), None)
    pattern = None if last is None else context.target(last).pattern
    if last is None or pattern is None or not _can_move(layer, block, own, last):
        return
    with context.clock("calibrate"):
        statistic = Statistic(last.columns, False, context.device)
        stream.observe(block, {last.module: statistic}, keep=False)
    if not (all_finite(statistic.value) and statistic.value.any()):
        return  # such an input says nothing
    with context.clock("solve"):
        order = pattern_order(layer.tensors[last.tensor].to(context.device), statistic.value, pattern).cpu()
    # The dense block beside stays as it is: what is asked of it does not depend on the order but for the last bits,
    # and those have to be the same when an unfinished job goes through this layer again.
    for matrix in own:
        dense = layer.tensors[matrix.tensor]
        layer.tensors[matrix.tensor] = moved = dense[:, order] if matrix is last else dense[order]
        weight = moved.to(context.device, context.dtype)
        block.linears[matrix.module].weight = nn.Parameter(weight, requires_grad=False)
        layer.reordered.add(matrix.module)


def _can_move(layer: Layer, block: Block, own: list[Matrix], last: Matrix) -> bool:
    """Whether a block is an MLP without inner biases, all of whose matrices are pruned."""
    if block.plan.mixes or not all(map(layer.context.wants, own)):
        return False
    before = [matrix for matrix in own if matrix is not last]
    biases = [getattr(block.linears[matrix.module], "bias", None) for matrix in before]
    return all(matrix.rows == last.columns for matrix in before) and all(bias is None for bias in biases)
