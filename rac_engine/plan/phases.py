"""The phases of a pruning job and the bytes resident in each, worked out from shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from rac_engine.calibrate import (
    PIECE,
    TARGET_BYTES,
    TOKEN_MEMORY,
    Place,
    batch_tokens,
    keeps_inner,
    storing_bytes,
)
from rac_engine.models import working_dtype
from rac_engine.plan.costs import (
    CUDA_HOST_BYTES,
    CUDA_WORKSPACE_BYTES,
    FILE_BYTES,
    PROGRAM_BYTES,
    UNUSED_BYTES,
    WORKSPACE_BYTES,
    device_of,
    gathered_bytes,
    observing_bytes,
    pruning_bytes,
    recovery_bytes,
    recovery_files,
    tuned_bytes,
)
from rac_engine.plan.shapes import Input, Shape, Stage
from rac_engine.recipe import PruneSettings
from rac_kernels.ops import hessian, profile

BEHIND = "weights written behind"

WORTH_WAITING = 1.02  # times the peak without them

GATHERED = {"hessian": "Hessian", "norms": "norms", "nothing": "nothing"}


@dataclass(frozen=True)
class Choice:
    """A way to do a job within its memory."""

    chunk_tokens: int
    place: Place
    """The place of activations."""
    keep_bytes: int
    """An MLP's inner activations are kept if they are no larger, else computed twice."""
    overlap: bool
    """Whether the next layer is read and the last one written while one is pruned; on a CPU the last one is to be
    written before what takes most memory begins."""
    hessians: int | None
    """Hessians of a stage that are gathered in one pass over the tokens; None: all."""
    judged: bool = False
    """Whether what is gathered is gathered of the tokens held out too, to judge each matrix by."""


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens, as far as memory depends on them."""

    count: int
    longest: int
    """Tokens of the longest sequence."""
    weighted: bool = False
    """Whether not all of them count the same."""
    held: bool = False
    """Whether some are held out, to judge matrices by."""


@dataclass(frozen=True)
class Machine:
    """The machine that a job runs on: its limits and what it has free, in bytes. None: not known, or no limit."""

    on_gpu: bool = False
    device_limit: int | None = None
    """Bytes of the GPU that the user lets the job have."""
    host_limit: int | None = None
    """Bytes of the host that the user lets the job have, the program itself included."""
    device_spare: int | None = None
    """Bytes that the GPU has free."""
    host_spare: int | None = None
    """Bytes that the host has free."""
    program: int = PROGRAM_BYTES
    """Bytes of the process before the job begins."""


@dataclass(frozen=True)
class Phase:
    """A time in a job, with the bytes resident by purpose."""

    name: str
    device: dict[str, int]
    host: dict[str, int]
    key: tuple[int, int] | None = None
    """The key of its stage, of a decoder layer."""


@dataclass
class PhasePlanner:
    """The phases of a job that is done as a choice says. On a CPU everything is the host's."""

    hint: ClassVar[str] = "; `rac plan` shows for what"
    """The words behind a refusal for want of memory."""

    shape: Shape
    settings: PruneSettings
    tokens: Tokens
    choice: Choice
    machine: Machine
    disk: int = field(default=0, init=False)
    """Bytes of activations in files, at most, in the phases made so far."""
    learning: int = field(default=0, init=False)
    """Bytes in files while the whole model learns."""

    def __post_init__(self) -> None:
        self.needs = self.settings.solver.needs
        self.calibrated = self.needs != "nothing"
        self.matched = self.settings.reconstructs != "layer"
        self.tied = self.matched and self.needs == "hessian"
        self.at_once = self.settings.order == "layer"
        self.on_gpu, size = self.machine.on_gpu, self.shape.size
        self.converted = self.on_gpu or size != self.shape.weight_size
        """Whether the layer computes with weights of its own."""
        self.chunk = min(self.choice.chunk_tokens, self.tokens.count) if self.calibrated else 0
        self.streams = 2 if self.matched else 1
        self.base = self._base()

    def phases(self) -> list[Phase]:
        """All phases, in the job's order."""
        found: list[Phase] = []
        if self.calibrated:
            found.append(self.embed())
        if self.settings.allocation != "uniform":
            found.append(self.first_pass())
        for stage in (*self.shape.stages, *([] if self.shape.head is None else [self.shape.head])):
            gathered = {GATHERED[self.needs]: gathered_bytes(stage, self.needs, self.tied, self.choice.hessians)}
            last = stage.inputs[-1]
            if self.tied and last.last:
                gathered["cross product with the dense outputs"] = 4 * last.columns * last.rows
            if self.choice.judged:
                gathered["the same of the tokens held out"] = sum(gathered.values())
            kept = self._kept(stage)
            if self.calibrated:
                found.append(self.observe(stage, gathered, kept))
            found += self.solve(stage, gathered, kept)
            if self.settings.epochs and self.tied and last.last:
                found.append(self.tune(stage))
        if self.settings.recover and self.calibrated:
            found.append(self.recover())
        if self.choice.overlap and not self.on_gpu:
            self._wait_for_the_largest(found)
        return found

    def embed(self) -> Phase:
        """Tokens become hidden states."""
        device, host, _ = self._stored(0)
        table = {
            "embedding table": self.shape.embedding_bytes,
            "a chunk": 2 * self.chunk * self.shape.hidden * self.shape.size,
        }
        return Phase("embed", device, {**self.base, **host, **table})

    def first_pass(self) -> Phase:
        """The dense model is gone through for the allocation of sparsity."""
        shape, tokens, inputs = self.shape, self.tokens, self.shape.inputs
        kept = max((i.columns for i in inputs if i.last and self._keeps_dense(i)), default=0)
        work = {
            "norms": sum(4 * i.columns * i.count for i in inputs),
            "activations of a chunk": max(
                observing_bytes(shape, i, self.chunk, tokens.longest, False, self.on_gpu) for i in inputs
            ),
            "scores of some rows": max(profile.workspace(i.largest, i.columns) for i in inputs),
            "keys and values": self._keys_and_values(1),
        }
        return self._phase("first pass", shape.stages[0], kept, work, beside=False)

    def observe(self, stage: Stage, gathered: dict[str, int], kept: int) -> Phase:
        """The statistics of a stage are gathered; `kept` is the width of inner activations that are kept."""
        shape, chunk, longest = self.shape, self.chunk, self.tokens.longest
        token = chunk * shape.size
        passing = max(observing_bytes(shape, i, chunk, longest, self.tied, self.on_gpu) for i in stage.inputs)
        counting = self._counting(stage)
        if not self.on_gpu and self.choice.place == "host" and not self.tied:
            # Of what is asked for to keep activations in, a chunk's share is taken once that has passed.
            passing -= token * kept
        work, keeping = dict[str, int](), kept
        before = None if self.at_once else self._block_before(stage)
        if before is not None and (self._keeps(before) or not before.attention):
            # The tokens come out of it on their way.
            leaving = token * shape.hidden
            if self._keeps(before):
                keeping = before.columns
            else:
                leaving = observing_bytes(shape, before, chunk, longest, False, self.on_gpu)
            passing = max(passing, leaving) + token * shape.hidden
            counting += token * shape.hidden
            if self.converted and not before.attention:
                work["weights of the block before"] = self._mlp(before) * shape.size
        work["activations of a chunk"] = max(passing, counting)
        if self.at_once or any(i.attention and not i.recurrent and not i.entrance for i in stage.inputs):
            work["keys and values"] = self._keys_and_values(self.streams)
        name = f"observe {stage.name}"
        return self._phase(name, stage, keeping, {**gathered, **work}, key=stage.inputs[0].key)

    def solve(self, stage: Stage, gathered: dict[str, int], kept: int) -> Iterator[Phase]:
        """The matrices of each of a stage's inputs are pruned."""
        waiting, size = 0, self.shape.weight_size
        for found in stage.inputs:
            if found.count > 1 and self.matched and not self.converted:
                waiting = found.weights * size  # of the other experts, beside the dense ones
            work = pruning_bytes(found, self.settings, size, self.tied, self.on_gpu, self.choice.judged)
            work = {**gathered, "pruned before": waiting, **work}
            yield self._phase(f"solve {found.name}", stage, kept, work, done=found.last, key=found.key)
            if self.at_once and not self.converted:
                waiting += found.weights * size  # not in the layer before all are pruned

    def tune(self, stage: Stage) -> Phase:
        """The block that a stage ends is tuned as a whole."""
        on_grid = self.settings.values != "same"
        work = tuned_bytes(self.shape, stage, self.tokens.count, self.chunk, self.tokens.longest, on_grid)
        return self._phase(f"tune {stage.name}", stage, 0, work, done=True, key=stage.inputs[0].key)

    def recover(self) -> Phase:
        """The whole model learns, a layer at a time, once all is pruned and the streams are gone."""
        shape, tokens = self.shape, self.tokens
        batch = max(batch_tokens(tokens.count), min(tokens.longest, self.chunk))
        states = max((shape.layers + 2) * batch, tokens.count) * shape.hidden * shape.size
        moving = 2 * PIECE * shape.hidden * shape.size
        whole = states + tokens.count * TARGET_BYTES
        device, host, file = storing_bytes(self.choice.place, self.on_gpu, whole, moving)
        self.learning = file + recovery_files(shape, self.settings)
        work = recovery_bytes(shape, self.settings, tokens.count, self.chunk, tokens.longest)
        layer = {"weights of the layer": shape.layer_bytes}
        if self.on_gpu:
            return Phase(
                "recover", {**device, **work, "libraries": CUDA_WORKSPACE_BYTES}, {**self.base, **layer, **host}
            )
        return Phase("recover", {}, {**self.base, **layer, **host, **work})

    def _phase(
        self,
        name: str,
        stage: Stage,
        kept: int,
        work: dict[str, int],
        *,
        beside: bool = True,
        done: bool = False,
        key: tuple[int, int] | None = None,
    ) -> Phase:
        """A phase with what is there in all of them.

        `beside`: whether a dense layer lies beside the pruned one, where outputs are matched; of its block at hand no
        more than the input's matrices if that is `done`.
        """
        shape, head = self.shape, stage is self.shape.head
        device, host, file = self._stored(kept) if self.calibrated else ({}, {}, 0)
        self.disk = max(self.disk, file)
        weights = {} if head else self._layer_weights(stage, beside, done)
        libraries = {"libraries": CUDA_WORKSPACE_BYTES} if self.on_gpu else {}
        work = {purpose: count for purpose, count in {**weights, **work, **libraries}.items() if count}
        layer = {"weights of the layer": shape.head_bytes if head else shape.layer_bytes}
        if self.choice.overlap:
            if not head:
                layer["weights read ahead"] = max(shape.layer_bytes, shape.head_bytes)
            layer[BEHIND] = shape.layer_bytes
        if shape.quantized_bytes and not head:
            layer["quantized weights being read"] = shape.quantized_bytes
        host = {**self.base, **layer, **host}
        host = host if self.on_gpu else {**host, **work}
        return Phase(name, {**device, **work} if self.on_gpu else {}, host, None if head else key)

    def _layer_weights(self, stage: Stage, beside: bool, done: bool) -> dict[str, int]:
        """Bytes of a layer's weights where they compute, the dense layer's beside the pruned one's."""
        shape, weights = self.shape, dict[str, int]()
        own = shape.layer_bytes // shape.weight_size
        if self.calibrated and self.converted:
            weights["weights of the layer" if self.on_gpu else "converted weights"] = own * shape.size
        if self.matched and beside:
            # Where nothing is converted, of what is pruned; the rest is the same memory.
            gone = stage.gone + (stage.before + sum(found.weights for found in stage.inputs) if done else 0)
            # An MLP that gets another order is so before any of it is pruned.
            apart = self._mlp(stage.inputs[0]) if self.settings.reorders and _is_mlp(stage) else stage.before
            dense = 0 if done else apart * shape.weight_size
            weights["weights of the dense layer"] = (own - gone) * shape.size if self.converted else dense
        return weights

    def _base(self) -> dict[str, int]:
        """Bytes of the host that are there all the time."""
        algebra = self.needs == "hessian"
        kept_once, by_thread = WORKSPACE_BYTES[algebra]
        if working_dtype(torch.bfloat16, self.on_gpu) == torch.float32:
            kept_once -= UNUSED_BYTES[algebra]
        base = {
            "program": self.machine.program + (CUDA_HOST_BYTES if self.on_gpu else 0),
            "libraries and heap": FILE_BYTES + kept_once + by_thread * min(torch.get_num_threads(), 8),
        }
        return base | ({"calibration tokens": self.tokens.count * TOKEN_MEMORY} if self.calibrated else {})

    def _stored(self, width: int) -> tuple[dict[str, int], dict[str, int], int]:
        """Bytes of hidden states and a kept input of that width: on the device, on the host, and on disk."""
        token = (self.streams * self.shape.hidden + width) * self.shape.size
        return storing_bytes(self.choice.place, self.on_gpu, self.tokens.count * token, self.chunk * token)

    def _counting(self, stage: Stage) -> int:
        """Bytes of a chunk's inputs while they are added to statistics."""
        hidden, widest = self.shape.hidden, max(found.columns for found in stage.inputs)
        token = self.chunk * self.shape.size
        counting = token * (widest + 4 * hidden if self.tied else widest)
        counting += hessian.workspace(self.chunk, widest, device_of(self.on_gpu))
        if self.tokens.weighted:  # those that count are taken out of all
            counting += token * (widest + (max(widest, 2 * hidden) if self.tied else 0))
        return counting

    def _keys_and_values(self, streams: int) -> int:
        """Bytes of keys and values of a sequence that does not fit in a chunk."""
        if self.tokens.longest <= self.chunk:
            return 0
        return streams * self.tokens.longest * self.shape.attention.key_values * self.shape.size

    def _keeps_dense(self, found: Input) -> bool:
        """Whether a block's inner activations are kept, of a block that stays as it is."""
        sizes = self.tokens.count, found.columns, self.shape.size
        return keeps_inner(found.attention, *sizes, self.choice.keep_bytes)

    def _keeps(self, found: Input) -> bool:
        """Whether a block's inner activations are kept. A tuned block is another by the time its tokens move on."""
        return not self.settings.epochs and self._keeps_dense(found)

    def _kept(self, stage: Stage) -> int:
        """The width of a stage's inner activations that are kept."""
        if self.at_once:
            return 0
        return max((found.columns for found in stage.inputs if found.last and self._keeps(found)), default=0)

    def _mlp(self, found: Input) -> int:
        """Weights of the MLP in a layer as that of an input."""
        return sum(i.weights for i in self.shape.inputs if not i.attention and i.key[0] == found.key[0])

    def _block_before(self, stage: Stage) -> Input | None:
        """The last input of the block that the tokens come out of in the pass that gathers a stage's statistics."""
        if not stage.inputs[0].entrance or any(found.count > 1 for found in stage.inputs):
            return None  # a mixture's first passes have no room to spare
        attention = stage is not self.shape.head and not stage.inputs[0].attention
        if not (attention or self.choice.overlap):
            return None  # one layer at a time
        last = (i for i in self.shape.inputs if i.last and i.attention == attention)
        return max(last, key=lambda i: i.columns, default=None)

    def _wait_for_the_largest(self, phases: list[Phase]) -> None:
        """The largest stages wait for the layer before to be written, unless it makes next to no difference."""
        sized = [(sum(each.host.values()) - self.machine.program, each) for each in phases]
        most = max(size - bool(each.key) * each.host.get(BEHIND, 0) for size, each in sized)
        largest = {each.key for size, each in sized if each.key and size > WORTH_WAITING * most}
        for each in phases:
            if each.key in largest:
                each.host.pop(BEHIND, None)


def _is_mlp(stage: Stage) -> bool:
    """Whether a stage is of an MLP without experts."""
    return not any(found.attention or found.count > 1 for found in stage.inputs)
