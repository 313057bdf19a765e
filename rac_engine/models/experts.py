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
            self.add_module(name, nn.utils.skip_init(nn.Linear, columns, rows, bias=plan.stacked, device="meta"))
        self._plan, self._activation = plan, activation

    def inner(self, x: Tensor) -> Tensor:
        """The input of the last matrix [tokens, width] from x [tokens, hidden]."""
        return self._activation(*(self.get_submodule(name)(x) for name in self._plan.inputs))

    def outer(self, inner: Tensor) -> Tensor:
        """The expert's output [tokens, hidden] from the input of its last matrix."""
        return self.get_submodule(self._plan.output)(inner)


class Mixture(nn.ModuleList):
    """Experts as modules of their own, by their on-disk names, in the place of transformers' fused ones."""

    def __init__(self, fused: Any, plan: ExpertPlan) -> None:
        if plan.stacked:
            shapes = {name: tuple(getattr(fused, name).shape[:0:-1]) for name in (*plan.inputs, plan.output)}
            activation = fused._apply_gate
        else:
            width, hidden = fused.intermediate_dim, fused.hidden_dim
            shapes = dict.fromkeys(plan.inputs, (width, hidden)) | {plan.output: (hidden, width)}
            act = fused.act_fn

            def activation(gate: Tensor, up: Tensor) -> Tensor:
                return act(gate) * up

        super().__init__(Expert(plan, activation, shapes) for _ in range(fused.num_experts))
        self.plan = plan
        self.names: list[tuple[str, str]] = []
        """Names of the two inputs of every expert: at its entrance, and of its last matrix."""
        self.observation = Observation({}, through=True)

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
            if observation.through:
                add_expert_(out, expert.outer(inner), tokens, shares.flatten()[slots])
        observation.left.difference_update(name for names in self.names for name in names)  # experts without a token
        observation.end_if_done()
        return out
