"""Factor's and sweep's kernels compiled for every GPU generation, in every configuration launched: no spills."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.triton.compiled import CAPABILITIES, SHARED, Compiled, compile_for

# The packages' names are the functions.
factor, product, select, sweep = (
    importlib.import_module(f"rac_kernels.{name}") for name in ["factor", "product", "select", "sweep"]
)

FLOATS = ["A", "B", "D", "H", "Q", "U", "inverse", "inverses", "out", "pulls", "scales", "scores", "thresholds"]
#: What sizes and strides are multiples of 16: all for most models; a block size of 60 leaves lo; odd n leaves none.
STRIDES = ("u_row", "h_row", "a_row", "b_row", "b_column", "u_matrix", "h_matrix", "a_matrix", "b_matrix")
ALIGNED = {"whole": ("n", "lo", *STRIDES), "odd block": ("n", "u_row", "u_matrix"), "odd": ()}


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=ALIGNED)
def aligned(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ALIGNED[request.param]


def compiled(
    capability: int, kernel: Any, aligned: tuple[str, ...], warps: int = 4, stages: int = 3, **constants: object
) -> Compiled:
    kinds = dict.fromkeys(FLOATS, "*fp32") | {"state": "*i32", "group_of_row": "*i32"}
    kinds |= dict.fromkeys(("groups", "last", "first_rows"), "*i64") | {"mask": "*i1"}
    arguments = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    multiples = tuple(name for name in arguments if name in aligned or name in kinds)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    found = compile_for(capability, kernel, arguments, constants, multiples, **options)
    assert found.stack == 0
    assert found.registers * warps * 32 <= 65536
    assert found.shared <= SHARED[capability]
    return found


@pytest.mark.parametrize("transposed", [False, True])
def test_product(capability, aligned, transposed):
    found = compiled(
        capability,
        product.product_kernel,
        aligned,
        product.WARPS_TRANSPOSED if transposed else product.WARPS,
        product.STAGES,
        ROWS=product.ROWS,
        COLUMNS=product.COLUMNS,
        STEP=product.STEP,
        **{"b_row" if transposed else "b_column": 1},
    )
    assert found.tensor_core_instructions() >= 6 and "tf32" in found.ptx and "cp.async" in found.ptx
    assert capability != 90 or ("wgmma.mma_async" in found.ptx and "mma.sync" not in found.ptx)


@pytest.mark.parametrize("unit", [False, True])
def test_invert(capability, aligned, unit):
    compiled(capability, product.invert_kernel, aligned, UNIT=unit, COLUMNS=product.COLUMNS, PART=product.INVERTED)


def test_corner(capability, aligned):
    compiled(capability, factor.corner_kernel, aligned, factor.CORNER_WARPS, COLUMNS=product.COLUMNS)


def block(capability: int, kernel: Any, aligned: tuple[str, ...], tile: dict[str, int], **constants: Any) -> Compiled:
    """A kernel that holds `tile` of a block."""
    sizes = {name: size for name, size in tile.items() if name != "num_warps"}
    return compiled(capability, kernel, aligned, tile["num_warps"], COLUMNS=product.COLUMNS, **sizes, **constants)


def test_panel(capability, aligned):
    found = block(capability, factor.panel_kernel, aligned, factor.PANEL)
    assert found.tensor_core_instructions() and "tf32" in found.ptx


def test_scores(capability, aligned):
    found = block(capability, sweep.score_kernel, aligned, sweep.TILE, STEP=sweep.STEP)
    assert found.tensor_core_instructions() and "tf32" in found.ptx


def test_threshold_walk(capability, aligned):
    block(capability, sweep.threshold_kernel, aligned, sweep.WALK)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3), (8, 16)], ids=str)
def test_pattern_walk(capability, aligned, pattern):
    keep, group = pattern
    found = block(capability, sweep.pattern_kernel, aligned, sweep.TILE, STEP=sweep.STEP, KEEP=keep, GROUP=group)
    assert found.tensor_core_instructions() and "tf32" in found.ptx


def test_selection(capability):
    sizes = {"BINS": select.BINS, "STEP": select.COUNTED}
    for level in range(select.LEVELS):
        compiled(
            capability,
            select.count_kernel,
            (),
            select.WARPS,
            LEVEL=level,
            STEPS=select.PROGRAM_SCORES // select.COUNTED,
            **sizes,
        )
    compiled(capability, select.resolve_kernel, (), select.WARPS, **sizes)
    compiled(capability, select.mark_kernel, (), STEP=select.MARKED)
    compiled(capability, select.mark_rows_kernel, (), BINS=select.ROW_BINS, STEP=select.MARKED)


@pytest.mark.parametrize("rows", [1, 128, 3584, 18944])
@pytest.mark.parametrize("depth", [1, 128, 3000, 18816])
def test_parts(rows, depth):
    tiles = -(-rows // product.ROWS)
    count, each = product.parts(tiles, depth)
    assert each % product.STEP == 0 and (count - 1) * each < depth <= count * each
    assert each <= max(product.PART_DEPTH, depth // count + product.STEP)
    assert count == 1 or each >= 200
    assert count * tiles <= max(2 * product.PROGRAMS, tiles * -(-depth // product.PART_DEPTH))  # memory
