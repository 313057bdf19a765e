"""The cross product's kernels compiled for every GPU generation: no spills, and the tensor cores at work."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rac_kernels import cross, hessian
from tests.triton.compiled import CAPABILITIES, compile_for

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a program may have this much; for 80 what 86 and 89 have
INTEGERS = ("c_stride", "x_stride", "x_width", "y_stride", "y_width", "tokens", "n", "m", "down", "across")
KINDS = dict.fromkeys((*INTEGERS, "parts", "part_tokens"), "i32")
ALIGNED = ("C", "X", "x_stride", "x_width", "Y", "y_stride", "y_width", "weights", "partial")
# dtype, weighted, C's row stride: 16 stands for its multiples, 1 for m = 1, 7 for all others.
LAUNCHES = [(dtype, weighted, 16) for dtype in TYPES for weighted in (False, True)]
LAUNCHES += [(torch.bfloat16, False, 1), (torch.bfloat16, False, 7)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "weighted", "c_stride"), LAUNCHES)
def test_main_kernel(dtype: torch.dtype, weighted: bool, c_stride: int, capability: int) -> None:
    chosen = hessian.config(dtype, weighted)
    constants: dict[str, object] = {"WEIGHTED": weighted, "BLOCK": chosen.block, "STEP": chosen.step}
    constants |= {"RUN": chosen.run, "GROUP": cross.GROUP} | ({"c_stride": 1} if c_stride == 1 else {})
    pointers = {"C": "*fp32", "X": f"*{TYPES[dtype]}", "Y": f"*{TYPES[dtype]}", "weights": "*fp32", "partial": "*fp32"}
    found = compile_for(
        capability,
        cross.cross_kernel,
        KINDS | pointers,
        constants,
        ALIGNED + (("c_stride",) if c_stride == 16 else ()),
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
        cross.add_parts_kernel,
        KINDS | {"C": "*fp32", "partial": "*fp32"},
        {"BLOCK": block, "ROWS": cross.PART_ROWS, "GROUP": cross.GROUP},
        ("C", "c_stride", "partial"),
        num_warps=4,
        enable_fp_fusion=True,
    )
    assert found.stack == 0
    assert found.registers * 32 * 4 * 8 <= 65536  # eight programs on a multiprocessor: bound by memory


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
