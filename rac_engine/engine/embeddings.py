"""The table of embeddings, pruned if that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from rac_engine.engine.context import Context
from rac_engine.engine.metrics import TIED
from rac_engine.models import EMBEDDINGS, Matrix
from rac_engine.solve import MatrixResult, left_dense, prune_table


def pruned_embeddings(context: Context) -> Iterator[tuple[Matrix, Tensor, MatrixResult]]:
    """The table [size, hidden] as it was, and its result; nothing unless `also` names it.

    It is so quick to make that it is made whenever it is needed, and not held meanwhile.
    """
    model = context.model
    for matrix in model.matrices(EMBEDDINGS) if EMBEDDINGS in context.parts else []:
        table = model.embedding()
        if not context.wants(matrix):
            yield matrix, table, left_dense(table, context.skipped[matrix.name])
            continue
        tied = [TIED] if model.config.tie_word_embeddings else []
        result = prune_table(table, context.target(matrix))
        yield matrix, table, replace(result, notes=[*result.notes, *tied])
