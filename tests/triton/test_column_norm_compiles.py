"""The column norms' kernel compiled for every GPU generation: no spills, whole vectors loaded."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rac_kernels.ops import column_norm as op
from tests.triton.compiled import CAPABILITIES, compile_for


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("unit_stride", [True, False], ids=["rows", "a view"])
def test_kernel(unit_stride: bool, dtype: str, weighted: bool, capability: int) -> None:
    constants: dict[str, object] = {"WEIGHTED": weighted, "COLUMNS": op.COLUMNS, "STEP": op.STEP}
    integers = dict.fromkeys(("row_stride", "column_stride", "tokens", "n", "part_tokens"), "i32")
    found = compile_for(
        capability,
        op.column_norm_kernel,
        integers | {"partial": "*fp32", "X": f"*{dtype}", "weights": "*fp32"},
        constants | ({"column_stride": 1} if unit_stride else {}),
        ("partial", "X", "weights", "row_stride") if unit_stride else ("partial",),
        num_warps=4,
        enable_fp_fusion=True,
    )
    assert found.fits(128, op.WAVES, capability), found.usage()
