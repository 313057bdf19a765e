"""The memory of a forward pass through all layers that ends with logits: nothing is gathered, solved or written."""

from __future__ import annotations

from typing import ClassVar

from rac_engine.models import LOGIT_ROWS, Model
from rac_engine.plan.costs import CUDA_WORKSPACE_BYTES, observing_bytes
from rac_engine.plan.memory import MemoryPlan, plan_memory
from rac_engine.plan.phases import BEHIND, Machine, Phase, PhasePlanner, Tokens
from rac_engine.plan.shapes import Shape, Stage
from rac_engine.recipe import PruneSettings

_SETTINGS = PruneSettings(method="wanda", order="layer")  # a layer in one pass, without a dense model beside it

_LOSS_BYTES = 16  # of a token: its loss, whether it has a next one and which that is


def plan_forward(model: Model, tokens: Tokens, machine: Machine) -> MemoryPlan:
    """The best way to find the logits of so many tokens, a layer at a time, within the machine's limits.

    Activations and chunks are as in a pruning job. Raises `BadInput`, naming the phase, where nothing fits.
    """
    shape = Shape.of(model, _SETTINGS, machine.on_gpu)
    return plan_memory(shape, _SETTINGS, tokens, machine, planner_of=ForwardPlanner)


class ForwardPlanner(PhasePlanner):
    """The phases of such a pass."""

    hint: ClassVar[str] = ""

    def phases(self) -> list[Phase]:
        """All phases, in the job's order."""
        self.base["losses"] = self.tokens.count * _LOSS_BYTES
        return [self.embed(), *map(self.forward, self.shape.stages), self.read_out()]

    def forward(self, stage: Stage) -> Phase:
        """The tokens go through a layer."""
        sizes = (self.chunk, self.tokens.longest, False, self.on_gpu)
        work = {
            "activations of a chunk": max(observing_bytes(self.shape, each, *sizes) for each in stage.inputs)
            + 2 * self.chunk * self.shape.hidden * self.shape.size,
            "keys and values": self._keys_and_values(1),
        }
        phase = self._phase("forward pass", stage, 0, work)
        phase.host.pop(BEHIND, None)
        return phase

    def read_out(self) -> Phase:
        """Hidden states become logits, some at a time, and these losses."""
        device, host, _ = self._stored(0)
        shape = self.shape
        work = {
            "lm_head": shape.vocabulary * shape.hidden * shape.size,
            "logits": (2 * shape.size + 12) * min(LOGIT_ROWS, self.chunk) * shape.vocabulary,
            "a chunk": 2 * self.chunk * shape.hidden * shape.size,
        }
        # As it is stored, before it is converted or on a GPU.
        stored = {"lm_head as it is stored": shape.embedding_bytes} if self.converted else {}
        if self.on_gpu:
            work["libraries"] = CUDA_WORKSPACE_BYTES
            return Phase("logits", {**device, **work}, {**self.base, **host, **stored})
        return Phase("logits", {}, {**self.base, **host, **stored, **work})
