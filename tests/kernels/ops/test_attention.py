"""Attention of sequences behind one another, and of the newest token of each, against the definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rac_kernels import Scoring, decode_attention, packed_attention
from rac_kernels.ops import attention


@pytest.mark.parametrize("width", [16, 10])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_packed_attention_is_attention_of_each_sequence(
    monkeypatch: pytest.MonkeyPatch, window: int | None, sinks: bool, softcap: float | None, width: int
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    monkeypatch.setattr(attention, "SCORE_BYTES", 8 * 6 * 33 * 8)
    lengths = [33, 33, 20, 7, 7, 7, 1, 1]
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, sum(lengths), d, dtype=torch.float64) for heads, d in ((6, 16), (2, 16), (2, width)))
    extra = torch.randn(6, dtype=torch.float64) if sinks else None
    out = packed_attention(q, k, v, lengths, Scoring(0.3, window, softcap, extra))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        keys, values = (x[:, part].repeat_interleave(3, 0) for x in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        scores = 0.3 * q[:, part] @ keys.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if extra is not None:
            scores = torch.cat([scores, extra[:, None, None].expand(-1, length, 1)], dim=2)
        expected = (scores.softmax(-1)[:, :, :length] @ values).transpose(0, 1)
        torch.testing.assert_close(out[part], expected, rtol=1e-12, atol=1e-12)
        start += length


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_decoding_gives_the_last_row_of_attention(window: int | None, sinks: bool, softcap: float | None) -> None:
    """Places of the cache behind a row's last token hold zeros, as the cache that is decoded from does."""
    lengths, span = [9, 1, 5], 9
    extra = torch.randn(6, dtype=torch.float64) if sinks else None
    scoring = Scoring(0.3, window, softcap, extra)
    q = torch.randn(len(lengths), 6, 16, dtype=torch.float64)
    k, v = (torch.zeros(len(lengths), 2, span, d, dtype=torch.float64) for d in (16, 10))
    at = torch.arange(span)
    seen = torch.stack([(at < n) & (at >= n - (window or n)) for n in lengths])
    expected = []
    for row, length in enumerate(lengths):
        k[row, :, :length], v[row, :, :length] = (torch.randn(2, length, d, dtype=torch.float64) for d in (16, 10))
        one = packed_attention(q[row, :, None], k[row, :, :length], v[row, :, :length], [1], scoring)
        expected.append(one[0])
    found = decode_attention(q, k, v, seen, scoring)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_gradients_go_through() -> None:
    q, k, v = (torch.randn(heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for scoring in (Scoring(0.5), Scoring(0.5, 3, 2.0)):
        assert torch.autograd.gradcheck(lambda q, k, v, s=scoring: packed_attention(q, k, v, [4, 3], s), (q, k, v))


def test_no_sequence_at_all() -> None:
    assert packed_attention(*(torch.empty(2, 0, 4),) * 3, [], Scoring(1.0)).shape == (0, 2, 4)


@pytest.mark.parametrize("window", [None, 3, 40])
def test_scores_of_all_queries_and_keys_never_exist_together(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 4000)
    made: list[int] = []
    real = attention.eager_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        made.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return real(q, k, *rest)

    monkeypatch.setattr(attention, "eager_attention", noted)
    q, k, v = (torch.randn(heads, 500, 8) for heads in (6, 2, 2))
    packed_attention(q, k, v, [300, 100, 100], Scoring(0.3, window, 2.0))
    assert 2000 < max(made) <= 4000


def test_a_gpu_is_given_what_its_kernels_take_without_holding_scores() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention.is_fused(gpu, torch.bfloat16, 128, None) and attention.is_fused(cpu, torch.float32, 300, 5)
    for dtype, width, window in ((torch.float32, 128, None), (torch.bfloat16, 128, 4096), (torch.float16, 512, None)):
        assert not attention.is_fused(gpu, dtype, width, window)
