"""Which implementation a name or "auto" stands for, on devices that need not be there."""

from __future__ import annotations

import pytest
import torch

from rac_kernels.backends import cuda, gpu, native
from rac_kernels.backends.dispatch import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton on a GPU of capability 9.0, and CUDA kernels that run on any GPU."""
    monkeypatch.setattr(gpu, "LOADED", True)
    monkeypatch.setattr(gpu, "_refusals", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
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


@pytest.mark.parametrize(
    ("capability", "hip", "why"),
    [
        ((7, 5), None, "compute capability 7.5 is older than 8.0"),
        ((7, 0), None, "compute capability 7.0 is older than 8.0"),
        ((9, 4), "6.4.0", r"Triton for ROCm \(here 6.4.0\)"),
        ((11, 0), "7.0.1", r"Triton for ROCm \(here 7.0.1\)"),
    ],
)
def test_where_triton_is_refused_the_reference_runs(
    there: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose("auto", GPU, triton=True) == choose("auto", GPU, triton=True, cuda=True) == "reference"
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"'{backend}' does not run on cuda:0: {why}"):
            choose(backend, GPU, triton=True, cuda=True)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_from_8_0_on_triton_runs(there: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose("auto", GPU, triton=True) == choose("triton", GPU, triton=True) == "triton"


def test_on_mps_the_reference_runs(there: None) -> None:
    mps = torch.device("mps")
    assert choose("auto", mps, triton=True, cuda=True) == "reference"
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match="needs tensors on a GPU, not on mps"):
            choose(backend, mps, triton=True, cuda=True)
