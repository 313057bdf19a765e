"""The weight matrices of a layer, and the groups that share an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Whose they are, of the experts that only some tokens go through."""
    share: float = 1.0
    """Of the tokens, how many come here if the router spreads them evenly."""

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

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix [rows, columns] as a view of its tensor."""
        return tensor if self.tensor == self.name else tensor[self.group.expert].T

    @property
    def stage(self) -> int:
        """Of the layer's stages, counted from 0."""
        return self.group.stage

    @property
    def path(self) -> str:
        """Name of the module in the whole model."""
        return self.name.removesuffix(".weight")
