"""The Hessian's kernels compiled for every GPU generation: no spills, and the tensor cores at work."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rac_kernels.ops import hessian
from tests.triton.compiled import CAPABILITIES, SUMS, TYPES, check_parts, check_sums

INTEGERS = ("h_stride", "row_stride", "width", "tokens", "n", "side", "whole", "parts", "part_tokens")
KINDS = dict.fromkeys(INTEGERS, "i32")


@pytest.mark.parametrize(("capability", "launch"), SUMS)
def test_main_kernel(capability: int, launch: tuple[torch.dtype, bool, int]) -> None:
    kinds = KINDS | {"H": "*fp32", "X": f"*{TYPES[launch[0]]}"}
    aligned = ("H", "X", "row_stride", "width")
    check_sums(capability, hessian.hessian_kernel, hessian.GROUP, launch, "h_stride", kinds, aligned)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", sorted({hessian.config(dtype, False, 80).block for dtype in TYPES}))
def test_parts_kernel(block: int, capability: int) -> None:
    constants: dict[str, object] = {"BLOCK": block, "ROWS": hessian.PART_ROWS, "GROUP": hessian.GROUP}
    check_parts(capability, hessian.add_parts_kernel, constants, "H", KINDS)


@pytest.mark.parametrize("slots", [1, 2, 108, 132, 148])
@pytest.mark.parametrize("tokens", [1, 700, 8192, 131_072])
def test_split(tokens: int, slots: int) -> None:
    for side in (1, 2, 5, 12, 28, 64, 148):
        tiles = side * (side + 1) // 2
        whole, parts = hessian.split(tokens, tiles, slots)
        rest = tiles - whole
        assert rest >= 0 and parts >= 1 and (parts > 1 or rest == 0)
        if rest:
            assert whole % slots == 0 and rest < slots
            assert rest * parts <= 4 * slots  # memory
            assert tokens / parts >= 512


def test_split_fills_an_h200() -> None:
    """n = 3584: 406 tiles on 132 multiprocessors are three waves and ten tiles over."""
    whole, parts = hessian.split(8192, 406, 132)
    assert whole == 396 and 10 * parts > 100
