"""Error, schedule and steps of tuning, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from rac_kernels import Tuning, relative_error, rounded, squared_error
from rac_kernels.solvers.tuning import RATE, WARMING, rate_at


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_sums_over_tokens(weighted: bool) -> None:
    found, wanted = torch.randn(9, 4), torch.randn(9, 4)
    weights = torch.rand(9) if weighted else None
    own = torch.ones(9).double() if weights is None else weights.double()
    missed, whole = squared_error(found, wanted, weights)
    assert float(missed) == pytest.approx(float((own[:, None] * (found - wanted).double() ** 2).sum()), rel=1e-5)
    assert float(whole) == pytest.approx(float((own[:, None] * wanted.double() ** 2).sum()), rel=1e-5)


def test_parts_are_added_up_before_they_are_divided() -> None:
    parts = [(torch.tensor(1.0), torch.tensor(4.0)), (torch.tensor(2.0), torch.tensor(8.0))]
    assert relative_error(iter(parts)) == 0.25
    assert relative_error([(torch.tensor(3.0), torch.tensor(0.0))]) == 3
    assert relative_error([]) == 0


def test_the_rate_rises_and_falls_to_0() -> None:
    assert rate_at(0) == 0 and rate_at(1) == pytest.approx(0, abs=1e-12)
    assert rate_at(WARMING) == pytest.approx(RATE * (1 + math.cos(math.pi * WARMING)) / 2)
    assert rate_at(WARMING / 2) < rate_at(WARMING) > rate_at(0.5) > rate_at(0.9) > 0


def test_steps_bring_outputs_nearer_and_keep_the_mask() -> None:
    truth, x = torch.randn(6, 8), torch.randn(200, 8)
    mask = torch.rand(6, 8) < 0.5
    weight = (truth * mask).requires_grad_(True)
    wanted, errors = x @ truth.T, list[float]()
    tuning = Tuning([weight], 100 * len(x))
    for _ in range(100):
        missed, whole = squared_error(x @ weight.T, wanted)
        errors.append(float((missed / whole).detach()))
        tuning.step(missed, whole, len(x))
    residual = sum(
        float((x[:, keep] @ torch.linalg.lstsq(x[:, keep], aim[:, None]).solution - aim[:, None]).square().sum())
        for aim, keep in zip(wanted.T, mask, strict=True)
    )
    least = residual / float(wanted.square().sum())
    missed, whole = squared_error(x @ weight.T, wanted)
    assert least - 1e-6 <= float(missed / whole) < least + 0.1 * (errors[0] - least)
    assert bool((weight[~mask] == 0).all())


def test_zeros_are_stored_as_plus_0() -> None:
    weight = torch.tensor([1.0, -0.0, -1e-30, 0.5], requires_grad=True)
    stored = rounded(weight, torch.float16)
    assert stored.tolist() == [1.0, 0.0, 0.0, 0.5] and not stored.signbit().any() and not stored.requires_grad
    same = rounded(weight, torch.float32)
    assert same.data_ptr() != weight.data_ptr()
