"""Causal attention of sequences that lie behind one another, without pads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

ATTENTION = "rac_packed"

_QUERY_BLOCK = 1024  # rows of a mask that exist at a time

_MASK_BYTES = 16 << 20  # of such a mask, at most, as fp32

_SCORE_BYTES = 64 << 20  # of attention scores that exist at a time, where they have to be computed in the open

_FUSED_WIDTH = 256  # of heads, at most, in the kernels that hold no scores


class KeyValues:
    """Keys and values of a sequence that goes through an attention in parts: transformers' cache, in its full size."""

    def __init__(self, length: int) -> None:
        self._length, self._seen = length, 0
        self._held: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Take key and value [1, heads, tokens, d] of the next tokens; returns those of all tokens so far."""
        if not self._held:
            self._held = tuple(x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key, value))
        first, self._seen = self._seen, self._seen + key.shape[2]
        for held, new in zip(self._held, (key, value), strict=True):
            held[:, :, first : self._seen] = new
        return tuple(held[:, :, : self._seen] for held in self._held)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: Sequence[int],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of sequences that lie behind one another, none of which sees another.

    query [1, heads, tokens, d], key [1, key-value heads, tokens, d], value [1, key-value heads, tokens, e], `lengths`
    adding up to tokens; fewer queries than keys are the last tokens of one sequence. `softcap` bounds the scores by
    softcap · tanh(score / softcap); `s_aux` [heads] are sinks, scores of a token that is always seen and has the value
    0. Exact: runs of sequences of equal length are one batch, nothing is padded; the scores of all queries and keys
    never exist together (see `attention_bytes`). Returns [1, tokens, heads, e] as
    transformers' attention functions do.
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    whole = key.shape[2] == query.shape[2]
    for start, length, count in _runs(lengths):
        q, k, v = (_unpack(x, start, length, count) if whole else x for x in (query, key, value))
        if softcap is None and s_aux is None and is_fused(q.device, q.dtype, q.shape[3], _within(sliding_window, k)):
            attended = _causal(q, k, v, scaling, sliding_window)
        else:
            attended = _causal_in_the_open(q, k, v, scaling, sliding_window, softcap, s_aux)
        out[0, start : start + length * count] = attended.transpose(1, 2).flatten(0, 1)
    return out, None


def is_fused(device: torch.device, dtype: torch.dtype, width: int, window: int | None) -> bool:
    """Whether PyTorch has a kernel for causal attention, without soft caps and sinks, that holds no scores.

    A GPU's knows neither masks, which a `window` needs, nor fp32 with fewer keys than queries.
    """
    return device.type == "cpu" or (window is None and dtype.itemsize == 2 and width <= _FUSED_WIDTH)


def attention_bytes(
    fused: bool, group: int, widths: int, tokens: int, length: int, window: int | None, masked: bool, size: int
) -> int:
    """Bytes that exist within `packed_attention` at most, beside its arguments and what it returns.

    Of `tokens` queries in sequences of up to `length` tokens, `group` query heads to a key, `widths` being those of a
    key and a value together; `masked` where a fused kernel is given a mask, in numbers of `size` bytes.
    """
    if fused:
        # As bool and as the kernel takes it, or as bool and what it is made of.
        rows = _mask_rows(length, window) if masked else 0
        return max(1 + size, 3) * rows * _keys(rows, length, window)
    rows = _score_rows(group, tokens, length, window, 4)
    keys = _keys(rows, length, window)
    scores = min(rows * keys, _SCORE_BYTES // 4 // group)
    # Scores and shares in fp32, the mask; and of a head, keys and values, queries and what they get.
    return scores * (8 * group + 3) + 4 * widths * (max(keys, min(tokens, length)) + rows * group)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Start, length and count of each run of sequences of equal length."""
    start, first = 0, 0
    for at in range(1, len(lengths) + 1):
        if at == len(lengths) or lengths[at] != lengths[first]:
            yield start, lengths[first], at - first
            start += lengths[first] * (at - first)
            first = at


def _unpack(x: Tensor, start: int, length: int, count: int) -> Tensor:
    """[1, heads, tokens, d] → [count, heads, length, d]"""
    return x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """[count, heads, queries, e] from q [count, heads, queries, d], k and v with the key-value heads.

    The queries are the last of the tokens that have keys.
    """
    width = v.shape[3]
    if width < q.shape[3]:
        # PyTorch's fast kernels want one width; columns of zeros change nothing.
        v = F.pad(v, (0, q.shape[3] - width))
    queries, length = q.shape[2], k.shape[2]
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": True}
    window = _within(window, k)
    if window is None and queries == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[..., :width]
    if window is None and q.is_cuda:
        # Flash attention knows this form, and no mask exists.
        bias: Any = causal_lower_right(queries, length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)[..., :width]
    out = torch.empty_like(q)
    for rows, columns, seen in _blocks(queries, length, _mask_rows(length, window), window, q.device):
        here = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        out[:, :, rows] = F.scaled_dot_product_attention(*here, attn_mask=seen, **options)
    return out[..., :width]


def _causal_in_the_open(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """As `_causal`, of what PyTorch's kernels do not know, soft caps and sinks, or would do with all scores at once.

    Of a key's head after the other, and of some queries at a time; scores in fp32 or better.
    """
    count, heads, queries, _ = q.shape
    group, window = heads // k.shape[1], _within(window, k)
    size = torch.promote_types(q.dtype, torch.float32).itemsize
    step = _score_rows(count * group, queries, k.shape[2], window, size)
    out = q.new_empty(count, heads, queries, v.shape[3])
    for rows, columns, seen in _blocks(queries, k.shape[2], step, window, q.device):
        for head in range(k.shape[1]):
            own, theirs = slice(head * group, (head + 1) * group), slice(head, head + 1)
            here = (q[:, own, rows], k[:, theirs, columns], v[:, theirs, columns])
            out[:, own, rows] = attend_in_the_open(*here, seen, scaling, softcap, None if sinks is None else sinks[own])
    return out


def _within(window: int | None, k: Tensor) -> int | None:
    """The window, unless all keys [count, heads, keys, d] are within it."""
    return None if window is None or k.shape[2] <= window else window


def _keys(rows: int, length: int, window: int | None) -> int:
    """How many keys so many queries in a row see, of a sequence of `length` tokens."""
    return length if window is None else min(length, window + rows)


def _mask_rows(length: int, window: int | None) -> int:
    """Queries that a mask is made for at a time."""
    return max(min(_QUERY_BLOCK, length, _MASK_BYTES // (4 * _keys(_QUERY_BLOCK, length, window))), 1)


def _score_rows(heads: int, queries: int, length: int, window: int | None, size: int) -> int:
    """Queries of so many heads whose scores, of `size` bytes, are made at a time."""
    most = _SCORE_BYTES // (heads * size)
    rows = most // length
    if window is not None:
        rows = max(rows, int((math.sqrt(window**2 + 4 * most) - window) / 2))  # rows · (window + rows) of them
    return max(min(rows, queries), 1)


def attend_in_the_open(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of q [count, heads, queries, d] on k, v [count, key-value heads, keys, d], all scores at once.

    `seen`, bool, is which keys each query sees, and is broadcast to [count, 1, 1, queries, keys]; `softcap` and `sinks`
    as in `packed_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    keys, values = (x.to(dtype)[:, :, None] for x in (k, v))
    scores = ((q.to(dtype) * scaling).unflatten(1, groups)) @ keys.mT
    if softcap is not None:
        scores = scores.div_(softcap).tanh_() * softcap  # gradients need what tanh gave
    scores.masked_fill_(~seen, -torch.inf)
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        sink = sinks.to(dtype).view(1, *groups, 1, 1)
        top = torch.maximum(scores.detach().amax(-1, keepdim=True), sink)
        shares = scores.sub_(top).exp_()
        shares = shares / (shares.sum(-1, keepdim=True) + (sink - top).exp())
    return (shares @ values).flatten(1, 2).to(q.dtype)


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


AttentionInterface.register(ATTENTION, packed_attention)
