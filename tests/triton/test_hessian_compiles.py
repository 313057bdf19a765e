"""The Hessian's kernels compiled for every GPU generation: no spills, and the tensor cores at work."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rac_kernels import hessian
from tests.triton.compiled import CAPABILITIES, compile_for

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a program may have this much; for 80 what 86 and 89 have
INTEGERS = dict.fromkeys(("width", "tokens", "n", "side", "whole", "parts", "part_tokens"), "i32")


# dtype, weighted, H's row stride: 16 stands for its multiples, 1 for n = 1, 7 for all others.
LAUNCHES = [(dtype, weighted, 16) for dtype in TYPES for weighted in (False, True)]
LAUNCHES += [(torch.bfloat16, False, 1), (torch.bfloat16, False, 7)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "weighted", "h_stride"), LAUNCHES)
def test_main_kernel(dtype: torch.dtype, weighted: bool, h_stride: int, capability: int) -> None:
    chosen = hessian.config(dtype, weighted)
    constants: dict[str, object] = {"WEIGHTED": weighted, "BLOCK": chosen.block, "STEP": chosen.step}
    constants |= {"RUN": chosen.run, "GROUP": hessian.GROUP} | ({"h_stride": 1} if h_stride == 1 else {})
    aligned = ("H", "X", "row_stride", "width", "weights", "partial") + (("h_stride",) if h_stride == 16 else ())
    pointers = {"H": "*fp32", "X": f"*{TYPES[dtype]}", "weights": "*fp32", "partial": "*fp32"}
    found = compile_for(
        capability,
        hessian.hessian_kernel,
        INTEGERS | pointers | {"h_stride": "i32", "row_stride": "i32"},
        constants,
        aligned,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=True,
    )
    assert found.stack == 0
    assert found.shared * chosen.resident <= SHARED[capability]
    assert found.registers * chosen.warps * 32 * chosen.resident <= 65536
    assert found.tensor_core_instructions() >= chosen.step // 16
    if capability == 90:
        assert "wgmma.mma_async" in found.ptx and "mma.sync" not in found.ptx
    if dtype != torch.float32 and not weighted:
        assert "cp.async.cg.shared.global" in found.ptx  # whole vectors, straight into shared memory
        assert "tf32" not in found.ptx
    else:
        assert "tf32" in found.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", sorted({hessian.config(dtype, False).block for dtype in TYPES}))
def test_parts_kernel(block: int, capability: int) -> None:
    found = compile_for(
        capability,
        hessian.add_parts_kernel,
        INTEGERS | {"H": "*fp32", "h_stride": "i32", "partial": "*fp32"},
        {"BLOCK": block, "ROWS": hessian.PART_ROWS, "GROUP": hessian.GROUP},
        ("H", "h_stride", "partial"),
        num_warps=4,
        enable_fp_fusion=True,
    )
    assert found.stack == 0
    assert found.registers * 32 * 4 * 8 <= 65536  # eight programs on a multiprocessor: bound by memory


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
