"""The packed product's kernels compiled for every GPU generation: no spills, tensor cores at work, lean loops."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton

from rac_kernels.ops import packed_triton as op
from tests.triton.compiled import CAPABILITIES, TENSOR_CORES, Compiled, compile_for

TENSORS = {"X", "x_row", "table", "index", "mask", "words", "scales", "values", "bias", "out", "columns", "span"}
INTEGERS = ("x_row", "tokens", "rows", "columns", "row_words", "groups", "group_bits", "span", "count", "splits")
KINDS = dict.fromkeys(INTEGERS, "i32") | {"table": "*i32", "index": "*i32", "mask": "*i16", "words": "*i32"}


def compiled(capability: int, kernel: object, dtype: str, bits: int, warps: int, **constants: object) -> Compiled:
    """The kernel as launched, with bias."""
    kinds = KINDS | {"scales": "*bf16", "values": "*i32" if bits < 16 else f"*{dtype}"}
    kinds |= dict.fromkeys(("X", "bias", "out"), f"*{dtype}")
    constants |= {"BITS": bits, "WIDE": dtype == "fp32", "BIASED": True, "ASSEMBLED": True}
    aligned = tuple(name for name in kernel.arg_names if name in TENSORS)  # type: ignore[attr-defined]
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return compile_for(capability, kernel, kinds, constants, aligned, **options)


DECODE = [(90, "bf16", bits, tokens) for bits in (4, 8, 16) for tokens in (8, 16)]
DECODE += [(capability, "bf16", bits, 16) for capability in (80, 100) for bits in (4, 8, 16)]
DECODE += [(90, "fp16", bits, 16) for bits in (4, 8, 16)] + [(90, "fp32", bits, 16) for bits in (4, 32)]
#: Instructions a weight in the main loop, at most. POPC, which is slow, comes twice in 64 weights.
INSTRUCTIONS = {4: 7.6, 8: 9.6, 16: 12.8}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.parametrize(("capability", "dtype", "bits", "tokens"), DECODE)
def test_decode(capability: int, dtype: str, bits: int, tokens: int) -> None:
    """Two programs on a multiprocessor; in the loop no barrier and nothing in shared memory."""
    tile = {"ROW_WARPS": op.ROW_WARPS, "PARTS": op.PARTS, "TOKENS": tokens}
    warps = op.ROW_WARPS * op.PARTS
    found = compiled(capability, op.decode_kernel, dtype, bits, warps, **tile)
    older = TRITON < (3, 9) and capability == 100  # takes a few registers more there, and spills two of int8's
    together = 1 if dtype == "fp32" or older else 2
    assert found.fits(32 * warps, together, capability) or (older and found.stack <= 8), found.usage()
    assert found.tensor_cores() == "mma.sync"
    loop = found.main_loop()
    if dtype != "fp32" and TRITON >= (3, 7):  # 3.6 moves weights through shared memory
        kinds = {instruction.split(".")[0] for instruction in loop}
        assert "HMMA" in kinds and not kinds & {"BAR", "STS", "LDS", "LDSM", "STSM", "ATOMS"}
        most = 64 * INSTRUCTIONS[bits] * (1 if TRITON >= (3, 9) else 1.5)
        assert len(loop) <= most, f"{len(loop) / 64:.2f} instructions a weight"
        assert any(instruction.startswith("LDG.E.128") for instruction in loop)  # whole vectors of X


PREFILL = [(90, "bf16", bits, tokens) for bits in (4, 8, 16) for tokens in (64, 512)]
PREFILL += [(capability, "bf16", bits, 512) for capability in (80, 100) for bits in (4, 16)]
PREFILL += [(90, "fp32", bits, 64) for bits in (4, 32)] + [(80, "fp32", 4, 64)]


@pytest.mark.parametrize(("capability", "dtype", "bits", "tokens"), PREFILL)
def test_prefill(capability: int, dtype: str, bits: int, tokens: int) -> None:
    tile = op.prefill_tile(tokens, bits, dtype == "fp32", capability)
    sizes = {"ROWS": tile.rows, "TOKENS": tile.tokens}
    found = compiled(capability, op.prefill_kernel, dtype, bits, tile.warps, **sizes)
    assert found.fits(32 * tile.warps, 2 if tile.warps == 4 else 1, capability), found.usage()
    if dtype != "fp32":
        assert found.tensor_cores() == TENSOR_CORES[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_of_splits(capability: int) -> None:
    kinds = KINDS | {"partial": "*fp32", "bias": "*bf16", "out": "*bf16"}
    constants: dict[str, object] = {"BIASED": True, "BLOCK": op.ADDED}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    found = compile_for(capability, op.add_splits_kernel, kinds, constants, ("partial", "bias", "out"), **options)
    assert found.fits(128, 8, capability), found.usage()


@pytest.mark.parametrize("slots", [4, 216, 264, 296])
@pytest.mark.parametrize("columns", [1, 128, 3584, 18_944, 100_000])
def test_every_column_is_in_one_split(columns: int, slots: int) -> None:
    for rows in (1, 512, 3584, 18_944):
        splits, span = op.split_columns(rows, columns, slots)
        assert span % op.STEP == 0 and (splits - 1) * op.PARTS * span < columns <= splits * op.PARTS * span
        assert splits == 1 or (-(-rows // 32) * splits <= slots and op.workspace(16, rows, columns, slots))
