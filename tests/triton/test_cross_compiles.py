"""The cross product's kernels compiled for every GPU generation: no spills, and the tensor cores at work."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rac_kernels.ops import cross, hessian
from tests.triton.compiled import CAPABILITIES, SUMS, TYPES, check_parts, check_sums

INTEGERS = ("c_stride", "x_stride", "x_width", "y_stride", "y_width", "tokens", "n", "m", "down", "across")
KINDS = dict.fromkeys((*INTEGERS, "parts", "part_tokens"), "i32")
ALIGNED = ("C", "X", "x_stride", "x_width", "Y", "y_stride", "y_width")


@pytest.mark.parametrize(("capability", "launch"), SUMS)
def test_main_kernel(capability: int, launch: tuple[torch.dtype, bool, int]) -> None:
    kinds = KINDS | {"C": "*fp32", "X": f"*{TYPES[launch[0]]}", "Y": f"*{TYPES[launch[0]]}"}
    check_sums(capability, cross.cross_kernel, cross.GROUP, launch, "c_stride", kinds, ALIGNED)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", sorted({hessian.config(dtype, False, 80).block for dtype in TYPES}))
def test_parts_kernel(block: int, capability: int) -> None:
    constants: dict[str, object] = {"BLOCK": block, "ROWS": cross.PART_ROWS, "GROUP": cross.GROUP}
    check_parts(capability, cross.add_parts_kernel, constants, "C", KINDS)


@pytest.mark.parametrize("slots", [1, 2, 108, 132, 148])
@pytest.mark.parametrize("tokens", [1, 700, 8192, 131_072])
def test_split(tokens: int, slots: int) -> None:
    for tiles in (1, 2, 9, 100, 131, 132, 140, 784, 4144):
        parts = cross.split(tokens, tiles, slots)
        assert parts >= 1
        if parts > 1:
            assert tokens / parts >= 512
            assert tiles * parts <= 2 * slots  # memory


def test_split_fills_an_h200() -> None:
    """1536 x 256 outputs are 24 tiles for 132 multiprocessors."""
    assert cross.split(16_384, 24, 132) * 24 > 100
