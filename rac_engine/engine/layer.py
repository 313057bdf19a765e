"""A decoder layer while it is pruned: its tensors, its blocks, and what came of each matrix."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rac_engine.calibrate import DenseInputs, DenseOutputs, DenseReference, Statistic
from rac_engine.engine.context import Context
from rac_engine.engine.rows import matrix_row
from rac_engine.models import Block, Matrix
from rac_engine.solve import MatrixResult, find_method
from rac_kernels import Grid


class Layer:
    """A decoder layer, or lm_head behind them, with the number `number`.

    `tensors` has all of its tensors by on-disk name; a pruned one takes the dense one's place, so that a layer is never
    in memory twice. `pruned` has those that are pruned, `rows` a line of metrics.jsonl for each matrix.
    """

    def __init__(self, context: Context, number: int, tensors: dict[str, Tensor]) -> None:
        self.context, self.number, self.tensors = context, number, tensors
        self.groups = context.groups(number)
        self.pruned: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.block_rows: list[dict[str, Any]] = []
        """Lines of metrics.jsonl of blocks that were compared with the dense model's meanwhile."""
        self.blocks: list[Block] = []
        """The residual blocks that the pruned model's tokens go through."""
        self.beside: dict[int, DenseReference] = {}
        """The same blocks of the dense model, by their numbers, until its tokens have gone through them."""
        self.grids: dict[str, Grid] = {}
        """The grids that pruned matrices are on, by the matrices' names, where kept weights are rounded."""
        self.reordered = set[str]()
        """Modules whose neurons are in another order than in the checkpoint: dense they must not be written."""

    def build(self) -> None:
        """Make the layer's blocks, and those of the dense model beside where its outputs are to be reconstructed."""
        context = self.context
        self.blocks = self._make_blocks()
        if context.dense is not None:
            # Held here alone, so that a block's dense weights go when nothing needs them any more.
            self.beside = {
                number: DenseReference(context.dense, block) for number, block in enumerate(self._make_blocks())
            }

    def _make_blocks(self) -> list[Block]:
        context = self.context
        return context.model.build_layer(self.number, self.tensors, context.dtype, context.device)

    def statistic(self, group: list[Matrix], beside: DenseReference | None = None) -> Statistic:
        """An empty statistic for a group's input: H [columns, columns] fp32 or its diagonal, as the method needs it.

        With `beside` it also gathers what the solver has to know of the dense model: for a block's last matrix the
        outputs; for a group of matrices, which share one input, the inputs; for an expert's last matrix the smaller of
        the two. Where sequences are held out, there is the same of their tokens.
        """
        context = self.context
        context.tell(self.number, " ".join(matrix.module.rpartition(".")[2] for matrix in group))
        full = find_method(context.settings.method).needs == "hessian"
        columns, device = group[0].columns, context.device

        def empty(held: Statistic | None = None) -> Statistic:
            match: DenseInputs | DenseOutputs | None = None
            if beside is not None:
                of_expert = group[0].group.expert is not None and len(group[0].group.modules) == 1
                outputs = group[0].group.input == beside.block.last or (of_expert and group[0].rows < columns)
                match = DenseOutputs(columns, group[0].rows, device) if outputs else DenseInputs(columns, device)
            return Statistic(columns, full, device, match, held)

        return empty(empty() if full and context.judges else None)

    def replace(self, matrix: Matrix, weight: Tensor) -> None:
        """Put a pruned matrix [rows, columns] in the place of the dense one, which is not needed any more."""
        context = self.context
        if matrix.tensor == matrix.name:
            self.tensors[matrix.tensor] = weight.cpu()
        else:
            if context.dense is not None and not context.memory.on_gpu and matrix.tensor not in self.pruned:
                # The dense model beside has its weights in the same memory.
                self.tensors[matrix.tensor] = self.tensors[matrix.tensor].clone()
            matrix.of(self.tensors[matrix.tensor]).copy_(weight)
        self.pruned[matrix.tensor] = self.tensors[matrix.tensor]

    def install(self, groups: list[list[Matrix]]) -> None:
        """Put pruned matrices into the blocks that the tokens go through."""
        linears = {name: linear for block in self.blocks for name, linear in block.linears.items()}
        for matrix in itertools.chain.from_iterable(groups):
            if linears and matrix.tensor in self.pruned:
                weight = matrix.of(self.pruned[matrix.tensor]).to(self.context.device, self.context.dtype)
                linears[matrix.module].weight = nn.Parameter(weight, requires_grad=False)

    def note(self, matrix: Matrix, result: MatrixResult, seconds: float, tokens: int | None = None) -> None:
        """Add a matrix's row, while `tensors` still has the dense one.

        `tokens` is how many reached it; by default all of the calibration.
        """
        stream = self.context.stream
        if tokens is None and stream is not None and not result.skipped:
            tokens = stream.packing.counted
        dense, target = self.tensors[matrix.tensor], self.context.target(matrix)
        row = matrix_row(matrix, result, dense, target, seconds, tokens)
        self.rows.append({**row, "reordered": True} if matrix.module in self.reordered else row)


def batches(groups: list[list[Matrix]], most: int | None) -> Iterator[list[list[Matrix]]]:
    """Groups in their order, at most `most` together; None: all."""
    step = most or len(groups) or 1
    for at in range(0, len(groups), step):
        yield groups[at : at + step]
