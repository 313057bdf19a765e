"""Activations read back as they were written, wherever they live, and take no more memory than chunks of them."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_engine.base import faults
from rac_engine.base.errors import BadInput, Damaged
from rac_engine.calibrate.activations import Activations, Place, Storage

SPANS = [(0, 5), (5, 6), (6, 30), (30, 37)]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_is_read(place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.randn(37, 6).to(dtype)
    stored = Activations.make(37, 6, dtype, Storage("cpu", place, tmp_path))
    for start, stop in SPANS:
        stored.write(start, expected[start:stop].clone())
    for _ in range(3):  # each pass reads what the one before wrote, some of it still on its way
        for (start, stop), chunk in zip(SPANS, stored.each(SPANS), strict=True):
            assert torch.equal(chunk, expected[start:stop])
            stored.write(start, chunk + 1)
        expected = expected + 1
    assert torch.equal(stored.read(3, 33), expected[3:33])
    assert (len(stored), stored.nbytes) == (37, 37 * 6 * dtype.itemsize)
    assert list(tmp_path.iterdir()) == []
    stored.close()


@pytest.mark.parametrize("place", ["host", "disk"])
def test_nothing_and_single_tokens(place: Place, tmp_path: Path) -> None:
    none = Activations.make(0, 6, torch.float32, Storage("cpu", place, tmp_path))
    assert list(none.each([])) == []
    assert none.read(0, 0).shape == (0, 6)
    one = Activations.make(1, 1, torch.float32, Storage("cpu", place, tmp_path))
    one.write(0, torch.ones(1, 1))
    assert one.read(0, 1).item() == 1


def test_strided_values_are_stored_by_value(tmp_path: Path) -> None:
    stored = Activations.make(4, 3, torch.float32, Storage("cpu", "disk", tmp_path))
    values = torch.arange(12.0).view(3, 4).T
    stored.write(0, values)
    assert torch.equal(stored.read(0, 4), values)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_read_that_lies_is_found_out(number: int, tmp_path: Path) -> None:
    stored = Activations.make(37, 6, torch.bfloat16, Storage("cpu", "disk", tmp_path))
    stored.write(0, torch.randn(30, 6).bfloat16())  # the others are zeros yet
    faults.arm(f"flip:read:{number}")
    try:
        with pytest.raises(Damaged, match="activations were read back"):
            list(stored.each(SPANS))
    finally:
        faults.arm("")
        stored.close()


def test_a_pass_that_was_left_in_the_middle_harms_no_other(tmp_path: Path) -> None:
    stored = Activations.make(40, 3, torch.float32, Storage("cpu", "disk", tmp_path))
    values = torch.randn(40, 3)
    stored.write(0, values)
    spans = [(at, at + 4) for at in range(0, 40, 4)]
    next(stored.each(spans))
    assert torch.equal(torch.cat([chunk.clone() for chunk in stored.each(spans)]), values)


def test_the_next_pass_is_on_its_way_when_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first chunks are read meanwhile, once, and again only if they were written since."""
    spans = [(at, at + 4) for at in range(0, 20, 4)]
    stored = Activations.make(20, 3, torch.float32, Storage("cpu", "disk", tmp_path))
    values = torch.randn(20, 3)
    stored.write(0, values)
    preadv, starts = faults.preadv, queue.SimpleQueue[int]()

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        starts.put(offset // 12)
        return count

    def read(count: int) -> list[int]:
        return [starts.get(timeout=60) for _ in range(count)]

    monkeypatch.setattr(faults, "preadv", watched)
    for _ in stored.each(spans):
        pass
    assert read(7) == [0, 4, 8, 12, 16, 0, 4]
    for _ in stored.each(spans):
        pass
    assert read(5) == [8, 12, 16, 0, 4]
    stored.write(5, values[:2])
    values[5:7] = values[:2]
    assert torch.equal(torch.cat([chunk.clone() for chunk in stored.each(spans)]), values)
    assert read(7) == [0, 4, 8, 12, 16, 0, 4]
    stored.close()
    assert starts.empty()


def test_full_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(faults, "reserve", full)
    with pytest.raises(BadInput, match="free some space"):
        Activations.make(4, 3, torch.float32, Storage("cpu", "disk", tmp_path))


def test_error_of_the_writing_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Activations.make(8, 3, torch.float32, Storage("cpu", "disk", tmp_path))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(faults, "pwrite", fail)
    stored.write(0, torch.zeros(4, 3))
    with pytest.raises(OSError, match="Input/output"):
        stored.read(0, 4)


BOUNDED = """
import sys, torch
from pathlib import Path
from rac_engine.calibrate.activations import Activations, Storage

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10

torch.set_num_threads(1)
tokens, width, step = 40_000, 1024, 1000
spans = [(at, at + step) for at in range(0, tokens, step)]
for place in ("disk", "host"):
    stored = Activations.make(tokens, width, torch.float32, Storage("cpu", place, Path(sys.argv[1])))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    for start, stop in spans:
        stored.write(start, torch.full((step, width), float(start)))
    for (start, stop), chunk in zip(spans, stored.each(spans)):
        stored.write(start, chunk + 1)
    print(peak() - before)
"""


def test_on_disk_they_take_chunks_of_memory(tmp_path: Path) -> None:
    """160 MB of activations in chunks of 4 MB."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17),  # freed memory goes back at once
    }
    command = [sys.executable, "-c", BOUNDED, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    on_disk, on_host = (int(line) for line in done.stdout.split())
    assert on_host > 150e6
    assert on_disk < 10 * 4.1e6
