"""The limits: counts by brute force on small sizes, and peaks that are possible."""

from __future__ import annotations

import pytest
import torch

from rac_kernels.measure import roofline
from rac_kernels.ops import column_norm, cross, factor, hessian, select, sweep
from rac_kernels.ops.limits import Limit
from rac_kernels.solvers import refine


def test_counts() -> None:
    tokens, n, rows = 3, 7, 5
    triangle = [(i, j) for i in range(n) for j in range(i, n)]
    assert hessian.limit(tokens, n) == Limit(2 * tokens * len(triangle), 2 * tokens * n + 2 * 4 * len(triangle), "bf16")
    assert factor.limit(n).moved == 2 * 4 * len(triangle)
    assert sweep.limit(rows, n).flops == pytest.approx(2 * rows * n * n / 2)
    assert sweep.limit(rows, n).moved == rows * n * (2 + 4) + 4 * len(triangle)
    # A Cholesky of n takes off a product of k columns for the k-th: the sum over k of k (n - k) multiply-adds.
    assert factor.limit(1000).flops == pytest.approx(sum(2 * k * (1000 - k) for k in range(1000)), rel=1e-3)
    assert factor.limit(n, matrices=3) == Limit(3 * factor.limit(n).flops, 3 * factor.limit(n).moved, "tf32x3")
    assert cross.limit(tokens, n, rows).flops == 2 * tokens * n * rows
    assert cross.limit(tokens, n, rows).moved == 2 * tokens * (n + rows) + 2 * 4 * n * rows
    assert refine.limit(rows, n, 3).flops == 5 * 2 * rows * n * n
    assert refine.limit(rows, n, 3).moved == 5 * 4 * (n * n + 8 * rows * n)
    assert select.limit(100).moved == 400
    assert column_norm.limit(tokens, n) == Limit(2 * tokens * n, 2 * tokens * n, "fp32")


def test_fp32_tokens_take_twice_the_bytes_of_bf16_ones_and_products_of_their_own() -> None:
    assert hessian.limit(3, 7, torch.float32).moved - hessian.limit(3, 7).moved == 2 * 3 * 7
    assert cross.limit(3, 7, 5, torch.float32).peak == "tf32x3"
    assert column_norm.limit(3, 7, torch.float32).moved == 4 * 3 * 7


def test_the_slower_of_arithmetic_and_memory_is_the_limit() -> None:
    peaks = {"bf16": 200.0, "fp16": 200.0, "fp32": 100.0, "tf32x3": 160.0, "bytes": 10.0}
    assert roofline.limit_seconds(Limit(400, 10, "bf16"), peaks) == 2
    assert roofline.limit_seconds(Limit(400, 10, "tf32x3"), peaks) == 2.5
    assert roofline.limit_seconds(Limit(400, 10, "fp32"), peaks) == 4
    assert roofline.limit_seconds(Limit(400, 80, "fp32"), peaks) == 8
    assert roofline.share_of_limit(16, Limit(400, 80, "fp32"), peaks) == 0.5


def test_measured_peaks() -> None:
    peaks = roofline.measure_peaks("cpu", seconds=0.01)
    assert set(peaks) == {"bf16", "fp16", "fp32", "tf32x3", "bytes"}
    assert all(value > 1e8 for value in peaks.values())
