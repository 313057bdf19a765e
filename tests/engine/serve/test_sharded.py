"""Methods for vLLM's layers, without vLLM: loaders written here cut and fuse as its own do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac_engine.serve.sharded import PackedLinears, Unpacking
from rac_kernels.ops.packed import Values, pack, unpack

COLUMNS = 384


def pruned(rows: int, seed: int, values: Values, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A matrix with every third weight kept, packed as in a file, and dense."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    dense[torch.arange(rows * columns).view(rows, columns) % 3 > 0] = 0
    packed = pack(dense, values)
    return packed.data, unpack(packed)


class Fused(nn.Module):
    """A rank's part of several matrices by rows: a loader is told which of them it is given."""

    def __init__(self, sizes: list[int], rank: int, ranks: int = 2) -> None:
        super().__init__()
        self.sizes, self.rank, self.ranks = sizes, rank, ranks
        self.method = PackedLinears()
        mine = [size // ranks for size in sizes]
        self.method.create_weights(
            self, COLUMNS, mine, COLUMNS, sum(sizes), torch.bfloat16, weight_loader=self.load, prefix="qkv"
        )

    def load(self, parameter: Any, loaded: Any, shard: int) -> None:
        size = self.sizes[shard] // self.ranks
        dim = parameter.output_dim
        target = parameter.data.narrow(dim, sum(self.sizes[:shard]) // self.ranks, size)
        part = loaded.narrow(dim, self.rank * size, size)
        assert target.shape == part.shape
        target.copy_(part)


class ByColumns(nn.Module):
    """A rank's part of a matrix by columns, whose loader takes one tensor."""

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.rank, self.method = rank, PackedLinears()
        self.method.create_weights(
            self, COLUMNS // 2, [rows], COLUMNS, rows, torch.bfloat16, weight_loader=self.load, prefix="o_proj"
        )

    def load(self, parameter: Any, loaded: Any) -> None:
        size = parameter.data.shape[parameter.input_dim]
        parameter.data.copy_(loaded.narrow(parameter.input_dim, self.rank * size, size))


def fill(layer: Any, *given: Any) -> None:
    """A weight and more, by the loader that the engine finds at the parameter."""
    weight = dict(layer.named_parameters())["weight"]
    weight.weight_loader(weight, *given)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.01


@pytest.mark.parametrize("kinds", [("same", "same", "same"), ("int4", "int4", "same")])
def test_two_ranks_of_fused_matrices_give_the_dense_product(kinds: tuple[Values, Values, Values]) -> None:
    sizes = [16, 8, 8]
    matrices = [pruned(rows, seed, kind) for seed, (rows, kind) in enumerate(zip(sizes, kinds, strict=True))]
    x = torch.randn(2, 3, COLUMNS).bfloat16()
    bias = torch.randn(32).bfloat16()
    for rank in range(2):
        layer = Fused(sizes, rank)
        for shard in (2, 0, 1):
            fill(layer, matrices[shard][0], shard)
        layer.method.process_weights_after_loading(layer)
        rows = [m[rank * len(m) // 2 : (rank + 1) * len(m) // 2] for _, m in matrices]
        mine = bias[:16]
        assert_close(layer.method.apply(layer, x, mine), F.linear(x, torch.cat(rows), mine))
        assert_close(layer.method.apply(layer, x), F.linear(x, torch.cat(rows)))
        kept = {name: p.dtype for name, p in layer.named_parameters()}
        assert set(kept.values()) == {torch.uint8} and len(kept) == len(set(kinds))
        before = {name: p.data_ptr() for name, p in layer.named_parameters()}
        layer.method.process_weights_after_loading(layer)  # an engine may call it again
        assert before == {name: p.data_ptr() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("kind", ["same", "int4"])
def test_two_ranks_of_columns_sum_to_the_dense_product(kind: Values) -> None:
    stored, dense = pruned(24, 0, kind)
    x = torch.randn(5, COLUMNS).bfloat16()
    total = torch.zeros(5, 24)
    for rank in range(2):
        layer = ByColumns(24, rank)
        fill(layer, stored)
        layer.method.process_weights_after_loading(layer)
        half = COLUMNS // 2
        total += layer.method.apply(layer, x[:, rank * half : (rank + 1) * half]).float()
    assert_close(total, F.linear(x, dense))


def test_a_dense_pruned_matrix_is_packed_and_a_full_one_stays() -> None:
    _, dense = pruned(8, 0, "same")
    full = torch.randn(8, COLUMNS).bfloat16()
    layer = Fused([8, 8], 0, ranks=1)
    fill(layer, dense, 0)
    fill(layer, full, 1)
    layer.method.process_weights_after_loading(layer)
    assert [p.dtype for p in layer.parameters()] == [torch.uint8, torch.bfloat16]
    x = torch.randn(2, COLUMNS).bfloat16()
    assert_close(layer.method.apply(layer, x), F.linear(x, torch.cat([dense, full])))


def test_rows_that_were_not_loaded_are_an_error() -> None:
    layer = Fused([8, 8], 0)
    fill(layer, pruned(8, 0, "same")[0], 1)
    with pytest.raises(ValueError, match=r"rows \[\(4, 8\)\] were loaded of 8"):
        layer.method.process_weights_after_loading(layer)


class Dense:
    """A method of an engine that knows dense matrices alone."""

    def create_weights(self, layer: nn.Module, rows: int, columns: int, **attributes: Any) -> None:
        weight: Any = nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16), requires_grad=False)
        weight.weight_loader = attributes["weight_loader"]
        layer.register_parameter("weight", weight)


class Unpacked(Unpacking, Dense):
    """As a plugin makes it."""


def test_where_no_packed_layer_stands_matrices_are_unpacked_with_a_warning() -> None:
    stored, dense = pruned(8, 0, "int8")
    layer, seen = nn.Linear(1, 1), []

    def load(parameter: Tensor, loaded: Tensor, name: str, *, expert: int) -> bool:
        seen.append((name, expert))
        parameter.data.copy_(loaded)
        return True

    Unpacked().create_weights(layer, 8, COLUMNS, weight_loader=load)
    weight: Any = layer.weight
    with pytest.warns(UserWarning, match="Linear: unpacked while loading"):
        assert weight.weight_loader(weight, stored, "w1", expert=3)
    assert seen == [("w1", 3)] and torch.equal(weight, dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weight.weight_loader(param=weight, loaded_weight=dense, name="w1", expert=3)
