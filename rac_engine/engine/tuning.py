"""Tuning a pruned block as a whole, and what that changes in its layer."""

from __future__ import annotations

import itertools

from rac_engine.calibrate import Stream, tune
from rac_engine.engine.layer import Layer
from rac_engine.models import Block, Matrix
from rac_kernels import count_zeros


def tune_block(layer: Layer, stream: Stream, block: Block, groups: list[list[Matrix]]) -> None:
    """Tune the pruned matrices of a block, `groups`, to the hidden states that the dense model has behind it.

    The dense model's tokens have gone through the block by now, the pruned one's have not.
    """
    context = layer.context
    matrices = {m.module: m for m in itertools.chain.from_iterable(groups) if m.tensor in layer.pruned}
    if context.dense is None or not matrices:
        return
    context.make_room(groups[-1][0])
    context.tell(layer.number, f"tuning {block.plan.module}")
    with context.clock("tune"):
        weights = {name: layer.pruned[matrix.tensor] for name, matrix in matrices.items()}
        grids = {name: layer.grids[matrix.name] for name, matrix in matrices.items() if matrix.name in layer.grids}
        tuned = tune(stream, context.dense, block, weights, context.settings.epochs, grids)
    rows = [row for row in layer.rows if row["module"] in matrices]
    if tuned is None:
        for row in rows:
            row["notes"] = [*row["notes"], "not tuned: hidden states are not finite, or too large to square"]
        return
    for name, weight in tuned.weights.items():
        layer.replace(matrices[name], weight)
    layer.install(groups)
    for row in rows:
        weight = layer.pruned[row["name"]]
        zeros = count_zeros(weight)
        if "values" in row:
            row["lost"] += zeros - row["zeros"]
        row["zeros"] = zeros
        row["sparsity"] = row["zeros"] / weight.numel()
        row["tuned"] = {"before": tuned.before, "after": tuned.after, "epochs": tuned.epochs}
