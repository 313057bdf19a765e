"""One decoder layer being pruned: calibrate, solve, install, stage by stage."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rac_engine.calibrate import Activations, Beside, DenseInputs, DenseOutputs, Statistic, Stream, tune
from rac_engine.models import Block, Matrix
from rac_engine.solve import MatrixResult, Outputs, find_method, joined, left_dense, prune_matrices, split_rows
from rac_kernels import FactorError, spread_columns

if TYPE_CHECKING:
    from rac_engine.engine.job import Job


class Layer:
    """One decoder layer being pruned: `pruned` has its new matrices by on-disk name, `rows` an object each."""

    def __init__(self, job: Job, layer: int, tensors: dict[str, Tensor]) -> None:
        self.job, self.layer, self.tensors = job, layer, tensors
        self.groups = job.groups(layer)
        self.pruned: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.blocks: list[Block] = []
        self.beside: dict[int, Beside] = {}
        """Of the blocks, by their numbers, through which the dense model's tokens have still to go."""
        self.reordered = set[str]()
        """Modules whose neurons are in another order than in the checkpoint: dense they must not be written."""

    def prune(self) -> None:
        job, stream = self.job, self.job.stream
        for matrix in job.model.matrices(self.layer):
            if matrix.name in job.skipped:
                self._note(matrix, left_dense(matrix.of(self.tensors[matrix.tensor]), job.skipped[matrix.name]), 0.0)
        if stream is None:
            for group in self.groups:
                self._solve(group, None)
        elif self.layer <= job.last:
            self.blocks = job.model.build_layer(self.layer, self.tensors, job.dtype, job.device)
            if job.dense is not None:
                # Held here alone, so that a block's dense weights go when nothing needs them any more.
                self.beside = {
                    number: Beside(job.dense, block)
                    for number, block in enumerate(
                        job.model.build_layer(self.layer, self.tensors, job.dtype, job.device)
                    )
                }
            if job.settings.order == "layer":
                self._prune_at_once(stream)
            else:
                self._prune_in_stages(stream)
        order = {matrix.name: number for number, matrix in enumerate(job.model.matrices(self.layer))}
        self.rows.sort(key=lambda row: order[row["name"]])

    def _prune_in_stages(self, stream: Stream) -> None:
        """Every matrix is calibrated on what the pruned matrices before it give."""
        job = self.job
        for number, block in enumerate(self.blocks):
            kept = None
            here = [group for group in self.groups if group[0].group.block == number]
            further = self.layer < job.last or any(group[0].group.block > number for group in self.groups)
            tuned = bool(job.settings.epochs and here and block.plan.experts is None)
            if job.settings.reorders:
                self._reorder(stream, block, number)
            for _, stage in itertools.groupby(here, key=lambda group: group[0].stage):
                groups = list(stage)
                if groups[-1][0].group.expert is None:
                    kept = self._prune_groups(stream, block, groups, number, further and not tuned, further or tuned)
                else:
                    self._prune_experts(stream, block, groups, self.beside.get(number))
            if number in self.beside and (further or tuned):
                with job.clock("forward"):
                    self.beside[number].stream.advance(self.beside[number].block)
            if tuned:
                self._tune(stream, block, here)
            # The next block's first pass takes the tokens through this one, if there is room for what that holds on to:
            # with a mixture on either side, or nothing kept of an attention, there is not.
            if block is self.blocks[-1]:
                aside = job.memory.choice.overlap and block.plan.experts is None
            else:
                aside = self.blocks[number + 1].plan.experts is None
            if further and aside and (kept is not None or not block.plan.attention):
                stream.advance_later(block, kept)
            elif further:
                with job.clock("forward"):
                    stream.advance(block, kept)

    def _prune_groups(
        self, stream: Stream, block: Block, groups: list[list[Matrix]], number: int, keep: bool, further: bool
    ) -> Activations | None:
        """Prune groups of a stage, as many in a pass over the tokens as their Hessians may be; see `Stream.observe`.

        `number` is the block's: with its last matrix observed, the dense one beside is done and goes, its tokens moved
        on unless they go no `further`. To `keep` is what the pruned one's tokens gave.
        """
        job, kept = self.job, None
        residual = job.settings.reconstructs == "residual"
        job.make_room(groups[0][0])
        for some in batches(groups, job.hessians):
            with job.clock("calibrate"):
                statistics = {group[0].group.input: self._statistic(group, self.beside.get(number)) for group in some}
                if number not in self.beside:
                    kept = stream.observe(block, statistics, keep)
                else:
                    kept = stream.observe_beside(block, statistics, self.beside[number], residual, keep, further)
                    if block.last in statistics:
                        del self.beside[number]
            for group in some:
                self._solve(group, statistics.pop(group[0].group.input))
        return kept

    def _reorder(self, stream: Stream, block: Block, number: int) -> None:
        """Give an MLP's inner neurons an order in which the pattern of its last matrix costs least.

        The model is the same in any order, as long as rows of the matrices before and columns of the last one go
        together. So all of them have to be pruned: what stays dense is to be found as it was.
        """
        job = self.job
        own = [matrix for matrix in job.model.matrices(self.layer) if matrix.group.block == number]
        last = next((matrix for matrix in own if matrix.module == block.last), None)
        pattern = None if last is None else job.target(last).pattern
        if last is None or pattern is None or block.plan.attention or any(m.name in job.skipped for m in own):
            return
        before = [matrix for matrix in own if matrix is not last]
        if any(m.rows != last.columns or getattr(block.linears[m.module], "bias", None) is not None for m in before):
            return
        with job.clock("calibrate"):
            statistic = Statistic(last.columns, False, job.device)
            stream.observe(block, {last.module: statistic}, keep=False)
        if not bool(statistic.value.isfinite().all() and statistic.value.any()):
            return
        with job.clock("solve"):
            scores = self.tensors[last.tensor].to(job.device, torch.float32).square().mul_(statistic.value)
            order = spread_columns(scores, pattern).cpu()
            del scores
        # The dense block beside stays as it is: what is asked of it does not depend on the order but for the last bits,
        # and those have to be the same when an unfinished job goes through this layer again.
        for matrix in own:
            dense = self.tensors[matrix.tensor]
            self.tensors[matrix.tensor] = moved = dense[:, order] if matrix is last else dense[order]
            block.linears[matrix.module].weight = nn.Parameter(moved.to(job.device, job.dtype), requires_grad=False)
            self.reordered.add(matrix.module)

    def _tune(self, stream: Stream, block: Block, groups: list[list[Matrix]]) -> None:
        """Tune the pruned matrices of a block whose tokens the dense model has moved on, but the pruned one not yet."""
        job = self.job
        matrices = {m.module: m for m in itertools.chain.from_iterable(groups) if m.tensor in self.pruned}
        if job.dense is None or not matrices:
            return
        job.make_room(groups[-1][0])
        job.tell(self.layer, f"tuning {block.plan.module}")
        with job.clock("tune"):
            weights = {name: self.pruned[matrix.tensor] for name, matrix in matrices.items()}
            made = tune(stream, job.dense, block, weights, job.settings.epochs)
        if made is None:
            for row in self.rows:
                if row["module"] in matrices:
                    row["notes"] = [*row["notes"], "not tuned: hidden states are not finite, or too large to square"]
            return
        for name, weight in made.weights.items():
            self.tensors[matrices[name].tensor] = self.pruned[matrices[name].tensor] = weight.cpu()
        self._install(groups)
        for row in self.rows:
            if row["module"] in matrices:
                weight = self.pruned[row["name"]]
                row["zeros"] = weight.numel() - int(weight.count_nonzero())
                row["sparsity"] = row["zeros"] / weight.numel()
                row["tuned"] = {"before": made.before, "after": made.after}

    def _prune_experts(self, stream: Stream, block: Block, groups: list[list[Matrix]], beside: Beside | None) -> None:
        """Prune a stage of a mixture: each expert by H of the tokens that were routed to it.

        An expert with n tokens, fewer than m = min_tokens · columns, is never pruned by those alone. To `blend`, its H
        becomes H + (m − n)/N · H_all: H_all is of the inputs that all N tokens of the layer give, as if they had all
        come to this expert. At the entrance that is the block's own input, the same for every expert; for the last
        matrix it is estimated by min(N, m) evenly spaced tokens, which are sent through the expert.
        """
        job, rule = self.job, self.job.settings.experts
        job.make_room(groups[0][0])
        everyone = next((group for group in groups if group[0].group.expert is None), None)
        experts = [group for group in groups if group[0].group.expert is not None]
        entrance = experts[0][0].stage == block.groups[0].stage
        common = None
        if everyone is not None:
            common, name = self._statistic(everyone, beside), everyone[0].group.input
        elif entrance and rule.otherwise == "blend":
            common, name = self._statistic(experts[0], beside), block.first
        room = None if job.hessians is None else max(job.hessians - (common is not None), 1)
        least = math.ceil(rule.min_tokens * experts[0][0].columns)
        for number, some in enumerate(batches(experts, room)):
            extra = {} if number or common is None else {name: common}
            with job.clock("calibrate"):
                shared = common if entrance else None
                statistics, seen = self._gather(stream, block, some, beside, extra, shared, least)
            for group, tokens in zip(some, seen, strict=True):
                why = None
                if tokens < least:
                    why = f"{tokens} tokens, fewer than {least} ({rule.min_tokens:g} for each of its inputs)"
                self._solve(group, statistics.pop(group[0].group.input), tokens, why)
        if everyone is not None:
            self._solve(everyone, common)

    def _gather(
        self,
        stream: Stream,
        block: Block,
        experts: list[list[Matrix]],
        beside: Beside | None,
        extra: dict[str, Statistic],
        common: Statistic | None,
        least: int,
    ) -> tuple[dict[str, Statistic], list[int]]:
        """Statistics of experts' inputs in one pass, and `extra`; of those with fewer than `least` tokens, blended.

        `common` is of all tokens, where that is the same for every expert. Also returns each expert's own tokens.
        """
        blended = self.job.settings.experts.otherwise == "blend"
        statistics = {group[0].group.input: self._statistic(group, beside) for group in experts}
        if beside is None:
            stream.observe(block, {**statistics, **extra})
        else:
            stream.observe_experts(block, {**statistics, **extra}, beside)
        seen = [statistic.tokens for statistic in statistics.values()]
        total = stream.packing.weight or 1.0
        scarce: dict[str, tuple[Statistic, float]] = {}
        for tokens, (name, statistic) in zip(seen, statistics.items(), strict=True):
            lacking = max(least - tokens, 0)
            if not blended or not lacking:
                continue
            if common is None:
                scarce[name] = (statistic, float(lacking))
            else:
                statistic.blend(common, lacking / total)
        if scarce:
            stream.observe_sample(block, scarce, least, beside)
        return statistics, seen

    def _prune_at_once(self, stream: Stream) -> None:
        """Every matrix is calibrated on what the dense layer gives, as published."""
        job = self.job
        for some in batches(self.groups, job.hessians):
            job.make_room(some[0][0])
            with job.clock("calibrate"):
                statistics = {group[0].group.input: self._statistic(group) for group in some}
                stream.observe_layer(self.blocks, statistics)
            for group in some:
                self._solve(group, statistics.pop(group[0].group.input), install=False)
        self._install(self.groups)
        if self.layer < job.last:
            with job.clock("forward"):
                for block in self.blocks:
                    stream.advance(block)

    def _statistic(self, group: list[Matrix], beside: Beside | None = None) -> Statistic:
        """Room for what is to be known of a group's input, and of what ties it to the dense model if that is `beside`.

        That is outputs of a block's last matrix, inputs where several matrices may share them; of an expert's last
        matrix what is smaller.
        """
        self.job.tell(self.layer, " ".join(matrix.module.rpartition(".")[2] for matrix in group))
        full = find_method(self.job.settings.method).needs == "hessian"
        columns, device = group[0].columns, self.job.device
        match: DenseInputs | DenseOutputs | None = None
        if beside is not None:
            of_expert = group[0].group.expert is not None and len(group[0].group.modules) == 1
            outputs = group[0].group.input == beside.block.last or (of_expert and group[0].rows < columns)
            match = DenseOutputs(columns, group[0].rows, device) if outputs else DenseInputs(columns, device)
        return Statistic(columns, full, device, match)

    def _solve(
        self,
        group: list[Matrix],
        statistic: Statistic | None,
        tokens: int | None = None,
        scarce: str | None = None,
        install: bool = True,
    ) -> None:
        """Prune matrices that share an input and put them into the layer.

        `tokens` is how many came to an expert, `scarce` says that they are too few.
        """
        job, settings = self.job, self.job.settings
        job.make_room(group[0])
        began = time.monotonic()
        weights = [matrix.of(self.tensors[matrix.tensor]).to(job.device).contiguous() for matrix in group]
        with job.clock("solve"):
            try:
                known, match = (None, None) if statistic is None else (statistic.value, statistic.match)
                method, otherwise = settings.method, settings.experts.otherwise
                if scarce is not None and otherwise == "dense":
                    results = [left_dense(weight, scarce) for weight in weights]
                else:
                    if scarce is not None and otherwise == "magnitude":
                        method, known = "magnitude", None
                    parts = [[weight] for weight in weights]
                    if known is not None and not isinstance(match, DenseOutputs):
                        parts = [split_rows(weight) for weight in weights]
                    outputs = None
                    if isinstance(match, DenseInputs):
                        outputs = Outputs.of_inputs(match.cross, match.gram, list(itertools.chain(*parts)))
                    elif match is not None:
                        outputs = Outputs(match.cross, [match.wanted], [match.dense])
                    every = [(part, job.target(m)) for m, some in zip(group, parts, strict=True) for part in some]
                    pieces, targets = [part for part, _ in every], [target for _, target in every]
                    unseen = "magnitude" if group[0].module in self.reordered else settings.unseen
                    found = iter(prune_matrices(pieces, known, method, targets, unseen, outputs))
                    results = [joined(list(itertools.islice(found, len(some)))) for some in parts]
            except FactorError as error:
                raise FactorError(f"{group[0].path}: {error}") from None
        seconds = time.monotonic() - began
        remarks = [] if statistic is None else self._remarks(statistic, group[0].columns)
        for matrix, result in zip(group, results, strict=True):
            if remarks:
                result = replace(result, notes=[*remarks, *result.notes])
            share = matrix.rows / sum(other.rows for other in group)
            if scarce is not None and result.skipped is None:
                how = "pruned by magnitude" if otherwise == "magnitude" else "H blended with that of all tokens"
                result = replace(result, notes=[f"{scarce}: {how}", *result.notes])
            self._note(matrix, result, seconds * share, tokens)
            if result.skipped is None:
                # The dense one is not needed any more: a layer is never in memory twice.
                if matrix.tensor == matrix.name:
                    self.tensors[matrix.tensor] = result.weight.cpu()
                else:
                    if job.dense is not None and not job.memory.on_gpu and matrix.tensor not in self.pruned:
                        # The dense model beside has its weights in the same memory.
                        self.tensors[matrix.tensor] = self.tensors[matrix.tensor].clone()
                    matrix.of(self.tensors[matrix.tensor]).copy_(result.weight)
                self.pruned[matrix.tensor] = self.tensors[matrix.tensor]
        if install:
            self._install([group])

    def _remarks(self, statistic: Statistic, columns: int) -> list[str]:
        """What is odd about an input, for the report."""
        remarks = []
        if statistic.dropped:
            remarks.append(f"{statistic.dropped:,} tokens hold NaN or Inf and were left out")
        if 0 < statistic.tokens < columns and statistic.value.ndim == 2:
            remarks.append(f"{statistic.tokens:,} tokens for {columns:,} inputs: damping alone makes H definite")
        return remarks

    def _install(self, groups: list[list[Matrix]]) -> None:
        """Put pruned matrices into the layer that the tokens go through."""
        linears = {name: linear for block in self.blocks for name, linear in block.linears.items()}
        for matrix in itertools.chain.from_iterable(groups):
            if linears and matrix.tensor in self.pruned:
                weight = matrix.of(self.pruned[matrix.tensor]).to(self.job.device, self.job.dtype)
                linears[matrix.module].weight = nn.Parameter(weight, requires_grad=False)

    def _note(self, matrix: Matrix, result: MatrixResult, seconds: float, tokens: int | None = None) -> None:
        stream = self.job.stream
        if tokens is None and stream is not None and not result.skipped:
            tokens = stream.packing.counted
        row = self.job.row(matrix, result, self.tensors[matrix.tensor], seconds, tokens)
        self.rows.append({**row, "reordered": True} if matrix.module in self.reordered else row)


def batches(groups: list[list[Matrix]], most: int | None) -> Iterator[list[list[Matrix]]]:
    """Groups in their order, at most `most` together."""
    step = most or len(groups) or 1
    for at in range(0, len(groups), step):
        yield groups[at : at + step]
