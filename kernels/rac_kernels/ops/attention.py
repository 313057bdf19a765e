"""Causal attention of sequences that lie behind one another, without pads, and of one new token in each of many.

PyTorch's fused kernels hold no scores, but know neither soft caps nor sinks, and on a GPU neither sliding windows nor
fp32 with fewer queries than keys. What they do not know is computed here in plain torch, some queries at a time, so
that the scores of all queries and keys never exist together. Both are plain torch, which gradients go through.

On a GPU PyTorch's first choice among its fused kernels may be cuDNN's, which builds a plan for every shape that it has
not seen: a fraction of a second for each length of a sequence, and for each step of decoding. The others, flash and
memory-efficient attention, are compiled once and for all and take sizes as they come. So cuDNN's is ruled out here, and
lengths need no rounding.

Short sequences in bf16 on a CPU have a native kernel (csrc/cpu/attention.cpp), in 0.4 of the time of PyTorch's, made
for long ones. Its shares are in fp32, not rounded to bf16 before the second product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rac_kernels.backends import native
from rac_kernels.backends.dispatch import choose

QUERY_BLOCK = 1024  # rows of a mask that exist at a time

MASK_BYTES = 16 << 20  # of such a mask, at most, as fp32

SCORE_BYTES = 64 << 20  # of attention scores that exist at a time, where no fused kernel computes them

SHORT = 1024  # tokens of a sequence, at most, for the native kernel, where a thread holds a head's keys and values

FUSED_WIDTH = 256  # of heads, at most, in the kernels that hold no scores


@dataclass(frozen=True)
class Scoring:
    """The shares of keys: softmax(softcap · tanh(scale · q·k / softcap)) over the keys that a query sees."""

    scale: float
    window: int | None = None
    """Keys that a query sees at most, its own included; None: all up to its own."""
    softcap: float | None = None
    """Bound of the scores; None: there is none."""
    sinks: Tensor | None = None
    """[heads]: scores of a token that is always seen and has the value 0."""

    @property
    def is_plain(self) -> bool:
        """Whether there are neither soft caps nor sinks, which no fused kernel knows."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that the memory of `packed_attention` depends on."""

    tokens: int
    """Queries."""
    length: int
    """Keys of the longest sequence."""
    group: int
    """Query heads to a key."""
    widths: int
    """Width of a key and of a value, added up."""
    window: int | None = None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scoring: Scoring, backend: str = "auto"
) -> Tensor:
    """Causal attention of sequences that lie behind one another, none of which sees another.

    q: [heads, tokens, d]. k: [key-value heads, tokens, d], v: [key-value heads, tokens, e], of one float dtype.
    `lengths` add up to tokens; fewer queries than keys are the last tokens of one sequence. Returns [tokens, heads, e].

    Exact: runs of sequences of equal length are one batch, nothing is padded (see `workspace` for what it takes).
    `backend` "native" is taken for what its kernel knows: whole sequences of at most `SHORT` tokens in bf16, within
    their window, without soft caps, sinks and gradients; the rest is "reference".
    """
    out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
    whole = k.shape[1] == q.shape[1]
    shortest = _short(q, k, v, scoring) if whole and choose(backend, q.device) == "native" else 0
    at = 0
    for is_short, some in itertools.groupby(lengths, key=lambda length: length <= shortest):
        part = list(some)
        here = slice(at, at + sum(part)) if whole else slice(None)
        given = (q[:, here], k[:, here], v[:, here])
        if is_short:
            _short_op(out[here], *given, part, scoring.scale, "native")
        else:
            _attention_reference(out[here], *given, part, scoring)
        at += sum(part)
    return out


def _short(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> int:
    """The longest sequence, whole, that the native kernel takes of these; 0 if it takes none."""
    every = (q, k, v)
    if not native.has("attention") or not scoring.is_plain or any(x.dtype != torch.bfloat16 for x in every):
        return 0
    if torch.is_grad_enabled() and any(x.requires_grad for x in every):
        return 0
    return SHORT if scoring.window is None else min(SHORT, scoring.window)


@torch.library.custom_op("rac::packed_attention_", mutates_args=("out",))
def _short_op(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, backend: str) -> None:
    """out [tokens, heads, e] contiguous = plain attention of whole short sequences, all bf16."""
    if backend == "reference":
        _attention_reference(out, q, k, v, lengths, Scoring(scale))
        return
    q, k, v = (x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous() for x in (q, k, v))
    native.library().attention(
        out.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.shape[2],
        v.shape[2],
        [q.shape[0], k.shape[0]],
        [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]],
        scale,
        [0, *itertools.accumulate(lengths)],
        native.threads(),
    )


@_short_op.register_fake
def _(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, backend: str) -> None:
    return None


def _attention_reference(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scoring: Scoring
) -> None:
    """out [tokens, heads, e] = `packed_attention` in plain torch."""
    whole = k.shape[1] == q.shape[1]
    for start, length, count in _runs(lengths):
        queries, keys, values = (_unpack(x, start, length, count) if whole else x[None] for x in (q, k, v))
        own = replace(scoring, window=_within(scoring.window, keys))
        if scoring.is_plain and is_fused(q.device, q.dtype, q.shape[2], own.window):
            with without_plans():
                attended = _fused(queries, keys, values, own)
        else:
            attended = _blockwise(queries, keys, values, own)
        out[start : start + length * count] = attended.transpose(1, 2).flatten(0, 1)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the newest token of each sequence on what a cache holds of it.

    q: [rows, heads, d]. k: [rows, key-value heads, span, d], v: [rows, key-value heads, span, e]. seen: [rows, span]
    bool, which places of the cache a row sees, its window heeded. Returns [rows, heads, e].
    """
    if scoring.is_plain:
        # Query heads that share a key are the rows of one small matrix.
        grouped = q.unflatten(1, (k.shape[1], -1))
        mask = seen[:, None, None]
        with without_plans():
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scoring.scale).flatten(1, 2)
    return eager_attention(q[:, :, None], k, v, seen[:, None, None, None], scoring)[:, :, 0]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """Attention of q [count, heads, queries, d] on k, v [count, key-value heads, keys, …], all scores at once.

    seen: bool, which keys each query sees, broadcast to [count, 1, 1, queries, keys]; the window of `scoring` is not
    looked at. Scores are in fp32, or in fp64 for fp64. Returns [count, heads, queries, e] in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    keys, values = (x.to(dtype)[:, :, None] for x in (k, v))
    scores = ((q.to(dtype) * scoring.scale).unflatten(1, groups)) @ keys.mT
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_() * scoring.softcap  # gradients need what tanh gave
    scores.masked_fill_(~seen, -torch.inf)
    if scoring.sinks is None:
        shares = scores.softmax(-1)
    else:
        sink = scoring.sinks.to(dtype).view(1, *groups, 1, 1)
        top = torch.maximum(scores.detach().amax(-1, keepdim=True), sink)
        shares = scores.sub_(top).exp_()
        shares = shares / (shares.sum(-1, keepdim=True) + (sink - top).exp())
    return (shares @ values).flatten(1, 2).to(q.dtype)


def is_fused(device: torch.device, dtype: torch.dtype, width: int, window: int | None) -> bool:
    """Whether PyTorch has a kernel for causal attention, without soft caps and sinks, that holds no scores.

    A GPU's knows neither masks, which a `window` needs, nor fp32 with fewer keys than queries.
    """
    return device.type == "cpu" or (window is None and dtype.itemsize == 2 and width <= FUSED_WIDTH)


@contextmanager
def without_plans() -> Iterator[None]:
    """Within this PyTorch leaves out cuDNN's attention, which builds a plan for each new shape; after it all is as it
    was."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def workspace(shape: AttentionShape, fused: bool, mask_size: int = 0) -> int:
    """Bytes that exist within `packed_attention` at most, beside its arguments and what it returns.

    `fused` as by `is_fused`; `mask_size` is the size of the numbers of the mask that a fused kernel is given, 0 where
    it is given none.
    """
    if fused:
        # As bool and as the kernel takes it, or as bool and what it is made of.
        rows = _mask_rows(shape.length, shape.window) if mask_size else 0
        return max(1 + mask_size, 3) * rows * _keys(rows, shape.length, shape.window)
    rows = _score_rows(shape.group, shape.tokens, shape.length, shape.window, 4)
    keys = _keys(rows, shape.length, shape.window)
    scores = min(rows * keys, SCORE_BYTES // 4 // shape.group)
    # Scores and shares in fp32, the mask; and of a head, keys and values, queries and what they get.
    heads = max(keys, min(shape.tokens, shape.length)) + rows * shape.group
    return scores * (8 * shape.group + 3) + 4 * shape.widths * heads


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Start, length and count of each run of sequences of equal length."""
    start, first = 0, 0
    for at in range(1, len(lengths) + 1):
        if at == len(lengths) or lengths[at] != lengths[first]:
            yield start, lengths[first], at - first
            start += lengths[first] * (at - first)
            first = at


def _unpack(x: Tensor, start: int, length: int, count: int) -> Tensor:
    """[heads, tokens, d] → [count, heads, length, d]"""
    return x[:, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """[count, heads, queries, e] from q [count, heads, queries, d], k and v [count, key-value heads, keys, …].

    The queries are the last of the tokens that have keys.
    """
    width = v.shape[3]
    if width < q.shape[3]:
        # PyTorch's fast kernels want one width; columns of zeros change nothing.
        v = F.pad(v, (0, q.shape[3] - width))
    queries, length, window = q.shape[2], k.shape[2], scoring.window
    options: dict[str, Any] = {"scale": scoring.scale, "enable_gqa": True}
    if window is None and queries == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[..., :width]
    if window is None and q.is_cuda:
        # Flash attention knows this form, and no mask exists. (The module loads torch's compiler: not without a GPU.)
        from torch.nn.attention.bias import causal_lower_right

        bias: Any = causal_lower_right(queries, length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)[..., :width]
    out = torch.empty_like(q)
    for rows, columns, seen in _blocks(queries, length, _mask_rows(length, window), window, q.device):
        here = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        out[:, :, rows] = F.scaled_dot_product_attention(*here, attn_mask=seen, **options)
    return out[..., :width]


def _blockwise(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Like `_fused`, by `eager_attention`: one head of the keys after the other, and some queries at a time."""
    count, heads, queries, _ = q.shape
    group, window = heads // k.shape[1], scoring.window
    size = torch.promote_types(q.dtype, torch.float32).itemsize
    step = _score_rows(count * group, queries, k.shape[2], window, size)
    out = q.new_empty(count, heads, queries, v.shape[3])
    for rows, columns, seen in _blocks(queries, k.shape[2], step, window, q.device):
        for head in range(k.shape[1]):
            own, theirs = slice(head * group, (head + 1) * group), slice(head, head + 1)
            here = (q[:, own, rows], k[:, theirs, columns], v[:, theirs, columns])
            sinks = None if scoring.sinks is None else scoring.sinks[own]
            out[:, own, rows] = eager_attention(*here, seen, replace(scoring, sinks=sinks))
    return out


def _within(window: int | None, k: Tensor) -> int | None:
    """The window, unless all keys [count, heads, keys, d] are within it."""
    return None if window is None or k.shape[2] <= window else window


def _keys(rows: int, length: int, window: int | None) -> int:
    """Number of keys that so many queries in a row see, of a sequence of `length` tokens."""
    return length if window is None else min(length, window + rows)


def _mask_rows(length: int, window: int | None) -> int:
    """Queries that a mask is made for at a time."""
    return max(min(QUERY_BLOCK, length, MASK_BYTES // (4 * _keys(QUERY_BLOCK, length, window))), 1)


def _score_rows(heads: int, queries: int, length: int, window: int | None, size: int) -> int:
    """Queries of so many heads whose scores, of `size` bytes, are made at a time."""
    most = SCORE_BYTES // (heads * size)
    rows = most // length
    if window is not None:
        rows = max(rows, int((math.sqrt(window**2 + 4 * most) - window) / 2))  # rows · (window + rows) of them
    return max(min(rows, queries), 1)


def _blocks(
    queries: int, length: int, step: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of queries, at most `step` at a time, the keys that any of them sees, and which each sees [rows, keys]."""
    offset = length - queries
    for at in range(0, queries, step):
        to = min(at + step, queries)
        first = 0 if window is None else max(offset + at - window + 1, 0)
        own = torch.arange(offset + at, offset + to, device=device)[:, None]
        others = torch.arange(first, offset + to, device=device)
        seen = others <= own if window is None else (others <= own) & (others > own - window)
        yield slice(at, to), slice(first, offset + to), seen
