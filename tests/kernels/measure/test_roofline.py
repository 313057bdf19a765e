"""The limits: counts by brute force on small sizes, and peaks that are possible."""

from __future__ import annotations

import pytest

from rac_kernels.measure import roofline


def test_counts() -> None:
    tokens, n, rows = 3, 7, 5
    triangle = [(i, j) for i in range(n) for j in range(i, n)]
    assert roofline.hessian_flops(tokens, n) == 2 * tokens * len(triangle)
    assert roofline.hessian_bytes(tokens, n, itemsize=2) == 2 * tokens * n + 2 * 4 * len(triangle)
    assert roofline.factor_bytes(n) == 2 * 4 * len(triangle)
    assert roofline.sweep_flops(rows, n) == pytest.approx(2 * rows * n * n / 2)
    assert roofline.sweep_bytes(rows, n, itemsize=2) == rows * n * (2 + 4) + 4 * len(triangle)
    # A Cholesky of n takes off a product of k columns for the k-th: the sum over k of k (n - k) multiply-adds.
    assert roofline.factor_flops(1000) == pytest.approx(sum(2 * k * (1000 - k) for k in range(1000)), rel=1e-3)
    assert roofline.cross_flops(tokens, n, rows) == 2 * tokens * n * rows
    assert roofline.cross_bytes(tokens, n, rows) == 2 * tokens * (n + rows) + 2 * 4 * n * rows
    assert roofline.refine_flops(rows, n, 3) == 5 * 2 * rows * n * n
    assert roofline.refine_bytes(rows, n, 3) == 5 * 4 * (n * n + 8 * rows * n)
    assert roofline.select_bytes(100) == 400
    assert roofline.column_norm_flops(tokens, n) == 2 * tokens * n
    assert roofline.column_norm_bytes(tokens, n) == 2 * tokens * n


def test_the_slower_of_arithmetic_and_memory_is_the_limit() -> None:
    peaks = {"bf16": 200.0, "fp16": 200.0, "fp32": 100.0, "tf32x3": 160.0, "bytes": 10.0}
    assert roofline.limit_seconds(400, 10, peaks, "bf16") == 2
    assert roofline.limit_seconds(400, 10, peaks, "tf32x3") == 2.5
    assert roofline.limit_seconds(400, 10, peaks) == 4
    assert roofline.limit_seconds(400, 80, peaks) == 8
    assert roofline.share_of_limit(16, 400, 80, peaks) == 0.5


def test_measured_peaks() -> None:
    peaks = roofline.measure_peaks("cpu", seconds=0.01)
    assert set(peaks) == {"bf16", "fp16", "fp32", "tf32x3", "bytes"}
    assert all(value > 1e8 for value in peaks.values())
