"""The weight matrices of a layer, and the groups that share an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rac_engine.models.experts import Mixture
from rac_engine.models.plans import BlockPlan, Family

EMBEDDINGS = -1  # where the table of embeddings stands among the layers; lm_head stands behind the last one


@dataclass(frozen=True)
class Group:
    """Matrices that share an input, by their names within the layer on disk.

    The stages of a layer follow one another in the data's way; the inputs of the groups of one stage do not depend on
    each other's matrices.
    """

    block: int
    stage: int
    modules: tuple[str, ...]
    expert: int | None = None
    """Number of the expert that has them, where only some tokens go through it."""
    share: float = 1.0
    """Share of the tokens that come here if the router spreads them evenly."""

    @property
    def input(self) -> str:
        """Name of the input: that of the first matrix it goes to."""
        return self.modules[0]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] that can be pruned."""

    layer: int
    group: Group
    module: str
    """Name within the layer: `self_attn.q_proj`."""
    name: str
    """Name on disk: `model.layers.0.self_attn.q_proj.weight`; of stacked ones, `mlp.experts.down_proj[3]`."""
    rows: int
    columns: int
    dtype: torch.dtype
    tensor: str
    """The tensor on disk: the `name`, unless the matrix is one of several stacked there."""
    transposed: bool = False
    """Whether it lies there as [columns, rows]."""

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix [rows, columns] as a view of its tensor."""
        own = tensor if self.tensor == self.name else tensor[self.group.expert]
        return own.T if self.transposed else own

    @property
    def stage(self) -> int:
        """Number of its stage in the layer, counted from 0."""
        return self.group.stage

    @property
    def path(self) -> str:
        """Name of the module in the whole model."""
        return self.name.removesuffix(".weight")


def find_groups(family: Family, plans: tuple[BlockPlan, ...], layer: nn.Module, experts_per_token: int) -> list[Group]:
    """The groups of a decoder `layer` (its experts as modules of their own), in the order that data goes through it."""
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    found: list[Group] = []
    for block, plan in enumerate(plans):
        experts = 0 if plan.experts is None else len(cast(Mixture, layer.get_submodule(f"{plan.module}.experts")))
        for names_by_group in _stages(plan, experts):
            number = found[-1].stage + 1 if found else 0
            for names, expert in names_by_group:
                here = [name for name in names if name in linears]
                if here:
                    modules = tuple(family.on_disk(name) for name in here)
                    share = 1.0 if expert is None else experts_per_token / experts
                    found.append(Group(block, number, modules, expert, share))
    return found


def _stages(plan: BlockPlan, experts: int) -> list[list[tuple[tuple[str, ...], int | None]]]:
    """Each stage of a block: the names of the matrices of each group within the layer, and the expert that has them."""
    home = plan.module
    entrance, exits = [f"{home}.{name}" for name in plan.inputs], [f"{home}.{plan.output}"]
    if plan.beside is not None:
        entrance += [f"{plan.beside.module}.{name}" for name in plan.beside.inputs]
        exits.append(f"{plan.beside.module}.{plan.beside.output}")
    stages: list[list[tuple[tuple[str, ...], int | None]]] = [[(tuple(entrance), None)]]
    if plan.between:
        stages.append([((f"{home}.{name}",), None) for name in plan.between])
    stages.append([((name,), None) for name in exits])
    if plan.experts is not None:
        for number, parts in ((0, plan.experts.inputs), (-1, (plan.experts.output,))):
            stages[number] += [(tuple(f"{home}.experts.{e}.{part}" for part in parts), e) for e in range(experts)]
    return stages
