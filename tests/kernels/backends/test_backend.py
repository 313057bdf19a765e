"""Which implementation a name or "auto" stands for, on devices that need not be there."""

from __future__ import annotations

import pytest
import torch

from rac_kernels.backends import cuda, gpu, native
from rac_kernels.backends.dispatch import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton, and CUDA kernels that run on any GPU."""
    monkeypatch.setattr(gpu, "LOADED", True)
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(cuda, "why_unusable", lambda device: "" if device.type == "cuda" else "no GPU")


def test_auto(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", GPU, triton=True, cuda=True) == "cuda"
    assert choose("auto", GPU, triton=True) == "triton"
    assert choose("auto", GPU) == "reference"
    assert choose("auto", CPU, triton=True, cuda=True) == ("native" if native.available() else "reference")
    assert choose("auto", torch.device("meta"), triton=True, cuda=True) == "reference"
    monkeypatch.setattr(cuda, "why_unusable", lambda device: "no code for it")
    assert choose("auto", GPU, triton=True, cuda=True) == "triton"
    monkeypatch.setattr(gpu, "LOADED", False)
    assert choose("auto", GPU, triton=True, cuda=True) == "reference"


def test_a_name_is_taken_or_refused(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("cuda", GPU, triton=True, cuda=True) == "cuda"
    assert choose("triton", GPU, triton=True, cuda=True) == "triton"
    assert choose("reference", GPU, triton=True, cuda=True) == "reference"
    for backend, device, kernels, message in (
        ("cuda", GPU, {"triton": True}, "no CUDA kernel"),
        ("cuda", CPU, {"triton": True, "cuda": True}, "needs tensors on a GPU, not on cpu"),
        ("triton", CPU, {"triton": True, "cuda": True}, "needs tensors on a GPU, not on cpu"),
        ("triton", GPU, {}, "no Triton kernel"),
        ("native", GPU, {}, "needs tensors on the CPU"),
        ("magic", CPU, {}, "must be one of auto, reference, native, triton, cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(backend, device, **kernels)
    monkeypatch.setattr(cuda, "why_unusable", lambda device: "no code for it")
    with pytest.raises(native.NativeMissing, match="'cuda' on cuda:0: no code for it"):
        choose("cuda", GPU, triton=True, cuda=True)
