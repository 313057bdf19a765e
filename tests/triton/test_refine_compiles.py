"""refine's kernel compiled for every GPU generation: no spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import sys

import rac_kernels  # noqa: F401 - the module, not the function of its name
from tests.triton.compiled import CAPABILITIES, compile_for

refine = sys.modules["rac_kernels.solvers.refine"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_step(capability: int) -> None:
    kinds = dict.fromkeys(("Q", "R", "P", "A", "inverse"), "*fp32") | {"mask": "*u8", "n": "i32"}
    kinds |= {"sizes": "*fp64", "done_at": "*fp64", "counts": "*i32", "left": "*i32"}
    found = compile_for(
        capability,
        refine.step_kernel,
        kinds,
        {"BLOCK": refine.BLOCK},
        tuple(name for name in kinds if name != "n"),
        num_warps=refine.WARPS,
        enable_fp_fusion=True,
    )
    assert found.fits(32 * refine.WARPS, 8, capability), found.usage()  # as many rows in flight
