"""A symmetric matrix from its triangle: what lies above the diagonal copied below it, or back, in place.

The engine keeps one triangle of H; who wants all of it asks here. Bound by memory: a triangle read, one written. On a
GPU a program transposes one tile, so that both sides are read and written in whole lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl

SIDE = 1024  # rows and columns of the squares that the reference copies at a time


def symmetrize_(H: Tensor, backend: str = "auto") -> Tensor:
    """Copies the upper triangle of H onto the lower one, in place; returns H.

    H: [n, n], of any dtype and strides for the reference, else fp32 with contiguous rows or columns ("auto" knows).
    ``backend`` as in `rac_kernels.backends.choose`. Raises ValueError if H is not square or not for that backend.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H must be square, not {list(H.shape)}")
    plain = H.dtype != torch.float32 or (len(H) > 1 and 1 not in H.stride())
    if plain and backend not in ("auto", "reference"):
        raise ValueError(
            f"backend {backend!r} needs an fp32 H with contiguous rows or columns, not {H.dtype} of {H.stride()}"
        )
    _mirror_op(H, "reference" if plain else choose(backend, H.device, triton=True))
    return H


@torch.library.custom_op("rac::symmetrize_", mutates_args=("H",))
def _mirror_op(H: Tensor, backend: str) -> None:
    down = len(H) < 2 or H.stride(1) == 1
    mirror(backend)((H if down else H.T)[None], down)


@_mirror_op.register_fake
def _(H: Tensor, backend: str) -> None:
    return None


def mirror(backend: str) -> Callable[[Tensor, bool], Tensor]:
    """The backend's f(H, down) -> finite: copies each H [matrices, n, n]'s strictly upper triangle onto the lower one,
    or (``down`` False) back. finite [matrices] bool: no NaN or infinity in what is copied or on the diagonal. On a GPU
    nothing waits for the device."""
    ways = {"native": mirror_native_, "triton": mirror_triton_, "cuda": mirror_triton_}
    return ways.get(backend, mirror_reference_)


def mirror_reference_(H: Tensor, down: bool) -> Tensor:
    """`mirror` in plain torch, for any device, dtype and strides."""
    source = H if down else H.mT
    n = H.shape[1]
    finite = torch.ones(len(H), dtype=torch.bool, device=H.device)
    for lo in range(0, n, SIDE):
        hi = min(lo + SIDE, n)
        corner, rows = source[:, lo:hi, lo:hi], source[:, lo:hi, hi:]
        upper = corner.triu()
        corner.copy_(upper + upper.triu(1).mT)
        source[:, hi:, lo:hi] = rows.mT
        finite &= upper.isfinite().flatten(1).all(1) & rows.isfinite().flatten(1).all(1)
    return finite


def mirror_native_(H: Tensor, down: bool) -> Tensor:
    run, threads = native.library().mirror, native.threads()
    ended = [run(one.data_ptr(), len(one), one.stride(0), down, threads) for one in H]
    return torch.tensor([end == native.DONE for end in ended], dtype=torch.bool)


@gpu.jit("n")
def mirror_kernel(H, h_matrix, h_row, spoilt, n, DOWN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile: transposed onto its opposite. spoilt[matrix] becomes 1 if it holds NaN or infinity."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    h_row = tl.cast(h_row, tl.int64)
    if row <= column:
        H += tl.program_id(2).to(tl.int64) * h_matrix
        inside = tl.arange(0, BLOCK)
        i = row * BLOCK + inside
        j = column * BLOCK + inside
        exists = (i < n)[:, None] & (j < n)[None, :]
        if DOWN:
            upper = exists & (i[:, None] <= j[None, :])
            tile = tl.load(H + i[:, None] * h_row + j[None, :], mask=upper, other=0.0)
            lower = tl.trans(exists & (i[:, None] < j[None, :]))
            tl.store(H + j[:, None] * h_row + i[None, :], tl.trans(tile), mask=lower)
        else:
            lower = tl.trans(exists & (i[:, None] <= j[None, :]))
            tile = tl.load(H + j[:, None] * h_row + i[None, :], mask=lower, other=0.0)
            upper = exists & (i[:, None] < j[None, :])
            tl.store(H + i[:, None] * h_row + j[None, :], tl.trans(tile), mask=upper)
        bad = tl.max(tl.max((tl.abs(tile) < float("inf")).to(tl.int32) ^ 1, 1), 0)  # NaN fails every comparison
        if bad > 0:
            tl.store(spoilt + tl.program_id(2), 1)


BLOCK, WARPS = 64, 8


def mirror_triton_(H: Tensor, down: bool) -> Tensor:
    """All matrices in one launch."""
    matrices, n = H.shape[:2]
    spoilt = torch.zeros(matrices, dtype=torch.int32, device=H.device)
    tiles = -(-n // BLOCK)
    if tiles and matrices:
        with torch.cuda.device_of(H):
            mirror_kernel[(tiles, tiles, matrices)](
                H, *H.stride()[:2], spoilt, n, DOWN=down, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
    return spoilt == 0
