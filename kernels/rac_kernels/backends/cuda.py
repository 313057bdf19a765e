"""The CUDA kernels of csrc/cuda: what Triton expresses badly, launched on the current stream with raw pointers.

They are part of the native extension where it was built with nvcc. Nothing here waits for the device, so calls can be
captured in a CUDA graph, once each has run before: the first one loads the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from rac_kernels.backends import native

CORNER = 128  # the largest corner that `factor_corner_` takes


def why_missing() -> str:
    """Why the extension has no CUDA kernels, or "" if it has them (which needs no GPU)."""
    if native.available():
        return native.library().cuda_missing
    return f"the native extension is missing: {native.info()['why_missing']}"


def built() -> bool:
    """Whether the extension has them, which says nothing of a device."""
    return not why_missing()


def why_unusable(device: torch.device) -> str:
    """Why they cannot run on this device, or "" if they can: they are built, it is a GPU, the driver is new enough for
    them and there is code for its compute capability."""
    if device.type != "cuda":
        return f"{device} is no GPU"
    return why_missing() or _refusal(-1 if device.index is None else device.index)


def usable(device: torch.device) -> bool:
    """Whether they can run on this device. Asked once of each; before that not while a CUDA graph is captured."""
    return not why_unusable(device)


_refusals: dict[int, str] = {}


def _refusal(index: int) -> str:
    """Why the device of that number (-1: the current one) cannot run them. A table keeps it: what functools caches
    torch.compile would trace into."""
    if index not in _refusals:
        try:
            native.library().cuda_check(index)
            _refusals[index] = ""
        except RuntimeError as error:
            _refusals[index] = f"the CUDA kernels do not run on it ({error})"
    return _refusals[index]


# What torch.compiler.assume_constant_result does, which would load torch's compiler: 1.2 s and 145 MB in every process.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def factor_corner_(H: Tensor, lo: int, hi: int, inverse: Tensor, status: Tensor, pulls: Tensor | None = None) -> None:
    """H[..., lo:hi, lo:hi] = U Uᵀ with U upper triangular, in place in that corner's upper triangle alone.

    H: [n, n] or [matrices, n, n] fp32 with contiguous rows; what lies below the diagonal is neither read nor written.
    0 <= lo <= hi <= n, at most 128 apart. pulls, if any: [parts, at least hi, at least hi - lo] fp32 for each matrix,
    contiguous rows; pulls[..., part, lo:hi, :hi - lo] of every part is taken off the corner first. inverse:
    [hi - lo, hi - lo] fp32 for each matrix, contiguous rows; becomes inv(U), with zeros below the diagonal.

    status: int32, contiguous, an element for each matrix. Where it is not 0, the matrix is left as it is; a pivot that
    is not positive and finite makes it 1 + the number of its column and leaves the corner as it was. So a whole
    factorization can be queued with one status, to be looked at once.

    The matrices are factored at the same time, a thread block each. Raises ValueError for arguments that do not fit,
    NativeMissing without the kernels, RuntimeError if CUDA refuses the launch.
    """
    matrices, size = H.shape[:-2], hi - lo
    if H.ndim not in (2, 3) or H.shape[-1] != H.shape[-2] or H.dtype != torch.float32 or not _rows(H):
        raise ValueError(f"H must be square fp32 matrices with contiguous rows, not {H.dtype} {list(H.shape)}")
    if not 0 <= lo <= hi <= H.shape[-1] or size > CORNER:
        raise ValueError(f"the corner {lo}:{hi} must lie in H {list(H.shape)} and be at most {CORNER} wide")
    if inverse.shape != (*matrices, size, size) or inverse.dtype != torch.float32 or not _rows(inverse):
        raise ValueError(
            f"inverse must be fp32 {[*matrices, size, size]} with contiguous rows, "
            f"not {inverse.dtype} {list(inverse.shape)}"
        )
    if status.numel() != matrices.numel() or status.dtype != torch.int32 or not status.is_contiguous():
        raise ValueError(
            f"status must be int32 with an element for each matrix, not {status.dtype} {list(status.shape)}"
        )
    if pulls is None:
        pulls = H.new_empty(*matrices, 0, hi, size)
    if pulls.shape[:-3] != matrices or pulls.ndim != H.ndim + 1 or pulls.shape[-2] < hi or pulls.shape[-1] < size:
        raise ValueError(f"pulls must be at least {[*matrices, 'parts', hi, size]}, not {list(pulls.shape)}")
    if pulls.dtype != torch.float32 or not _rows(pulls):
        raise ValueError(f"pulls must be fp32 with contiguous rows, not {pulls.dtype} with strides {pulls.stride()}")
    library = _library(H, inverse, status, pulls)
    with torch.cuda.device(H.device):
        library.cuda_factor_corner(
            H.data_ptr(),
            H.stride(-2),
            H.stride(0) if matrices else 0,
            lo,
            size,
            pulls.data_ptr(),
            pulls.shape[-3],
            pulls.stride(-3),
            pulls.stride(-2),
            pulls.stride(0) if matrices else 0,
            inverse.data_ptr(),
            inverse.stride(-2),
            inverse.stride(0) if matrices else 0,
            status.data_ptr(),
            matrices.numel(),
            torch.cuda.current_stream().cuda_stream,
        )


def selection_state(groups: int, device: torch.device) -> Tensor:
    """Memory that `select_thresholds` works in, again and again, on one stream at a time."""
    return torch.zeros(_state_bytes(groups), dtype=torch.uint8, device=device)


def _rows(tensor: Tensor) -> bool:
    """Whether its rows are contiguous."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def _state_bytes(groups: int) -> int:
    library = _library()
    return min(groups, library.cuda_select_groups) * library.cuda_select_state


def select_thresholds(
    scores: Tensor,
    groups: Sequence[int],
    k: Sequence[int],
    state: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k[g] smallest scores of each group g, exactly, the earliest among equals: (thresholds, last).

    scores: contiguous fp32 (NaN counts as largest), the groups' one after the other: ``groups[g]`` elements each,
    fewer than 2³² of them. thresholds: [groups] fp32; last: [groups] int64. Those are to go that are < thresholds[g],
    and those == thresholds[g] at a position within the group <= last[g]; with k[g] = 0 these are -inf and -1.

    state: from `selection_state`, for at least as many groups; made here if None. out: where the results go. Raises
    ValueError for arguments that do not fit, NativeMissing without the kernels, RuntimeError if CUDA refuses the
    launch.
    """
    if scores.dtype != torch.float32 or not scores.is_contiguous() or scores.numel() < sum(groups):
        raise ValueError(f"scores must be {sum(groups)} contiguous fp32, not {scores.dtype} {list(scores.shape)}")
    if len(groups) != len(k) or not all(0 <= some <= count < 2**32 for some, count in zip(k, groups, strict=False)):
        raise ValueError(f"k {list(k)} must lie between 0 and the groups' sizes {list(groups)}, these below 2^32")
    if state is None:
        state = selection_state(len(groups), scores.device)
    thresholds, last = out or (scores.new_empty(len(groups)), scores.new_empty(len(groups), dtype=torch.int64))
    library = _library(scores, state, thresholds, last)
    if (thresholds.dtype, last.dtype) != (torch.float32, torch.int64) or not (
        thresholds.numel() == last.numel() == len(groups) and thresholds.is_contiguous() and last.is_contiguous()
    ):
        raise ValueError(f"out must be fp32 and int64 of {len(groups)} contiguous elements")
    if state.nbytes < _state_bytes(len(groups)) or not state.is_contiguous():
        raise ValueError(f"the state is not one for {len(groups)} groups: {state.nbytes} bytes")
    with torch.cuda.device(scores.device):
        library.cuda_select(
            scores.data_ptr(),
            list(groups),
            list(k),
            state.data_ptr(),
            thresholds.data_ptr(),
            last.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return thresholds, last


def _library(*tensors: Tensor) -> ModuleType:
    """The extension, once it is known to have the kernels and the tensors to be on one GPU."""
    if why_missing():
        raise native.NativeMissing(f"no CUDA kernels: {why_missing()}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        raise ValueError(f"the tensors must be on one GPU, not on {', '.join(sorted(map(str, devices)))}")
    return native.library()
