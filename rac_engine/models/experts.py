"""Mixtures of experts: every expert a module of its own, its matrices by their on-disk names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rac_engine.models.observers import Observation
from rac_engine.models.plans import ExpertPlan
from rac_kernels import add_expert_, slots_by_expert


class Expert(nn.Module):
    """One expert of a mixture: output(activation(inputs(x)))."""

    def __init__(self, plan: ExpertPlan, activation: Callable[..., Tensor], shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        for name in (*plan.inputs, plan.output):
            rows, columns = shapes[name]
            self.add_module(name, nn.utils.skip_init(nn.Linear, columns, rows, bias=plan.biases, device="meta"))
        self._plan, self._activation = plan, activation

    def inner(self, x: Tensor) -> Tensor:
        """The input of the last matrix [tokens, width] from x [tokens, hidden]."""
        return self._activation(*(self.get_submodule(name)(x) for name in self._plan.inputs))

    def outer(self, inner: Tensor) -> Tensor:
        """The expert's output [tokens, hidden] from the input of its last matrix."""
        return self.get_submodule(self._plan.output)(inner)


def _activation(fused: Any, inputs: int) -> Callable[..., Tensor]:
    """The activation between the matrices of an expert, of the outputs of its `inputs` matrices at the entrance."""
    if hasattr(fused, "up_proj"):
        plain: Callable[..., Tensor] = fused.act_fn
        return plain
    apply: Callable[..., Tensor] | None = getattr(fused, "_apply_gate", None)
    if apply is not None and apply.__name__ == "_apply_gate":  # the family's own, not that of all
        return apply if inputs == 1 else lambda gate, up: apply(torch.cat((gate, up), -1))
    act = fused.act_fn

    def gated(gate: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return act(gate) * up

    return gated


class Mixture(nn.ModuleList):
    """Experts as modules of their own, by their on-disk names, in the place of transformers' fused ones."""

    def __init__(self, fused: Any, plan: ExpertPlan) -> None:
        # Transformers' own have one matrix for gate and up, or `up_proj` alone where there is no gate.
        gated = hasattr(fused, "gate_up_proj")
        entrance, exit_ = (fused.gate_up_proj if gated else fused.up_proj), fused.down_proj
        turn = -1 if getattr(fused, "is_transposed", plan.transposed) else 1
        rows, columns = entrance.shape[1:][::turn]
        shapes = {plan.output: tuple(exit_.shape[1:][::turn])}
        shapes |= dict.fromkeys(plan.inputs, (rows // len(plan.inputs), columns))
        super().__init__(Expert(plan, _activation(fused, len(plan.inputs)), shapes) for _ in range(len(entrance)))
        self.plan = plan
        self.names: list[tuple[str, str]] = []
        """Names of the two inputs of every expert: at its entrance, and of its last matrix."""
        self.observation = Observation({}, through=True)

    def stacked_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in which all experts' matrices and biases are stacked on disk."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in (*self.plan.inputs, self.plan.output):
            rows, columns = self[0].get_submodule(name).get_parameter("weight").shape
            shapes[name] = (len(self), columns, rows) if self.plan.transposed else (len(self), rows, columns)
            if self.plan.biases:
                shapes[f"{name}_bias"] = (len(self), rows)
        return shapes

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The experts' outputs [tokens, hidden] for hidden [tokens, hidden], added up.

        `chosen` [tokens, k] are the numbers of the experts that a token goes to, `shares` [tokens, k] what their
        outputs are multiplied by.
        """
        observation = self.observation
        out = torch.zeros_like(hidden)
        experts = cast(Iterator[Expert], iter(self))
        for expert, slots, names in zip(experts, slots_by_expert(chosen, len(self)), self.names, strict=True):
            if not len(slots) or not (observation.through or observation.left.intersection(names)):
                continue
            tokens = slots // chosen.shape[1]
            x = hidden[tokens]
            observation.show(names[0], x, tokens)
            if not observation.through and names[1] not in observation.left:
                continue
            inner = expert.inner(x)
            observation.show(names[1], inner, tokens)
            if observation.through and torch.is_grad_enabled():
                given = expert.outer(inner) * shares.flatten()[slots, None].to(hidden.dtype)
                out = out.index_add(0, tokens, given)
            elif observation.through:
                add_expert_(out, expert.outer(inner), tokens, shares.flatten()[slots])
        observation.left.difference_update(name for names in self.names for name in names)  # experts without a token
        observation.end_if_done()
        return out
