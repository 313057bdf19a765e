"""Limits on what a job takes of its machine, and that they end with it."""

from __future__ import annotations

import os

import pytest
import torch

from rac_engine.base.errors import BadInput
from rac_engine.engine.limits import allocator_restored, device_name, limited_gpu

GPU = "cuda:0"


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Fractions of an 8 GiB GPU that torch was told to keep to, the first of them before the job."""
    told = [0.75]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: told[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: told.append(fraction))
    return told


@pytest.mark.parametrize(("limit", "share"), [(2 << 30, 0.25), (None, 1.0)])
def test_a_gpu_is_limited_for_the_job_alone(fractions: list[float], limit: int | None, share: float) -> None:
    with limited_gpu(GPU, limit):
        assert fractions == [0.75, share]
    assert fractions == [0.75, share, 0.75]


def test_the_limit_ends_with_a_job_that_fails(fractions: list[float]) -> None:
    with pytest.raises(BadInput), limited_gpu(GPU, 1 << 30):
        raise BadInput("no")
    assert fractions == [0.75, 0.125, 0.75]


def test_a_cpu_has_no_such_limit(fractions: list[float]) -> None:
    with limited_gpu("cpu", None):
        assert fractions == [0.75]
    assert fractions == [0.75]


@pytest.mark.parametrize("chosen", [None, "max_split_size_mb:64"])
def test_the_allocator_is_set_for_the_job_alone_and_not_where_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if chosen is None:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    else:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", chosen)
    with allocator_restored():
        assert device_name("cpu") == "cpu"
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == (chosen or "expandable_segments:True")
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == chosen
