"""The product with a packed matrix on a GPU: `decode_kernel` for few tokens and `prefill_kernel` for many.

Only mask, values and scales are read. A thread takes 16 columns of each of two neighbouring words of a row's mask;
where the values of each 8 columns begin is a prefix of popcounts, over the words of a tile and the tiles before it.
Codes are then loaded by unaligned windows of 8, two or three words shifted into place, and go to their columns in
registers, by a byte permutation from a table of 256. Values of the dense dtype are gathered one by one.

For few tokens the order of the columns in a product is free, so they are dealt to threads such that what a thread
expands is what the tensor cores want it to hold: no weight goes through shared memory, no thread waits for another.
Codes are not converted either: 4 bits become the mantissa of 16 + 8 + code, and what is too much, 24 Σx, is taken off
by one more product, with a constant matrix. Warps share a row: each counts the values of its part of the columns first.
With few rows, programs share them too (split K); their fp32 sums are added by a second kernel in fixed order.

For many tokens a tile of weights is expanded to numbers and multiplied densely. No dense copy of a matrix is made.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rac_kernels.backends import gpu
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.hessian import aligned
from rac_kernels.ops.packed import Packed

libdevice: Any = importlib.import_module("triton.language.extra.libdevice") if gpu.LOADED else None

STEP = 128  # columns of a tile: two words of the mask

ASSEMBLED = not gpu.INTERPRETED and torch.version.hip is None
"""Whether bytes are permuted by NVIDIA's instruction."""


@gpu.jit()
def permuted_bytes(x, y, selector, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """PTX's prmt: of the bytes of x (0 to 3) and y (4 to 7), int32, those that the 4 lower nibbles of `selector` name;
    from 8 on the sign of a byte, 8 times. Arithmetic does it where it is not `ASSEMBLED`."""
    if ASSEMBLED:
        return libdevice.byte_perm(x, y, selector)
    both = (y.to(tl.int64) << 32) | (x.to(tl.int64) & 0xFFFFFFFF)
    result = x & 0
    for k in tl.static_range(4):
        chosen = (selector >> (4 * k)) & 15
        byte = ((both >> ((chosen & 7) * 8).to(tl.int64)) & 255).to(tl.int32)
        byte = tl.where(chosen > 7, (byte >> 7) * 255, byte)
        result |= byte << (8 * k)
    return result


@gpu.jit()
def shifted(low, high, bits):  # type: ignore[no-untyped-def]
    """The lower half, int32, of 64 bits shifted to the right by 0 to 32."""
    both = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (both >> bits.to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)


@gpu.jit()
def octet(a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    """Eight tensors as one, with three more dimensions of 2."""
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))


@gpu.jit()
def halves(pair, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two numbers of 16 bits from one of 32."""
    return pair.to(tl.uint16).to(TYPE, bitcast=True), (pair >> 16).to(tl.uint16).to(TYPE, bitcast=True)


@gpu.jit()
def numbers(low, high, TYPE: tl.constexpr, ABOVE: tl.constexpr, AND: tl.constexpr, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight numbers of 16 bits: the bytes of `low` and `high`, each below the byte `ABOVE`, masked by `AND`."""
    upper = low & 0 | ((ABOVE * 0x01010101) & 0x7FFFFFFF) - (ABOVE // 128) * 2**31
    a, b = halves(permuted_bytes(low, upper, low & 0 | 0x4140, ASSEMBLED) & AND, TYPE)
    c, d = halves(permuted_bytes(low, upper, low & 0 | 0x4342, ASSEMBLED) & AND, TYPE)
    e, f = halves(permuted_bytes(high, upper, low & 0 | 0x4140, ASSEMBLED) & AND, TYPE)
    g, h = halves(permuted_bytes(high, upper, low & 0 | 0x4342, ASSEMBLED) & AND, TYPE)
    return octet(a, b, c, d, e, f, g, h)


@gpu.jit()
def signed(low, high, SIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight fp32 numbers of the bytes of `low` and `high`, two's complements with that sign bit."""
    a = ((low & 255) ^ SIGN) - SIGN
    b = (((low >> 8) & 255) ^ SIGN) - SIGN
    c = (((low >> 16) & 255) ^ SIGN) - SIGN
    d = (((low >> 24) & 255) ^ SIGN) - SIGN
    e = ((high & 255) ^ SIGN) - SIGN
    f = (((high >> 8) & 255) ^ SIGN) - SIGN
    g = (((high >> 16) & 255) ^ SIGN) - SIGN
    h = (((high >> 24) & 255) ^ SIGN) - SIGN
    return octet(a, b, c, d, e, f, g, h).to(tl.float32)


@gpu.jit()
def window(at, position, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words that hold 8 codes from `position` on, counted from a row's first, `at`."""
    at += position >> (3 if BITS == 4 else 2)
    first = tl.load(at)
    second = tl.load(at + 1)
    third = second
    if BITS == 8:
        third = tl.load(at + 2)
    return first, second, third


@gpu.jit()
def codes(first, second, third, position, bits, table, BITS: tl.constexpr, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A window's codes in the bytes of two words, each in its column by the lower 8 `bits` of the mask; 0 elsewhere.

    Codes of 4 bits are in bits 3 to 6, as two's complements; those of 8 fill their bytes.
    """
    selector = tl.load(table + (bits & 255).to(tl.int32))
    if BITS == 4:
        packed = shifted(first, second, (position & 7) * 4)
        even = (packed << 3) & 0x78787878
        odd = (packed >> 1) & 0x78787878
        return permuted_bytes(even, odd, selector, ASSEMBLED), permuted_bytes(even, odd, selector >> 16, ASSEMBLED)
    shift = (position & 3) * 8
    low = shifted(first, second, shift)
    high = shifted(second, third, shift)
    x = bits & 15
    x = x - ((x >> 1) & 5)
    high = shifted(low, high, ((x & 3) + (x >> 2)) * 8)
    return permuted_bytes(low, low & 0, selector, ASSEMBLED), permuted_bytes(high, low & 0, selector >> 16, ASSEMBLED)


@gpu.jit()
def gathered(at, position, bits):  # type: ignore[no-untyped-def]
    """Eight values from `position` on, in their columns; 0 elsewhere."""
    a = tl.load(at + position, mask=(bits & 1) != 0, other=0.0)
    position = tl.where((bits & 1) != 0, position + 1, position)
    b = tl.load(at + position, mask=(bits & 2) != 0, other=0.0)
    position = tl.where((bits & 2) != 0, position + 1, position)
    c = tl.load(at + position, mask=(bits & 4) != 0, other=0.0)
    position = tl.where((bits & 4) != 0, position + 1, position)
    d = tl.load(at + position, mask=(bits & 8) != 0, other=0.0)
    position = tl.where((bits & 8) != 0, position + 1, position)
    e = tl.load(at + position, mask=(bits & 16) != 0, other=0.0)
    position = tl.where((bits & 16) != 0, position + 1, position)
    f = tl.load(at + position, mask=(bits & 32) != 0, other=0.0)
    position = tl.where((bits & 32) != 0, position + 1, position)
    g = tl.load(at + position, mask=(bits & 64) != 0, other=0.0)
    position = tl.where((bits & 64) != 0, position + 1, position)
    h = tl.load(at + position, mask=(bits & 128) != 0, other=0.0)
    return octet(a, b, c, d, e, f, g, h)


@gpu.jit()
def positions(bits, done):  # type: ignore[no-untyped-def]
    """Where the values of each 8 bits of words [..., 4] begin, and how many values there are, [...], in all.

    A word has 16 columns of the tile's first 64 and 16 of its second. `done`: values of the row before the tile.
    """
    x = bits - ((bits >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    sums = ((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101  # in byte k the bits set in bytes 0 to k
    lower = (sums >> 8) & 255
    both = lower | (((sums >> 24) - lower) << 16)  # of the first 64 columns, and of the second
    before = tl.cumsum(both, 3) - both
    total = tl.sum(both, 3)
    first = tl.expand_dims(done, 3) + (before & 0xFFFF)
    second = tl.expand_dims(done + (total & 0xFFFF), 3) + (before >> 16)
    end = done + (total & 0xFFFF) + (total >> 16)
    return first, first + (sums & 255), second, second + (((sums >> 16) & 255) - lower), end


@gpu.jit()
def mask_words(at, first, words):  # type: ignore[no-untyped-def]
    """Words, uint32: 16 columns of a tile's first 64 and 16 of its second; `first` of `words` of 16 bits in a row."""
    low = tl.load(at + first, mask=first < words, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = tl.load(at + first + 4, mask=first + 4 < words, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (high << 16)


@gpu.jit()
def counted(at, first, span, words):  # type: ignore[no-untyped-def]
    """Bits set in `span` words of 32 bits from the first-th on, by row: `at` and `first` are [..., 1, 1]."""
    own = tl.arange(0, 4)[None, None, None, :, None] * 2 + tl.arange(0, 2)[None, None, None, None, :]
    sums = tl.zeros((at.shape[0], at.shape[1], at.shape[2], 4, 2), tl.uint32)
    for step in range(0, span, 8):
        word = first + step + own
        x = tl.load(at + word, mask=(step + own < span) & (word < words), other=0).to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        sums += (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return tl.sum(tl.sum(sums, 4), 3)


@gpu.jit()
def weights_side(w0, w1, ROW_WARPS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights [warps, 16, 64] from two octets [2 ROW_WARPS, PARTS, 8, 4, 2, 2, 2] of each thread: no move."""
    both = tl.reshape(tl.join(w0, w1), (2, ROW_WARPS, PARTS, 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(both, (1, 2, 0, 3, 8, 5, 6, 4, 7)), (ROW_WARPS * PARTS, 16, 64))


@gpu.jit()
def tokens_side(x0, x1, WARPS: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """X [warps, 64, TOKENS], its columns in the order of `weights_side`'s, from [TOKENS/8, warps, 8, 4, 8]: no move."""
    both = tl.reshape(tl.join(x0, x1), (TOKENS // 8, WARPS, 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(both, (1, 7, 4, 5, 3, 6, 0, 2)), (WARPS, 64, TOKENS))


@gpu.jit()
def scale_side(scale, ROW_WARPS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales [2 ROW_WARPS, PARTS, 8] of rows beside the products [warps, 16, TOKENS]: no move."""
    wide = tl.broadcast_to(tl.expand_dims(scale, 3), (2 * ROW_WARPS, PARTS, 8, 4))
    wide = tl.join(wide, wide)
    if TOKENS == 16:
        wide = tl.reshape(tl.join(wide, wide), (2, ROW_WARPS, PARTS, 8, 4, 2, 2))
        wide = tl.permute(wide, (1, 2, 0, 3, 6, 4, 5))
    else:
        wide = tl.permute(tl.reshape(wide, (2, ROW_WARPS, PARTS, 8, 4, 2)), (1, 2, 0, 3, 4, 5))
    return tl.reshape(wide, (ROW_WARPS * PARTS, 16, TOKENS))


@gpu.jit()
def code_product(  # type: ignore[no-untyped-def]
    l0,
    h0,
    l1,
    h1,
    x,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """The product of 64 columns' codes with X, by two products of numbers that their bits make without arithmetic.

    Of 4 bits: (16 + 8 + code) x − 24 x, in fp16 152 instead of 24. Of 8 bits: (128 + the lower 7) x − (128 + the upper
    one) x, in fp16 1024 instead of 128. WIDE: of the codes themselves.
    """
    WARPS: tl.constexpr = ROW_WARPS * PARTS
    TYPE: tl.constexpr = x.dtype
    HALF: tl.constexpr = tl.float16 == TYPE
    product = tl.zeros((WARPS, 16, TOKENS), tl.float32)
    if WIDE:
        if BITS == 4:
            w0 = signed(l0 >> 3, h0 >> 3, 8)
            w1 = signed(l1 >> 3, h1 >> 3, 8)
        else:
            w0 = signed(l0, h0, 128)
            w1 = signed(l1, h1, 128)
    elif BITS == 4:
        FLIP: tl.constexpr = 0xC0C0C0C0 - 2**32  # the upper bit of a code, and one above it
        excess = tl.full((WARPS, 16, 64), -152.0 if HALF else -24.0, TYPE)
        product = tl.dot(excess, x, product)
        w0 = numbers(l0 ^ FLIP, h0 ^ FLIP, TYPE, 0x58 if HALF else 0x41, -1, ASSEMBLED)
        w1 = numbers(l1 ^ FLIP, h1 ^ FLIP, TYPE, 0x58 if HALF else 0x41, -1, ASSEMBLED)
    else:
        LOWER: tl.constexpr = 0xFF7FFF7F - 2**32
        UPPER: tl.constexpr = 0xFF80FF80 - 2**32
        ABOVE: tl.constexpr = 0x64 if HALF else 0x43
        w0 = numbers(l0, h0, TYPE, ABOVE + 128, UPPER, ASSEMBLED)
        w1 = numbers(l1, h1, TYPE, ABOVE + 128, UPPER, ASSEMBLED)
        product = tl.dot(weights_side(w0, w1, ROW_WARPS, PARTS), x, product)
        w0 = numbers(l0, h0, TYPE, ABOVE, LOWER, ASSEMBLED)
        w1 = numbers(l1, h1, TYPE, ABOVE, LOWER, ASSEMBLED)
    return tl.dot(weights_side(w0, w1, ROW_WARPS, PARTS), x, product, input_precision="tf32x3")


@gpu.jit("tokens", "rows")
def decode_kernel(  # type: ignore[no-untyped-def]
    X,
    x_row,
    table,
    index,
    mask,
    words,
    scales,
    values,
    bias,
    out,
    tokens,
    rows,
    columns,
    row_words,
    groups,
    group_bits,
    span,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BIASED: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """out[s, t, r] = Σ X[t, k] W[r, k], and the bias, k being the columns of split s; 16 ROW_WARPS rows a program.

    X [tokens, columns] has contiguous rows; `mask` and `words` are the mask in words of 16 and of 32 bits, `row_words`
    of 16 a row; `group_bits` is the base 2 logarithm of a scale's columns. A warp has 16 rows and `span` columns. WIDE:
    products of fp32.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else X.dtype.element_ty
    HALVES: tl.constexpr = TOKENS // 8
    WARPS: tl.constexpr = ROW_WARPS * PARTS
    split = tl.program_id(1)
    top = tl.program_id(0) * (16 * ROW_WARPS)
    # Rows [2 ROW_WARPS, PARTS, 8] and 4 threads for each: so Triton deals them to threads and warps, and a thread has
    # two rows, 8 ROW_WARPS apart.
    upper = tl.arange(0, 2 * ROW_WARPS)[:, None, None]
    part = tl.arange(0, PARTS)[None, :, None]
    row = tl.minimum(top + upper * 8 + tl.arange(0, 8)[None, None, :], rows - 1)  # beyond the last one: as the last
    row = (row + part * 0).to(tl.int64)
    t = tl.arange(0, 4)[None, None, None, :]
    at32 = (words + row * (row_words // 2))[:, :, :, None, None]
    begin = (split * PARTS + part) * span
    own = counted(at32, (begin // 32)[:, :, :, None, None], span // 32, row_words // 2)
    done = tl.cumsum(own, 1) - own
    for earlier in range(split):
        first = (earlier * PARTS + part) * span
        some = counted(at32, (first // 32)[:, :, :, None, None], span // 32, row_words // 2)
        done += tl.sum(some, 1)[:, None, :]
    unit: tl.constexpr = 1 if BITS < 16 else 32 // BITS
    start = tl.load(index + row).to(tl.uint32, bitcast=True).to(tl.int64)
    at = (values + start * unit)[:, :, :, None]
    at16 = (mask + row * row_words)[:, :, :, None]
    first16 = (begin // 16)[:, :, :, None] + t
    scale_at = scales + row * groups
    # Tokens [HALVES, WARPS, 8], 4 threads for each, and 8 columns.
    token = tl.arange(0, HALVES)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    warp = tl.arange(0, WARPS)[None, :, None]
    column = ((split * PARTS + warp % PARTS) * span)[:, :, :, None, None]
    column = column + t[:, :, :, :, None] * 16 + tl.arange(0, 8)[None, None, None, None, :]
    there = (token < tokens)[:, :, :, None, None]
    x_at = X + ((token + warp * 0).to(tl.int64) * x_row)[:, :, :, None, None] + column
    sums = tl.zeros((WARPS, 16, TOKENS), tl.float32)
    bits = mask_words(at16, first16, row_words)
    coming = mask_words(at16, first16 + 8, row_words)
    p0, p1, p2, p3, done = positions(bits, done)
    if BITS < 16:
        a0, b0, c0 = window(at, p0, BITS)
        a1, b1, c1 = window(at, p1, BITS)
        a2, b2, c2 = window(at, p2, BITS)
        a3, b3, c3 = window(at, p3, BITS)
    for step in range(0, span, 128):
        # What the next tile takes is asked for before this one is expanded, and the mask of the one after it.
        n0, n1, n2, n3, done = positions(coming, done)
        after = mask_words(at16, first16 + (step // 16 + 16), row_words)
        x0 = tl.load(x_at + step, mask=there & (column + step < columns), other=0.0)
        x1 = tl.load(x_at + (step + 8), mask=there & (column + (step + 8) < columns), other=0.0)
        x2 = tl.load(x_at + (step + 64), mask=there & (column + (step + 64) < columns), other=0.0)
        x3 = tl.load(x_at + (step + 72), mask=there & (column + (step + 72) < columns), other=0.0)
        x01 = tokens_side(x0, x1, WARPS, TOKENS).to(TYPE)
        x23 = tokens_side(x2, x3, WARPS, TOKENS).to(TYPE)
        if BITS < 16:
            group = (begin + step) >> group_bits
            scale0 = tl.load(scale_at + group, mask=group < groups, other=0.0).to(tl.float32)
            group = (begin + (step + 64)) >> group_bits
            scale1 = tl.load(scale_at + group, mask=group < groups, other=0.0).to(tl.float32)
            e0, f0, g0 = window(at, n0, BITS)
            e1, f1, g1 = window(at, n1, BITS)
            e2, f2, g2 = window(at, n2, BITS)
            e3, f3, g3 = window(at, n3, BITS)
            l0, h0 = codes(a0, b0, c0, p0, bits, table, BITS, ASSEMBLED)
            l1, h1 = codes(a1, b1, c1, p1, bits >> 8, table, BITS, ASSEMBLED)
            product = code_product(l0, h0, l1, h1, x01, BITS, WIDE, ROW_WARPS, PARTS, TOKENS, ASSEMBLED)
            sums += product * scale_side(scale0, ROW_WARPS, PARTS, TOKENS)
            l2, h2 = codes(a2, b2, c2, p2, bits >> 16, table, BITS, ASSEMBLED)
            l3, h3 = codes(a3, b3, c3, p3, bits >> 24, table, BITS, ASSEMBLED)
            product = code_product(l2, h2, l3, h3, x23, BITS, WIDE, ROW_WARPS, PARTS, TOKENS, ASSEMBLED)
            sums += product * scale_side(scale1, ROW_WARPS, PARTS, TOKENS)
            a0, b0, c0 = e0, f0, g0
            a1, b1, c1 = e1, f1, g1
            a2, b2, c2 = e2, f2, g2
            a3, b3, c3 = e3, f3, g3
        else:
            w0 = gathered(at, p0, bits).to(TYPE)
            w1 = gathered(at, p1, bits >> 8).to(TYPE)
            sums = tl.dot(weights_side(w0, w1, ROW_WARPS, PARTS), x01, sums, input_precision="tf32x3")
            w2 = gathered(at, p2, bits >> 16).to(TYPE)
            w3 = gathered(at, p3, bits >> 24).to(TYPE)
            sums = tl.dot(weights_side(w2, w3, ROW_WARPS, PARTS), x23, sums, input_precision="tf32x3")
        p0, p1, p2, p3 = n0, n1, n2, n3
        bits = coming
        coming = after
    total = tl.sum(tl.reshape(sums, (ROW_WARPS, PARTS, 16, TOKENS)), 1)
    total = tl.reshape(total, (ROW_WARPS * 16, TOKENS))
    m = tl.arange(0, ROW_WARPS * 16)
    r = top + ((m >> 3) & 1) * (8 * ROW_WARPS) + (m >> 4) * 8 + (m & 7)
    n = tl.arange(0, TOKENS)
    if BIASED:
        total += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    target = out + (split.to(tl.int64) * tokens + n[None, :]) * rows + r[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (n < tokens)[None, :])


@gpu.jit()
def exact(low, high, scale, TYPE: tl.constexpr, BITS: tl.constexpr, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Eight columns' weights, codes times their rows' scales, rounded to TYPE."""
    FLIP: tl.constexpr = 0xC0C0C0C0 - 2**32
    LOWER: tl.constexpr = 0xFF7FFF7F - 2**32
    UPPER: tl.constexpr = 0xFF80FF80 - 2**32
    wide = scale[:, :, :, None, None, None, None]
    if tl.float32 == TYPE:
        code = signed(low >> 3, high >> 3, 8) if BITS == 4 else signed(low, high, 128)
    elif BITS == 4:
        half: tl.constexpr = tl.float16 == TYPE
        code = numbers(low ^ FLIP, high ^ FLIP, TYPE, 0x58 if half else 0x41, -1, ASSEMBLED)
        code = code - tl.full((), 152.0 if half else 24.0, TYPE)
    else:
        above: tl.constexpr = 0x64 if tl.float16 == TYPE else 0x43
        code = numbers(low, high, TYPE, above, LOWER, ASSEMBLED) - numbers(low, high, TYPE, above, UPPER, ASSEMBLED)
    if tl.bfloat16 == TYPE:
        return code * wide
    return (code.to(tl.float32) * wide.to(tl.float32)).to(TYPE)


@gpu.jit("tokens", "rows")
def prefill_kernel(  # type: ignore[no-untyped-def]
    X,
    x_row,
    table,
    index,
    mask,
    scales,
    values,
    bias,
    out,
    tokens,
    rows,
    columns,
    row_words,
    groups,
    group_bits,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """A tile of ROWS x TOKENS of out[t, r] = Σ X[t, k] W[r, k] and the bias; arguments as those of `decode_kernel`.

    Programs that share a tile of rows follow one another, so that its packed bytes are in the cache.
    """
    TYPE: tl.constexpr = tl.float32 if WIDE else X.dtype.element_ty
    across = (tokens + TOKENS - 1) // TOKENS
    top = tl.program_id(0) // across * ROWS
    left = tl.program_id(0) % across * TOKENS
    row = tl.minimum(top + tl.arange(0, ROWS)[None, None, :], rows - 1).to(tl.int64)
    unit: tl.constexpr = 1 if BITS < 16 else 32 // BITS
    start = tl.load(index + row).to(tl.uint32, bitcast=True).to(tl.int64)
    at = (values + start * unit)[:, :, :, None]
    at16 = (mask + row * row_words)[:, :, :, None]
    first16 = tl.arange(0, 4)[None, None, None, :]
    scale_at = scales + row * groups
    n = left + tl.arange(0, TOKENS)
    k = tl.arange(0, 64)
    x_at = X + n[None, :].to(tl.int64) * x_row + k[:, None]
    done = tl.zeros((1, 1, ROWS), tl.uint32)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    coming = tl.load(at16 + first16).to(tl.uint16, bitcast=True).to(tl.uint32)
    for step in range(0, columns, 64):
        bits = coming
        word = first16 + (step // 16 + 4)
        coming = tl.load(at16 + word, mask=word < row_words, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        p0, p1, _p2, _p3, done = positions(bits, done)
        if BITS < 16:
            scale = tl.load(scale_at + (step >> group_bits))
            a0, b0, c0 = window(at, p0, BITS)
            a1, b1, c1 = window(at, p1, BITS)
            low, high = codes(a0, b0, c0, p0, bits, table, BITS, ASSEMBLED)
            w0 = exact(low, high, scale, TYPE, BITS, ASSEMBLED)
            low, high = codes(a1, b1, c1, p1, bits >> 8, table, BITS, ASSEMBLED)
            w1 = exact(low, high, scale, TYPE, BITS, ASSEMBLED)
        else:
            w0 = gathered(at, p0, bits).to(TYPE)
            w1 = gathered(at, p1, bits >> 8).to(TYPE)
        w = tl.reshape(tl.permute(tl.join(w0, w1), (0, 1, 2, 3, 7, 4, 5, 6)), (ROWS, 64))
        x = tl.load(x_at + step, mask=(n < tokens)[None, :] & (k + step < columns)[:, None], other=0.0).to(TYPE)
        sums = tl.dot(w, x, sums, input_precision="tf32x3")
    r = top + tl.arange(0, ROWS)
    if BIASED:
        sums += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    target = out + n[None, :].to(tl.int64) * rows + r[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (n < tokens)[None, :])


@gpu.jit("count", "splits")
def add_splits_kernel(partial, bias, out, count, rows, splits, BIASED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = Σ partial[s, i], in order, and the bias of i's row; `count` = tokens · rows."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * tl.cast(count, tl.int64) + i, mask=live, other=0.0)
    if BIASED:
        total += tl.load(bias + i % rows, mask=live, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=live)


ROW_WARPS, PARTS = 2, 4
"""Warps of a program of `decode_kernel`: down, 16 rows each, and across, so many parts of the columns."""

FEW = 16
"""Tokens, at most, of `decode_kernel`."""

ADDED = 1024
"""Sums that a program of `add_splits_kernel` adds."""

LEAST = 512
"""Columns of a warp below which columns are not split any further."""


@dataclass(frozen=True)
class Tile:
    """What a program of `prefill_kernel` makes."""

    rows: int
    tokens: int
    warps: int


def prefill_tile(tokens: int, bits: int, wide: bool, capability: int) -> Tile:
    """Choose a tile for so many tokens. Two programs on a multiprocessor are what is sought: one expands while one
    multiplies. capability: 80, 90, …; before 90 the larger tiles take too many registers."""
    if wide:
        return Tile(64, 64 if capability >= 90 else 32, 4)
    if tokens <= 64 or gpu.compiler() < (3, 9):  # older compilers spill registers with larger tiles
        return Tile(128, 64, 4)
    return Tile(128, 128, 4 if bits < 16 and capability >= 90 else 8)


def split_columns(rows: int, columns: int, slots: int) -> tuple[int, int]:
    """Into how many programs the columns of a tile of rows are split; how many of them a warp has, a multiple of 128.

    Splitting fills the device with few rows, and costs a program the counting of the mask of those before it. slots:
    programs that run at a time.
    """
    tiles = -(-rows // (16 * ROW_WARPS))
    most = max(1, columns // (PARTS * LEAST))
    splits = max(1, min(most, slots // tiles, 8))
    span = -(-columns // (splits * PARTS * STEP)) * STEP
    return -(-columns // (PARTS * span)), span


@gpu.kept
def selectors(device: torch.device) -> Tensor:
    """int32 [2, 256] on the device: for 8 bits of a mask, a byte permutation's selector for the lower 4 columns and one
    for the upper 4, of windows of 4 and of 8 bits a code, in this order; see `codes`."""
    tables = []
    for bits in (4, 8):
        table = []
        for mask in range(256):
            selector = 0
            for column in range(8):
                half = column & 4 if bits == 8 else 0
                before = (mask >> half & ((1 << (column - half)) - 1)).bit_count()
                if bits == 8:
                    chosen = before if mask >> column & 1 else 4  # 4: a byte of zeros
                else:
                    chosen = before // 2 + 4 * (before % 2) if mask >> column & 1 else 8  # 8: a sign, which is 0
                selector |= chosen << (4 * column)
            table.append(selector - (selector >> 31 << 32))
        tables.append(table)
    return torch.tensor(tables, dtype=torch.int32).to(device)


def packed_matmul_triton(X: Tensor, packed: Packed, bias: Tensor | None, first: int, count: int) -> Tensor:
    """Multiply X [tokens, columns] by `count` rows from `first` on of a packed matrix, and add the bias [count]: Y
    [tokens, count] in X's dtype.

    bf16 and fp16 are multiplied as they are where X and "same" values agree in dtype, and codes with either; all else
    in fp32, by three products in TF32. `workspace` says what that takes beside Y.
    """
    layout = packed.layout
    tokens, columns = X.shape
    Y = X.new_empty(tokens, count)
    bias = None if bias is None else bias.contiguous()
    if not Y.numel():
        return Y
    if not columns:
        return Y.zero_() if bias is None else Y.copy_(bias.expand(tokens, count))
    if gpu.INTERPRETED and X.dtype == torch.bfloat16:  # whose bit patterns it multiplies, and which it rounds towards 0
        return packed_matmul_triton(X.float(), packed, bias, first, count).to(torch.bfloat16)
    wide = X.dtype == torch.float32 or (layout.values == "same" and layout.dtype != X.dtype)
    X = aligned(X.float() if wide else X)
    stored = packed.data[layout.values_at :].view(layout.dtype if layout.values == "same" else torch.int32)
    mask = packed.mask[first : first + count]
    index = packed.row_index[first : first + count]
    scales = packed.scales[first : first + count] if layout.groups else packed.data
    sizes = (tokens, count, columns, 4 * layout.words, layout.groups, max(layout.group.bit_length() - 1, 0))
    shared: dict[str, Any] = {"BITS": layout.bits, "WIDE": wide, "ASSEMBLED": ASSEMBLED, "enable_fp_fusion": True}
    table = selectors(X.device)[int(layout.bits == 8)]
    with torch.cuda.device_of(X):
        if tokens <= FEW:
            slots = 2 * gpu.processors(X.device)
            splits, span = split_columns(count, columns, slots)
            out = Y if splits == 1 else Y.new_empty(splits, tokens, count, dtype=torch.float32)
            decode_kernel[(-(-count // (16 * ROW_WARPS)), splits)](
                X,
                X.stride(0),
                table,
                index,
                mask.view(torch.int16),
                mask.view(torch.int32),
                scales,
                stored,
                X if bias is None else bias,
                out,
                *sizes,
                span,
                BIASED=bias is not None and splits == 1,
                ROW_WARPS=ROW_WARPS,
                PARTS=PARTS,
                TOKENS=16 if tokens > 8 or wide else 8,
                num_warps=ROW_WARPS * PARTS,
                num_stages=1,
                **shared,
            )
            if splits > 1:
                add_splits_kernel[(-(-Y.numel() // ADDED),)](
                    out,
                    X if bias is None else bias,
                    Y,
                    Y.numel(),
                    count,
                    splits,
                    BIASED=bias is not None,
                    BLOCK=ADDED,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
            return Y
        tile = prefill_tile(tokens, layout.bits, wide, gpu.capability(X.device))
        prefill_kernel[(-(-count // tile.rows) * -(-tokens // tile.tokens),)](
            X,
            X.stride(0),
            table,
            index,
            mask.view(torch.int16),
            scales,
            stored,
            X if bias is None else bias,
            Y,
            *sizes,
            BIASED=bias is not None,
            ROWS=tile.rows,
            TOKENS=tile.tokens,
            num_warps=tile.warps,
            num_stages=1,
            **shared,
        )
    return Y


def workspace(tokens: int, rows: int, columns: int, slots: int) -> int:
    """Bytes that the product takes beside X and Y, with so many programs at a time: the sums of splits, in fp32."""
    splits = split_columns(rows, columns, slots)[0] if tokens <= FEW else 1
    return 4 * splits * tokens * rows if splits > 1 else 0
