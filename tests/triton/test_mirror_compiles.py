"""The mirror's kernel compiled for every GPU generation: no spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rac_kernels.ops import mirror
from tests.triton.compiled import CAPABILITIES, compile_for


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_mirror(aligned: bool, down: bool, capability: int) -> None:
    found = compile_for(
        capability,
        mirror.mirror_kernel,
        {"H": "*fp32", "h_matrix": "i32", "h_row": "i32", "spoilt": "*i32", "n": "i32"},
        {"DOWN": down, "BLOCK": mirror.BLOCK},
        ("spoilt", *(("H", "h_matrix", "h_row") if aligned else ())),
        num_warps=mirror.WARPS,
        enable_fp_fusion=True,
    )
    assert found.fits(32 * mirror.WARPS, 4, capability), found.usage()
