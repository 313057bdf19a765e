"""Activations that a GPU computes on, on the device, in pinned memory and on disk: read back as they were written."""

from __future__ import annotations

import pytest
import torch

from rac_engine.calibrate.activations import Activations, Storage, host_tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPANS = [(at, min(at + 700, 5000)) for at in range(0, 5000, 700)]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_passes_read_what_the_one_before_wrote(place, tmp_path):
    """Chunks change on the device pass after pass, while others move; a slow kernel runs between reads and writes."""
    torch.manual_seed(0)
    expected = torch.randint(0, 100, (5000, 256)).to(torch.bfloat16)
    stored = Activations.make(5000, 256, torch.bfloat16, Storage("cuda", place, tmp_path))
    for start, stop in SPANS:
        stored.write(start, expected[start:stop].cuda())
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        for (start, stop), chunk in zip(SPANS, stored.each(SPANS), strict=True):
            assert chunk.is_cuda
            busy = (busy @ busy).clamp(-1, 1)
            after = chunk + 1
            stored.write(start, after)
            assert torch.equal(after.cpu(), expected[start:stop] + 1)
        expected = expected + 1
    assert torch.equal(stored.read(123, 4321).cpu(), expected[123:4321])
    stored.close()


@pytest.mark.parametrize("place", ["host", "disk"])
def test_the_device_holds_chunks_only(place, tmp_path):
    torch.cuda.synchronize()
    stored = Activations.make(200_000, 512, torch.bfloat16, Storage("cuda", place, tmp_path))
    spans = [(at, at + 2000) for at in range(0, 200_000, 2000)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for start, stop in spans:
        stored.write(start, torch.full((stop - start, 512), 1.0, dtype=torch.bfloat16, device="cuda"))
    for (start, _), chunk in zip(spans, stored.each(spans), strict=True):
        stored.write(start, chunk + 1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 10 * 2000 * 512 * 2
    stored.close()


def test_pinned_memory_is_pinned_and_takes_what_was_asked_for():
    held = host_tensor(1_000_003, torch.uint8, pin=True)
    assert held.is_pinned()
    assert held.nbytes == 1_000_003
    held.fill_(7)
    assert int(held.to("cuda", non_blocking=True).sum()) == 7 * 1_000_003
