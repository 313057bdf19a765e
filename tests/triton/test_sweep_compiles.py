"""Factor's and sweep's kernels compiled for every GPU generation, in every configuration launched: no spills."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.triton.compiled import CAPABILITIES, TENSOR_CORES, Compiled, compile_for, copies

# The packages' names are the functions.
factor, product, select, sweep = (
    importlib.import_module(f"rac_kernels.ops.{name}") for name in ["factor", "product", "select", "sweep"]
)

FLOATS = ["A", "B", "D", "H", "Q", "U", "inverse", "inverses", "out", "pulls", "scales", "scores", "thresholds"]
KINDS = dict.fromkeys(FLOATS, "*fp32") | {"state": "*i32", "group_of_row": "*i32", "mask": "*i1"}
KINDS |= dict.fromkeys(("groups", "last", "first_rows"), "*i64")
STRIDES = ("u_row", "h_row", "a_row", "b_row", "b_column", "u_matrix", "h_matrix", "a_matrix", "b_matrix")
CALLERS = ("A", "B", "H", "U", "scores")  # tensors that may be views, which begin anywhere; the others are made here
#: What is known to be a multiple of 16, beside where the tensors made here begin: everything for most models; a block
#: size of 60 leaves lo; an odd n leaves no size or stride; of a view of odd strides nothing is known at all.
ALIGNED = {"whole": ("n", "lo", *STRIDES, *CALLERS), "odd block": ("n", *STRIDES, *CALLERS), "odd": CALLERS, "view": ()}

#: What multiplies a step of 16 columns three times, in how many instructions a warp of four, and the barriers beside
#: them at most: Triton waits for each of Blackwell's products by itself.
PRODUCTS = {80: ("HMMA", 96, 2), 90: ("HGMMA", 6, 2), 100: ("UTCHMMA", 4, 18), 120: ("HMMA", 96, 2)}


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


def variants(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test by some of ALIGNED."""
    return pytest.mark.parametrize("aligned", [ALIGNED[name] for name in names], ids=names)


def compiled(
    capability: int,
    kernel: Any,
    aligned: tuple[str, ...],
    warps: int = 4,
    stages: int = 3,
    *,
    programs: int,
    registers: int = 255,
    **constants: object,
) -> Compiled:
    """The kernel as launched; so many programs must share a multiprocessor and have no more than these registers."""
    arguments = {name: KINDS.get(name, "i32") for name in kernel.arg_names if name not in constants}
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    multiples = [name for name in arguments if name in aligned or (name in KINDS and name not in CALLERS)]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    known = tuple(name for name in multiples if name not in fixed)
    found = compile_for(capability, kernel, arguments, constants, known, **options)
    assert found.fits(warps * 32, programs, capability) and found.registers <= registers, found.usage()
    return found


@pytest.mark.parametrize("capability", PRODUCTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("aligned", "whole"), [("whole", True), ("view", False)])
def test_product(capability, aligned, whole, transposed):
    warps = product.warps(transposed, whole, capability)
    found = compiled(
        capability,
        product.product_kernel,
        ALIGNED[aligned],
        warps,
        product.STAGES,
        programs=1 if warps == product.WARPS_SPILLING else 2,
        registers=192 if warps == product.WARPS_SPILLING else 248 if transposed else 240,
        ROWS=product.ROWS,
        COLUMNS=product.COLUMNS,
        STEP=product.STEP,
        WHOLE=whole,
        **{"b_row" if transposed else "b_column": 1},
    )
    assert found.tensor_cores() == TENSOR_CORES[capability] and "tf32" in found.ptx and "cp.async" in found.ptx
    # The sums stay where they are while a step is done, and copies are of whole vectors where all is aligned.
    assert not found.conversions((product.ROWS, product.COLUMNS))
    loop = found.main_loop()
    assert set(copies(loop)) == ({16} if whole else {4})
    name, count, barriers = PRODUCTS[capability]
    count = count * product.WARPS // warps if name == "HMMA" else count
    assert sum(instruction.startswith(name) for instruction in loop) == count
    assert sum(instruction.startswith("BAR") for instruction in loop) <= barriers
    assert sum(instruction.startswith("DEPBAR") for instruction in loop) == 1  # one wait for copies a step


@pytest.mark.parametrize("unit", [False, True])
@variants("whole", "view")
def test_invert(capability, aligned, unit):
    sizes = {"COLUMNS": product.COLUMNS, "PART": product.INVERTED}
    compiled(capability, product.invert_kernel, aligned, UNIT=unit, programs=4, **sizes)


@variants("whole", "view")
def test_corner(capability, aligned):
    """A matrix has one at a time, so what counts is that all of it is held in registers."""
    options = {"programs": 1, "registers": 224}
    compiled(capability, factor.corner_kernel, aligned, factor.CORNER_WARPS, COLUMNS=product.COLUMNS, **options)


def block(capability: int, kernel: Any, aligned: tuple[str, ...], tile: dict[str, int], **options: Any) -> Compiled:
    """A kernel that holds `tile` of a block."""
    sizes = {name: size for name, size in tile.items() if name != "num_warps"}
    return compiled(capability, kernel, aligned, tile["num_warps"], COLUMNS=product.COLUMNS, **sizes, **options)


@variants("whole", "odd", "view")
def test_panel(capability, aligned):
    found = block(capability, factor.panel_kernel, aligned, factor.PANEL, programs=2)
    assert found.tensor_cores() == "mma.sync" and "tf32" in found.ptx  # of 32 rows


@variants("whole", "odd block", "odd")
def test_scores(capability, aligned):
    options = {"STEP": sweep.STEP, "programs": 1, "registers": 192}
    found = block(capability, sweep.score_kernel, aligned, sweep.TILE, **options)
    assert found.tensor_cores() == "mma.sync" and "tf32" in found.ptx


@variants("whole", "odd block", "odd")
def test_threshold_walk(capability, aligned):
    block(capability, sweep.threshold_kernel, aligned, sweep.WALK, programs=3 if "lo" in aligned else 2)


@pytest.mark.parametrize(
    ("pattern", "aligned"),
    [((2, 4), "whole"), ((2, 4), "odd block"), ((4, 8), "whole"), ((1, 3), "odd"), ((8, 16), "whole")],
    ids=str,
)
def test_pattern_walk(capability, aligned, pattern):
    keep, group = pattern
    own = {"STEP": sweep.STEP, "KEEP": keep, "GROUP": group, "programs": 1, "registers": 224}
    found = block(capability, sweep.pattern_kernel, ALIGNED[aligned], sweep.TILE, **own)
    assert found.tensor_cores() == "mma.sync" and "tf32" in found.ptx


@pytest.mark.parametrize("level", range(select.LEVELS))
def test_counts(capability, level):
    sizes = {"BINS": select.BINS, "STEP": select.COUNTED, "STEPS": select.PROGRAM_SCORES // select.COUNTED}
    compiled(capability, select.count_kernel, (), select.WARPS, programs=1, registers=184, LEVEL=level, **sizes)


def test_selection(capability):
    sizes = {"BINS": select.BINS, "STEP": select.COUNTED}
    compiled(capability, select.resolve_kernel, (), select.WARPS, programs=2, **sizes)
    for aligned in (ALIGNED["odd"], ()):
        compiled(capability, select.mark_kernel, aligned, programs=8, STEP=select.MARKED)
        sizes = {"BINS": select.ROW_BINS, "STEP": select.MARKED}
        compiled(capability, select.mark_rows_kernel, aligned, programs=6, **sizes)


@pytest.mark.parametrize("rows", [1, 128, 3584, 18944])
@pytest.mark.parametrize("depth", [1, 128, 3000, 18816])
def test_parts(rows, depth):
    tiles = -(-rows // product.ROWS)
    count, each = product.parts(tiles, depth)
    assert each % product.STEP == 0 and (count - 1) * each < depth <= count * each
    assert each <= max(product.PART_DEPTH, depth // count + product.STEP)
    assert count == 1 or each >= 200
    assert count * tiles <= max(2 * product.PROGRAMS, tiles * -(-depth // product.PART_DEPTH))  # memory
