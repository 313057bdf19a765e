from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rac_kernels import Packed, Values, join_rows, pack, packed_group, packed_size, unpack
from rac_kernels.ops import packed as module
from rac_kernels.ops.packed import DTYPES, VALUES, PackedLayout

SHAPES = [(1, 1), (1, 64), (5, 1), (3, 65), (7, 63), (4, 130), (2, 3, 70), (1, 9, 64), (0, 8), (3, 0), (6, 1000)]


def some(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.5, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)
    if W.numel() and len(W.shape) == 2:
        W[len(W) // 2] = 0
    return W.to(dtype) + 0.0


def bits(W: Tensor) -> Tensor:
    return W.contiguous().view({2: torch.int16, 4: torch.int32}[W.dtype.itemsize])


def by_the_specification(data: bytes) -> list[list[float]]:
    """All rows of a packed matrix, read number by number."""
    magic, version, dtype, kind, E, rows, columns, group, kept = struct.unpack_from("<8sHBBIIIIQ", data)
    assert magic == b"RACPACK\0" and version == 1 and not any(data[36:64])
    rows *= max(E, 1)
    words, groups = (columns + 63) // 64, (columns + group - 1) // group if group else 0

    def after(at: int) -> int:
        return (at + 63) // 64 * 64

    mask_at = after(64 + 4 * (rows + 1))
    scales_at = after(mask_at + 8 * rows * words)
    values_at = after(scales_at + 2 * rows * groups)
    index = struct.unpack_from(f"<{rows + 1}I", data, 64)
    found, count = [], 0
    for row in range(rows):
        line, at = [0.0] * columns, 0
        for column in range(columns):
            (word,) = struct.unpack_from("<Q", data, mask_at + 8 * (row * words + column // 64))
            if not word >> column % 64 & 1:
                continue
            begin = values_at + 4 * index[row]
            if kind == 0:
                raw = data[begin + at * (4 if dtype == 2 else 2) :][: 4 if dtype == 2 else 2]
                line[column] = float(torch.tensor(list(raw), dtype=torch.uint8).view(DTYPES[dtype]))
            else:
                code = data[begin + at] if kind == 1 else data[begin + at // 2] >> 4 * (at % 2) & 15
                code -= (256 if kind == 1 else 16) * (code > (127 if kind == 1 else 7))
                raw = data[scales_at + 2 * (row * groups + column // group) :][:2]
                scale = torch.tensor(list(raw), dtype=torch.uint8).view(torch.bfloat16).float()
                line[column] = float((scale * code).to(DTYPES[dtype]))
            at, count = at + 1, count + 1
        found.append(line)
    assert count == kept
    assert len(data) == after(values_at + 4 * index[-1]) + 64
    return found


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_bytes_are_as_the_format_says(dtype: torch.dtype, values: Values) -> None:
    W = some((2, 3, 70), dtype)
    made = pack(W, values)
    dense = unpack(made)
    assert by_the_specification(bytes(made.data.tolist())) == dense.view(6, 70).tolist()
    assert torch.equal(dense != 0, W != 0) or values != "same"
    if values == "same":
        assert torch.equal(dense, W)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_comes_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for density in (0.0, 0.4, 1.0):
        W = some(shape, dtype, density)
        W.view(-1)[::7] = -0.0
        W.view(-1)[3:5] = torch.nan
        made = pack(W)
        again = Packed.from_tensor(made.data.clone())
        assert again.layout == made.layout
        assert torch.equal(bits(unpack(again)), bits(W))
        assert len(made.data) == made.layout.size <= packed_size(shape, made.layout.kept, dtype)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_grid_is_found_again(shape: tuple[int, ...], dtype: torch.dtype, values: Values) -> None:
    """With scales of any size, and also where the largest code does not occur."""
    W = some(shape, torch.float32)
    rows, columns = W.shape[:-1].numel(), W.shape[-1]
    g = torch.Generator().manual_seed(1)
    scales = (torch.rand(rows, -(-columns // 64), generator=g) * 1e-3 + 1e-5).bfloat16()
    top = torch.randint(1, module.LARGEST[values] + 1, (rows, -(-columns // 64)), generator=g)
    top = top.repeat_interleave(64, 1)[:, :columns].reshape(shape)
    each = scales.float().repeat_interleave(64, 1)[:, :columns].reshape(shape)
    W = ((W.sign() * (torch.rand(shape, generator=g) * top).ceil()) * each).to(dtype)
    made = pack(W, values, group=64)
    assert torch.equal(bits(unpack(Packed.from_tensor(made.data))), bits(W + 0.0))
    given = pack(W, values, scales=scales.float(), group=64)
    assert torch.equal(bits(unpack(Packed.from_tensor(given.data))), bits(W + 0.0))
    assert torch.equal(given.scales != 0, made.scales != 0)


def test_a_grid_of_a_neighbouring_width_is_found() -> None:
    """Codes of 0 make the density smaller than the one by which the columns of a scale were chosen."""
    g = torch.Generator().manual_seed(0)
    for density, width in ((0.32, 64), (0.36, 128)):
        assert packed_group(512, density) != width
        codes = torch.randint(-7, 8, (64, 512), generator=g) * (torch.rand(64, 512, generator=g) < density / 14 * 15)
        scales = (torch.rand(64, 512 // width, generator=g) + 0.01).bfloat16().float().repeat_interleave(width, 1)
        W = (codes * scales).bfloat16()
        made = pack(W, "int4")
        assert made.layout.group == width and torch.equal(unpack(made), W)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rounding_is_no_worse_than_by_the_largest_magnitude(values: Values) -> None:
    W = some((33, 500), torch.bfloat16)
    made = pack(W, values)
    wide = module._grouped(W, made.layout.group)
    plain = wide.abs().amax(-1, keepdim=True) / module.LARGEST[values]
    plain = torch.where(plain > 0, (wide / plain).round() * plain, wide).flatten(1)[:, :500].bfloat16()
    error, usual = (float((Q.float() - W.float()).norm()) for Q in (unpack(made), plain))
    assert error <= usual * 1.01
    assert error < (0.1 if values == "int4" else 0.01) * float(W.float().norm())
    assert not unpack(made)[W == 0].any()


def test_edges_of_the_dtype_remain_finite() -> None:
    for dtype in DTYPES:
        W = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
        W[1] = torch.finfo(dtype).tiny
        W[1, ::2] = 0
        for values in VALUES:
            dense = unpack(Packed.from_tensor(pack(W, values).data)).float()
            assert dense.isfinite().all()
            assert ((dense - W.float()).abs() <= 0.02 * W.float()).all(), (dtype, values)


@pytest.mark.parametrize("values", VALUES)
def test_parts_are_what_packing_the_parts_gives(values: Values) -> None:
    whole = unpack(pack(some((3, 10, 300), torch.bfloat16), values, 64 if values != "same" else None))
    group = None if values == "same" else 64
    made = pack(whole, values, group)

    def check(part: Packed, wanted: Tensor) -> None:
        assert torch.equal(unpack(Packed.from_tensor(part.data)), wanted)
        assert part.layout.size == pack(wanted.contiguous(), values, group).layout.size

    check(made.matrices(1, 3), whole[1:3])
    check(made.rows(3, 8), whole[:, 3:8])
    check(made.columns(64, 200), whole[..., 64:200])
    check(made.columns(128, 300), whole[..., 128:])
    one = pack(whole[0], values, group)
    check(one.rows(2, 9), whole[0, 2:9])
    check(one.rows(4, 4), whole[0, 4:4])
    check(join_rows([one.rows(0, 3), one.rows(3, 10), one.rows(9, 10)]), torch.cat((whole[0], whole[0, 9:])))
    for wrong in ((-1, 2), (2, 11), (3, 2)):
        with pytest.raises(ValueError, match="rows"):
            one.rows(*wrong)
    with pytest.raises(ValueError, match="columns"):
        one.columns(0, 301)
    with pytest.raises(ValueError, match="differ"):
        join_rows([one, one.columns(0, 64)])


def test_columns_and_rows_of_any_stride() -> None:
    W = some((64, 130), torch.bfloat16)
    assert torch.equal(unpack(pack(W.T)), W.T)
    assert torch.equal(unpack(pack(W[::2, 1:])), W[::2, 1:])
    data = pack(W).data
    shifted = torch.cat((data[:3], data))[3:]
    assert torch.equal(unpack(Packed.from_tensor(shifted)), W)
    out = torch.full((64, 130), torch.nan, dtype=torch.bfloat16)
    assert unpack(pack(W), out) is out and torch.equal(out, W)


def test_many_blocks_of_rows_are_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    W = some((50, 90), torch.bfloat16)
    wanted = {values: pack(W, values).data for values in VALUES}
    monkeypatch.setattr(module, "_BLOCK", 270)
    for values in VALUES:
        made = pack(W, values)
        assert torch.equal(made.data, wanted[values])
        assert torch.equal(unpack(Packed.from_tensor(made.data)), unpack(Packed(wanted[values], made.layout)))


def test_columns_a_scale() -> None:
    found = [packed_group(4096, density) for density in (1.0, 0.5, 0.3, 0.25, 0.2, 0.1)]
    assert found == [64, 64, 128, 128, 128, 256]
    assert packed_group(100, 0.05) == 128
    assert packed_group(3584, 0.005) == 4096


def broken(change: str) -> Tensor:
    """A packed matrix that contradicts itself somewhere."""
    kind: Values = "same" if change.startswith("same") else "int8" if change.startswith("int8") else "int4"
    W = some((6, 70), torch.bfloat16)
    W[0, :3] = 1
    W[0, 3:] = 0
    made = pack(W, kind)
    layout, data = made.layout, made.data
    if change == "magic":
        data[0] = 0
    elif change == "version":
        data[8] = 2
    elif change == "dtype":
        data[10] = 9
    elif change == "values":
        data[11] = 3
    elif change == "rows":
        data[16] = 7
    elif change == "huge":
        data[12:24] = 255
    elif change == "columns":
        data[20] = 129
    elif change == "columns, fewer":
        data[20] = 69
    elif change == "group":
        data[24] = 63
    elif change == "no group":
        data[24] = 0
    elif change == "same, with a group":
        data[24] = 64
    elif change == "kept":
        data[28] += 1
    elif change == "header":
        data[40] = 1
    elif change == "short":
        return data[:-64]
    elif change == "long":
        return torch.cat((data, data[-64:]))
    elif change == "tiny":
        return data[:10]
    elif change == "dimensions":
        return data.view(1, -1)
    elif change == "bytes":
        return data.view(torch.int8)
    elif change == "index":
        made.row_index[2] += 1
    elif change == "index, begin":
        made.row_index[:3] += 1
    elif change == "index, end":
        made.row_index[-1] = -1
    elif change == "mask":
        made.mask[1, 0] ^= 1
    elif change == "mask, moved":
        made.mask[[1, 2]] = made.mask[[2, 1]]
    elif change == "mask, beyond":
        made.mask[1, 1] |= 1 << 60
    elif change == "scales":
        made.scales[1, 0] = torch.nan
    elif change == "scales, negative":
        made.scales[1, 0] *= -1
    elif change == "scales, of nothing":
        made.scales[0, 1] = 1
    elif change == "int4 of -8":
        made.codes[0] = 0x78
    elif change == "int8 of -128":
        made.codes[0] = 0x80
    elif change in ("same, fill", "int8, fill", "int4, fill"):
        made.codes[4 * int(made.row_index[1]) - 1] |= 0x10
    elif change == "between":
        data[layout.mask_at - 1] = 1
    elif change == "end":
        data[-1] = 1
    return data


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("magic", "does not begin"),
        ("version", "version 2; this release knows version 1"),
        ("dtype", "do not exist"),
        ("values", "do not exist"),
        ("rows", "bytes|contradicts|zero|mask"),
        ("huge", "its header asks for|it keeps"),
        ("columns", "header and row index ask for 576"),
        ("columns, fewer", "beyond column 69"),
        ("group", "63 columns"),
        ("no group", "0 columns"),
        ("same, with a group", "64 columns"),
        ("kept", "its header says"),
        ("header", "end in zeros"),
        ("short", "bytes"),
        ("long", "bytes"),
        ("tiny", "does not begin"),
        ("dimensions", "of 2 dimensions"),
        ("bytes", "int8"),
        ("index", "contradicts its mask at row 1"),
        ("index, begin", "row index"),
        ("index, end", "8 GiB"),
        ("mask", "header says|contradicts"),
        ("mask, moved", "contradicts|fills up"),
        ("mask, beyond", "beyond column 70"),
        ("scales", "finite and positive"),
        ("scales, negative", "finite and positive"),
        ("scales, of nothing", "nothing is kept"),
        ("int4 of -8", "below -7"),
        ("int8 of -128", "below -127"),
        ("same, fill", "fills up"),
        ("int8, fill", "fills up"),
        ("int4, fill", "fills up"),
        ("between", "between its parts"),
        ("end", "between its parts"),
    ],
)
def test_what_contradicts_itself_is_refused(change: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        Packed.from_tensor(broken(change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("values", VALUES)
def test_damaged_bytes_are_refused_or_harmless(values: Values) -> None:
    """Whatever passes the checks can be unpacked, and packing it again gives the numbers."""
    dice = random.Random(0)
    whole = pack(some((5, 70), torch.bfloat16), values)
    passed = 0
    for _ in range(150):
        data = whole.data.clone()
        for _ in range(dice.choice((1, 1, 3))):
            data[dice.randrange(dice.choice((64, len(data))))] = dice.randrange(256)
        try:
            found = Packed.from_tensor(data)
        except ValueError:
            continue
        passed += 1
        unpack(found)
    assert 0 < passed < 75


def test_what_cannot_be_packed() -> None:
    W = some((4, 70), torch.bfloat16)
    for wrong, told in ((W.double(), "float64"), (W[0], "cannot be packed"), (W.view(1, 2, 2, 70), "cannot be packed")):
        with pytest.raises(ValueError, match=told):
            pack(wrong)
    with pytest.raises(ValueError, match="columns a scale"):
        pack(W, "int4", group=96)
    with pytest.raises(ValueError, match="scales"):
        pack(W, "int4", group=64, scales=torch.ones(4, 3))
    with pytest.raises(ValueError, match="scales"):
        pack(W, "int4", group=64, scales=torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="out is"):
        unpack(pack(W), torch.empty(4, 71, dtype=torch.bfloat16))
    W[1, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        pack(W, "int8")


def test_a_layout_follows_from_its_header() -> None:
    made = pack(some((2, 5, 70), torch.float16), "int8")
    assert replace(PackedLayout.from_header(made.layout.header()), value_bytes=made.layout.value_bytes) == made.layout
    assert made.layout.dense_size == 2 * 5 * 70 * 2
    assert made.to("cpu").layout == made.layout
