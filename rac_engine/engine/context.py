"""The job as its layers see it: the model, the settings, the machine, and how far the calibration tokens have come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from rac_engine.base.sizes import format_seconds
from rac_engine.calibrate import Stream
from rac_engine.engine.layer_files import LayerFiles
from rac_engine.engine.survey import Allocation
from rac_engine.jobs.clock import Clock
from rac_engine.jobs.timeline import Timeline
from rac_engine.models import EMBEDDINGS, Matrix, Model
from rac_engine.plan import MemoryPlan, dtype_of, target_of
from rac_engine.recipe import PruneSettings
from rac_engine.solve import Reason, Target


@dataclass(frozen=True)
class Left:
    """A block that the tokens of both models have left, behind which their states are still to be compared."""

    layer: int
    block: int
    module: str


@dataclass
class Context:
    """A pruning job as its layers see it: all that they share."""

    model: Model
    settings: PruneSettings
    skipped: Mapping[str, Reason]
    """Matrices that stay dense: the reason, by on-disk name."""
    device: str
    memory: MemoryPlan
    hessians: int | None
    """Hessians that may be gathered in one pass over the tokens; None: all of a stage."""
    allocation: Allocation | None
    """The sparsity of each matrix, where it is not the same for all."""
    files: LayerFiles
    clock: Clock
    timeline: Timeline
    progress: Callable[[str], None]
    stream: Stream | None = field(default=None, init=False)
    """Hidden states of the pruned model; None where nothing is calibrated."""
    dense: Stream | None = field(default=None, init=False)
    """Hidden states of the dense model, where its outputs are to be reconstructed."""
    left: Left | None = field(default=None, init=False)
    """The block that the tokens have left last, if they have not been compared behind it."""
    resumed: int = field(default=0, init=False)
    """Layers that were found finished by an earlier, interrupted job."""
    began: float | None = field(default=None, init=False)
    """The time (of `time.monotonic`) at which this job's own first layer began, once it has."""

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of the activations."""
        return dtype_of(self.model, self.settings, self.memory.on_gpu)

    @cached_property
    def parts(self) -> list[int]:
        """Numbers of the parts that may be pruned: the embeddings, the decoder layers, lm_head."""
        return list(self.model.parts(self.settings.also))

    @property
    def numbers(self) -> range:
        """Numbers of the decoder layers in their order, and of lm_head behind them if it is to be pruned."""
        return range(self.parts[-1] + 1)

    @cached_property
    def last(self) -> int:
        """The last layer with a matrix to prune, -1 if there is none: the tokens need to come no further."""
        wanted = (matrix.layer for matrix in self.model.prunable(self.settings.also) if self.wants(matrix))
        return max((layer for layer in wanted if layer != EMBEDDINGS), default=-1)

    @property
    def judges(self) -> bool:
        """Whether matrices are judged by tokens that are held out."""
        return self.memory.choice.judged and self.stream is not None and self.stream.packing.held_counted > 0

    def wants(self, matrix: Matrix) -> bool:
        """Whether a matrix is to be pruned."""
        return matrix.name not in self.skipped

    def groups(self, layer: int) -> list[list[Matrix]]:
        """The matrices of a layer that are to be pruned, those that share an input together."""
        wanted = filter(self.wants, self.model.matrices(layer))
        return [list(group) for _, group in itertools.groupby(wanted, key=lambda matrix: matrix.group)]

    def target(self, matrix: Matrix) -> Target:
        """Sparsity or pattern, damping and block size of a matrix, with overrides and allocation applied."""
        target = target_of(self.settings, matrix)
        if self.allocation is None or matrix.name not in self.allocation.sparsities:
            return target
        return replace(target, sparsity=self.allocation.sparsities[matrix.name])

    def make_room(self, matrix: Matrix) -> None:
        """Wait until the layer before is written, if the matrix's stage needs the memory that it takes."""
        within = matrix.layer < self.model.layers
        if within and (self.model.kind(matrix.layer), matrix.stage) in self.memory.alone:
            with self.timeline.waiting():
                self.files.settle()

    def tell(self, layer: int, what: str) -> None:
        """Report progress: the layer, what is done in it, and the time left at the pace of this job's layers so far.

        What came before them does not count: a first pass, and the layers of an earlier job.
        """
        done, layers, left = layer - self.resumed, self.model.layers, ""
        if self.began is not None and done > 0 and layer < layers:
            left = f", {format_seconds((time.monotonic() - self.began) / done * (layers - layer))} left"
        self.progress(f"layer {layer + 1}/{layers}: {what}{left}" if layer < layers else f"behind the layers: {what}")
