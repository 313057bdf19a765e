"""Attention of sequences behind one another, and of the newest token of each, against the definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rac_kernels import Scoring, decode_attention, packed_attention
from rac_kernels.backends import native
from rac_kernels.ops import attention
from rac_kernels.testing import CPU, running


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


@pytest.mark.parametrize("name", [name for name in CPU if name != "reference"])
@pytest.mark.parametrize(
    ("heads", "widths", "lengths"),
    [
        ((9, 3), (64, 64), [131, 64, 64, 7, 1]),
        ((2, 2), (24, 40), [33]),
        ((4, 1), (1, 1), [1, 2, 3, 65]),
        ((3, 1), (130, 70), [40, 5]),
    ],
)
def test_short_sequences(name: str, heads: tuple[int, int], widths: tuple[int, int], lengths: list[int]) -> None:
    """Against fp64, with NaN behind the arguments' ends and among their rows."""
    tokens, (d, e) = sum(lengths), widths
    own, others = heads

    def made(count: int, width: int) -> torch.Tensor:
        around = torch.full((tokens + 2, count + 1, width + 3), torch.nan, dtype=torch.bfloat16)
        around[1:-1, :count, :width] = 2 * torch.randn(tokens, count, width)
        return around[1:-1, :count, :width].transpose(0, 1)

    q, k, v = made(own, d), made(others, d), made(others, e)
    scoring = Scoring(d**-0.5)
    with running(name) as backend:
        found = packed_attention(q, k, v, lengths, scoring, backend)
    exact = packed_attention(q.double(), k.double(), v.double(), lengths, scoring)
    plain = packed_attention(q, k, v, lengths, scoring, "reference")
    error, allowed = ((x.double() - exact).abs().max() for x in (found, plain))
    assert found.shape == (tokens, own, e) and error <= 2 * allowed + 1e-6


@pytest.mark.skipif(not native.has("attention"), reason="needs the native extension, built from these sources")
def test_the_native_kernel_takes_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    real = attention._short_op

    def noted(out: torch.Tensor, *rest: Any) -> None:
        taken.append(rest[3])
        real(out, *rest)

    monkeypatch.setattr(attention, "_short_op", noted)
    monkeypatch.setattr(attention, "SHORT", 20)
    q, k, v = (torch.randn(heads, 64, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    lengths = [30, 20, 9, 5]
    out = packed_attention(q, k, v, lengths, Scoring(0.3))
    assert taken == [[20, 9, 5]]
    torch.testing.assert_close(out, packed_attention(q, k, v, lengths, Scoring(0.3), "reference"), rtol=0.02, atol=0.02)
    packed_attention(q, k, v, lengths, Scoring(0.3, window=9))
    assert taken[1:] == [[9, 5]]
    for scoring in (Scoring(0.3, softcap=2.0), Scoring(0.3, sinks=torch.zeros(4))):
        packed_attention(q, k, v, lengths, scoring)
    packed_attention(q.float(), k.float(), v.float(), lengths, Scoring(0.3))
    packed_attention(q[:, :1], k[:, :7], v[:, :7], [1], Scoring(0.3))
    packed_attention(q.requires_grad_(), k, v, lengths, Scoring(0.3))
    assert len(taken) == 2


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    """The queries that see it get NaN, as in PyTorch's kernel; no others."""
    q, k, v = (torch.randn(heads, 20, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    k[0, 13, 3] = torch.nan
    bad = packed_attention(q, k, v, [10, 10], Scoring(0.3)).isnan().any(-1)
    assert bad[13:, :2].all() and not bad[:13].any() and not bad[:, 2:].any()


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


def test_attention_that_plans_for_each_shape_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's, in whole sequences, in parts and in decoding; afterwards it may be chosen as before."""
    allowed: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(*given: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*given, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watch)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q, k, v = (torch.randn(2, 12, 8) for _ in range(3))
    packed_attention(q, k, v, [7, 5], Scoring(0.3), backend="reference")
    packed_attention(q[:, 8:], k, v, [4], Scoring(0.3), backend="reference")
    decode_attention(q[:, None, 0], k[:, None], v[:, None], torch.ones(2, 12, dtype=torch.bool), Scoring(0.3))
    assert allowed == [False] * 4 and before
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_attention(q, k, v, [12], Scoring(0.3), backend="reference")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
