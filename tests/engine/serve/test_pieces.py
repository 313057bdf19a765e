"""Packed matrices cut and put together as an engine's loaders do it, beside the same cuts of dense ones."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rac_engine.serve.pieces import Piece, Place, is_packed
from rac_kernels import Packed
from rac_kernels.ops.packed import Values, pack, unpack

Form = Literal["same", "int8", "int4", "dense"]
"""How a matrix lies in a file."""


def matrix(form: Form, rows: int, columns: int, seed: int = 0, kept: float = 0.3) -> tuple[Tensor, Tensor]:
    """A pruned bf16 matrix: its tensor in a file, and the dense matrix [rows, columns] that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator).bfloat16()
    dense[torch.rand(rows, columns, generator=generator) > kept] = 0
    if form == "dense":
        return dense, dense
    packed = pack(dense, form)
    return packed.data, unpack(packed)


def plain(part: Packed | Tensor) -> Tensor:
    """A part as a dense matrix; a packed one is read again from its bytes, which are checked."""
    return unpack(Packed.from_tensor(part.data)) if isinstance(part, Packed) else part


@pytest.mark.parametrize("form", ["same", "int8", "int4", "dense"])
@pytest.mark.parametrize("columns", [512, 384, 192, 70], ids=lambda n: f"{n}-columns")
def test_halves_are_those_of_the_dense_matrix(form: Form, columns: int) -> None:
    """By rows and by columns; 384 and 192 columns are cut within a scale's columns, 192 and 70 within a word too."""
    stored, dense = matrix(form, 10, columns)
    piece = Piece.of(stored)
    assert piece.shape == dense.shape and piece.size() == dense.size() and piece.size(1) == columns
    for dim in (0, 1, -1):
        half = dense.shape[dim] // 2
        for rank in range(2):
            cut = piece.narrow(dim, rank * half, half)
            wanted = dense.narrow(dim, rank * half, half)
            assert cut.shape == wanted.shape
            taken = cut.taken()
            assert torch.equal(plain(taken), wanted)
            assert isinstance(taken, Packed)
    twice = piece.narrow(0, 2, 6).narrow(1, columns // 2, columns // 4).narrow(0, 1, 3)
    assert torch.equal(plain(twice.taken()), dense[3:6, columns // 2 : columns // 2 + columns // 4])


def test_scales_cut_in_two_are_kept_with_the_codes() -> None:
    stored, _ = matrix("int4", 6, 384)
    whole = Packed.from_tensor(stored).layout
    assert whole.group == 128
    groups = {rank: Piece.of(stored).narrow(1, 192 * rank, 192).taken() for rank in range(2)}
    layouts = [part.layout for part in groups.values() if isinstance(part, Packed)]
    assert [(layout.values, layout.group) for layout in layouts] == [("int4", 128), ("int4", 64)]


def test_a_matrix_that_would_not_shrink_stays_dense() -> None:
    dense = torch.randn(8, 64).bfloat16()
    taken = Piece.of(dense).narrow(0, 4, 4).taken()
    assert isinstance(taken, Tensor) and torch.equal(taken, dense[4:])
    assert taken.untyped_storage().nbytes() == taken.numel() * 2  # a copy: it does not hold the whole matrix


def filled(forms: tuple[Form, Form, Form], rank: int, columns: int = 256) -> tuple[Place, Tensor]:
    """Rank 0 or 1 of q, k and v under one another, in any order, and the dense matrix that it should stand for."""
    rows = {"q": 8, "k": 4, "v": 4}
    place = Place((0, 8), (0, columns))
    wanted: dict[str, Tensor] = {}
    for number, (name, form) in reversed(list(enumerate(zip(rows, forms, strict=True)))):
        stored, dense = matrix(form, rows[name], columns, number)
        half = rows[name] // 2
        begin = sum(list(rows.values())[:number]) // 2
        place.data.narrow(place.output_dim, begin, half).copy_(Piece.of(stored).narrow(0, rank * half, half))
        wanted[name] = dense[rank * half : (rank + 1) * half]
    return place, torch.cat([wanted[name] for name in rows])


@pytest.mark.parametrize(
    ("forms", "parts"),
    [
        (("same", "same", "same"), 1),
        (("same", "dense", "same"), 1),  # packed while it is loaded
        (("int4", "int4", "int4"), 1),
        (("int4", "int8", "int8"), 2),
        (("int8", "same", "int8"), 3),
    ],
)
def test_fused_matrices_are_those_of_the_dense_rows(forms: Any, parts: int) -> None:
    for rank in range(2):
        place, wanted = filled(forms, rank)
        found = place.parts()
        assert len(found) == parts
        assert torch.equal(torch.cat([plain(part) for part in found]), wanted)


def test_a_dense_part_among_packed_ones_stays_in_its_rows() -> None:
    place, full = Place((0, 12), (0, 128)), torch.randn(4, 128).bfloat16()
    pruned = [matrix("same", 4, 128, seed) for seed in range(2)]
    for at, tensor in ((0, pruned[0][0]), (4, full), (8, pruned[1][0])):
        place.narrow(0, at, 4).copy_(Piece.of(tensor))
    found = place.parts()
    assert [isinstance(part, Packed) for part in found] == [True, False, True]
    assert torch.equal(torch.cat([plain(part) for part in found]), torch.cat([pruned[0][1], full, pruned[1][1]]))


def test_what_does_not_fit_is_refused() -> None:
    stored, _ = matrix("same", 8, 64)
    piece, place = Piece.of(stored), Place((0, 8), (0, 64))
    with pytest.raises(IndexError, match="4 from 6 of 8"):
        piece.narrow(0, 6, 4)
    with pytest.raises(IndexError, match="64 from 1 of 64"):
        place.narrow(1, 1, 64)
    with pytest.raises(ValueError, match=r"a piece \[4, 64\] for a place \[8, 64\]"):
        place.copy_(piece.narrow(0, 0, 4))
    place.narrow(0, 4, 4).copy_(piece.narrow(0, 0, 4))
    with pytest.raises(ValueError, match=r"rows \[\(4, 8\)\] were loaded of 8"):
        place.parts()
    with pytest.raises(ValueError, match=r"two dimensions, not \[2, 8, 64\]"):
        Piece.of(pack(torch.zeros(2, 8, 64)).data)
    damaged = stored.clone()
    damaged[-1] ^= 1
    damaged[64] ^= 1
    with pytest.raises(ValueError):
        Piece.of(damaged)


def test_packed_matrices_are_told_by_their_first_bytes() -> None:
    stored, dense = matrix("same", 4, 64)
    values: tuple[Values, ...] = ("same", "int8", "int4")
    assert all(is_packed(pack(dense, each).data) for each in values)
    assert not is_packed(dense) and not is_packed(stored[1:]) and not is_packed(stored.view(1, -1))
    assert not is_packed(torch.zeros(3, dtype=torch.uint8))
