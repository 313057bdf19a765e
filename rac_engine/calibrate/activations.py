"""The activations of all calibration tokens, kept on the device, in host memory, or in a file.

Between two layers they are all that is kept of the calibration. They are gone through chunk by chunk: while one is
computed on, the next is on its way to the device and the one before on its way back, so that neither is waited for.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rac_engine.base import faults
from rac_engine.base.errors import Damaged
from rac_engine.base.files import disk_errors, pages, reserve, write_at
from rac_engine.checkpoint import bytes_of
from rac_engine.jobs.timeline import Timeline

Place = Literal["device", "host", "disk"]

"""A home of activations: on the device; in host memory, pinned where the device is a GPU; or in a file."""

Span = tuple[int, int]

"""Tokens from the first up to the second."""

AHEAD = 2  # chunks in flight in each direction: one is used or filled while the other moves


@dataclass(frozen=True)
class Storage:
    """The home of activations, and the device that computes on them."""

    device: str = "cpu"
    place: Place = "host"
    folder: Path | None = None
    """Folder of the file, for the disk; None: the system's for temporary files."""
    timeline: Timeline | None = None
    """Record of the time that moving takes, and waiting for it."""


IN_MEMORY = Storage()  # for a CPU that computes


class Activations(ABC):
    """A matrix [tokens, width] of activations. Made by `Activations.make`.

    Chunks of it are read and written on `device`. What is written is read back by every later read, though it may still
    be on its way when `write` returns. One thread at a time.
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, storage: Storage) -> None:
        self.tokens, self.width, self.dtype, self.device = tokens, width, dtype, storage.device
        self._timeline = storage.timeline or Timeline()

    @staticmethod
    def make(tokens: int, width: int, dtype: torch.dtype, storage: Storage = IN_MEMORY) -> Activations:
        """Room for [tokens, width], not filled.

        On disk it is a file that has its whole size at once and no name, so that nothing is left of it when the process
        ends, however it ends. Raises `BadInput` where the disk is full.
        """
        if storage.place == "disk":
            return _OnDisk(tokens, width, dtype, storage)
        if storage.place == "host" and torch.device(storage.device).type == "cuda":
            return _Pinned(tokens, width, dtype, storage)
        return _Resident(tokens, width, dtype, storage)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.tokens * self.width * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens `start` up to `stop` [stop − start, width]. Not to be written to; holds until the next read."""
        return next(self.each([(start, stop)]))

    @abstractmethod
    def each(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        """The tokens of each span in turn, the next ones on their way while these are used.

        Each holds until the next. Meanwhile only those that have been given out may be written.
        """

    @abstractmethod
    def write(self, start: int, values: Tensor) -> None:
        """Put values [n, width] in the place of tokens `start` up to `start` + n. They must not be changed later."""

    def room(self, start: int, stop: int) -> Tensor | None:
        """The place of tokens `start` up to `stop` [stop − start, width], to be filled in place of a `write`.

        None where what is written has a way to go.
        """
        return None

    def prepare(self, spans: Sequence[Span]) -> None:  # noqa: B027 - most have nothing to fetch
        """Start to fetch the first of the spans for an `each` to come, while something else is done."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close files and threads. Nothing can be read or written any more."""

    def __len__(self) -> int:
        return self.tokens


class _Resident(Activations):
    """Activations on the device, or in the memory of the CPU that computes: reading moves nothing."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__(tokens, width, dtype, storage)
        if torch.device(self.device).type == "cpu":
            flat = host_tensor(tokens * width, dtype)
        else:
            flat = torch.empty(tokens * width, dtype=dtype, device=self.device)
        self._all = flat.view(tokens, width)

    def each(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        return (self._all[start:stop] for start, stop in spans)

    def room(self, start: int, stop: int) -> Tensor | None:
        return self._all[start:stop]

    def write(self, start: int, values: Tensor) -> None:
        self._all[start : start + len(values)] = values


class _Transfer:
    """Chunks on their way between host memory and a GPU, each direction on a stream of its own."""

    def __init__(self, device: str, timeline: Timeline) -> None:
        self.device, self._timeline = device, timeline
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, device=device) for _ in range(AHEAD)]
        self._turn = 0
        self._leaving: deque[torch.cuda.Event] = deque()
        self._timed: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def to_device(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start to copy pinned `source` to the device; returns where it will be, and the event of its arrival."""
        self._turn = (self._turn + 1) % AHEAD
        if self._buffers[self._turn].numel() < source.numel() or self._buffers[self._turn].dtype != source.dtype:
            self._buffers[self._turn] = torch.empty(source.numel(), dtype=source.dtype, device=self.device)
        target = self._buffers[self._turn][: source.numel()].view(source.shape)
        # What was computed from the chunk that lay in this buffer has been launched: wait for it, and for what is
        # being written to where we read from.
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        self._in.wait_stream(self._out)
        return target, self._copy(self._in, source, target)

    def wait(self, arriving: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """The chunk that `to_device` has begun to copy; the current stream waits for it."""
        target, arrived = arriving
        torch.cuda.current_stream(self.device).wait_event(arrived)
        return target

    def to_host(self, values: Tensor, target: Tensor) -> torch.cuda.Event:
        """Start to copy `values` from the device to pinned `target`; returns the event of its arrival."""
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        left = self._copy(self._out, values, target)
        values.record_stream(self._out)
        self._leaving.append(left)
        # Launching runs ahead of the device: without this, every chunk of a pass might wait in device memory.
        while len(self._leaving) > AHEAD:
            with self._timeline.waiting():
                self._leaving.popleft().synchronize()
        return left

    def synchronize(self) -> None:
        """Wait until nothing is on its way, so that the host memory of all chunks may be used for others, or freed."""
        with self._timeline.waiting():
            self._in.synchronize()
            self._out.synchronize()

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy on that stream; returns the event of its end."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        self._timed.append((time.monotonic(), begin, end))
        while self._timed and self._timed[0][2].query():
            start, first, last = self._timed.popleft()
            self._timeline.add("copy", self._timeline.layer, start, first.elapsed_time(last) / 1000)
        return end


class _Pinned(Activations):
    """Activations in page-locked host memory, for a GPU that computes on a chunk while the next one is copied."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__(tokens, width, dtype, storage)
        self._all = host_tensor(tokens * width, dtype, pin=True).view(tokens, width)
        self._transfer = _Transfer(self.device, self._timeline)

    def each(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        for number in range(len(spans)):
            for start, stop in spans[number + len(coming) : number + AHEAD]:
                coming.append(self._transfer.to_device(self._all[start:stop]))
            yield self._transfer.wait(coming.popleft())

    def write(self, start: int, values: Tensor) -> None:
        self._transfer.to_host(values, self._all[start : start + len(values)])

    def close(self) -> None:
        self._transfer.synchronize()


class _OnDisk(Activations):
    """Activations in a file, read ahead and written behind by a thread each, through a few chunks of host memory.

    A CRC-32 of each token stays in memory: what is read is held against it (`Damaged`).
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__(tokens, width, dtype, storage)
        self._folder = storage.folder or Path(tempfile.gettempdir())
        with disk_errors(self._folder):
            self._fd = _nameless_file(self._folder)
            self._close = weakref.finalize(self, os.close, self._fd)
            if self.nbytes:
                reserve(self._fd, self.nbytes)
        self._row = width * dtype.itemsize
        self._sums = np.full(tokens, zlib.crc32(bytes(self._row)), np.uint32)  # the file is zeros as yet
        on_gpu = torch.device(self.device).type == "cuda"
        self._transfer = _Transfer(self.device, self._timeline) if on_gpu else None
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._in = [torch.empty(0, dtype=dtype) for _ in range(AHEAD)]
        self._out = [torch.empty(0, dtype=dtype) for _ in range(AHEAD)]
        self._turn = 0
        self._writes: deque[tuple[Span, Future[None]]] = deque()
        self._ready: list[tuple[Span, Future[Tensor]]] = []

    def prepare(self, spans: Sequence[Span]) -> None:
        if self._transfer is not None:
            self._transfer.synchronize()  # the last chunks may still leave the buffers that are read into
        self._ready = [(span, self._fetch(span, number)) for number, span in enumerate(spans[:AHEAD])]

    def each(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        if [span for span, _ in self._ready] != list(spans[:AHEAD]):
            self.prepare(spans)
        reads = deque(read for _, read in self._ready)
        self._ready = []
        if self._transfer is None:
            for number in range(len(spans)):
                for at in range(number + len(reads), min(number + AHEAD, len(spans))):
                    reads.append(self._fetch(spans[at], at))
                yield self._wait(reads.popleft())
            self._prepare_again(spans)
            return
        coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        for number in range(len(spans)):
            for at in range(number + len(coming), min(number + AHEAD, len(spans))):
                chunk = self._wait(reads.popleft() if reads else self._fetch(spans[at], at))
                coming.append(self._transfer.to_device(chunk))
            arriving = coming.popleft()
            if number + AHEAD < len(spans):
                arriving[1].synchronize()  # its host buffer is free
                reads.append(self._fetch(spans[number + AHEAD], number))
            yield self._transfer.wait(arriving)
        self._prepare_again(spans)

    def _prepare_again(self, spans: Sequence[Span]) -> None:
        """Fetch the first spans again after a pass over all tokens: the next pass will ask for the same chunks."""
        if sum(stop - start for start, stop in spans) == self.tokens:
            self.prepare(spans)

    def _wait(self, reading: Future[Tensor]) -> Tensor:
        with disk_errors(self._folder), self._timeline.waiting():
            return reading.result()

    def _fetch(self, span: Span, number: int) -> Future[Tensor]:
        start, stop = span
        turn = number % AHEAD
        buffer = self._in[turn] = self._room(self._in[turn], (stop - start) * self.width)
        target = buffer[: (stop - start) * self.width]
        pending = [write for (first, last), write in self._writes if first < stop and start < last]

        def read() -> Tensor:
            for write in pending:
                write.result()
            with self._timeline.span("copy"):
                _read(self._fd, bytes_of(target), start * self._row)
                if not np.array_equal(self._sum(target), self._sums[start:stop]):
                    raise Damaged(
                        f"{self._folder}: activations were read back from disk with other bytes than were written; "
                        "disk or memory fail"
                    )
            return target.view(stop - start, self.width)

        return self._reader.submit(read)

    def write(self, start: int, values: Tensor) -> None:
        while len(self._writes) >= AHEAD:
            with disk_errors(self._folder), self._timeline.waiting():
                self._writes.popleft()[1].result()
        stop = start + len(values)
        if any(start < last and first < stop for (first, last), _ in self._ready):
            self._ready = []  # read too early
        values = values.to(self.dtype).contiguous()
        left: torch.cuda.Event | None = None
        if self._transfer is not None:
            turn = self._turn = (self._turn + 1) % AHEAD
            self._out[turn] = self._room(self._out[turn], values.numel())
            target = self._out[turn][: values.numel()].view(values.shape)
            left, values = self._transfer.to_host(values, target), target

        def put() -> None:
            if left is not None:
                left.synchronize()
            with self._timeline.span("copy"):
                self._sums[start : start + len(values)] = self._sum(values)
                write_at(self._fd, bytes_of(values), start * self._row)

        self._writes.append(((start, stop), self._writer.submit(put)))

    def close(self) -> None:
        self._reader.shutdown()
        self._writer.shutdown()
        if self._transfer is not None:
            self._transfer.synchronize()
        self._close()

    def _sum(self, values: Tensor) -> np.ndarray:
        """CRC-32 of each token [n] uint32."""
        data = bytes_of(values)
        return np.array(
            [zlib.crc32(data[at : at + self._row]) for at in range(0, len(data), self._row or 1)], np.uint32
        )

    def _room(self, buffer: Tensor, elements: int) -> Tensor:
        if buffer.numel() >= elements:
            return buffer
        return host_tensor(elements, self.dtype, pin=self._transfer is not None)


def host_tensor(elements: int, dtype: torch.dtype, pin: bool = False) -> Tensor:
    """An unfilled vector in memory outside of the heap, page-locked with `pin` (see `checkpoint.pages`)."""
    if elements == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(pages(elements * dtype.itemsize, pin), dtype=dtype)


def _nameless_file(folder: Path) -> int:
    with suppress(OSError, AttributeError):  # not every file system can
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fd, name = tempfile.mkstemp(dir=folder, prefix=".activations-")
    os.unlink(name)
    return fd


def _read(fd: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = faults.preadv(fd, [target[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise OSError(f"the file of activations ends before byte {offset + len(target)}")
        done += count


def storing_bytes(place: Place, on_gpu: bool, whole: int, chunk: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes by purpose that activations take on the device and on the host, and those in files.

    `whole` are the bytes of all tokens, `chunk` those of a chunk. On a CPU the device is the host.
    """
    device, host = dict[str, int](), dict[str, int]()
    coming, going = AHEAD * chunk, (AHEAD + 1) * chunk
    if place == "device":
        device["activations"] = whole
    elif place == "host":
        host["activations"] = whole
    if on_gpu and place != "device":
        device["chunks of activations moving"] = coming + going
    if place == "disk":
        host["chunks of activations moving"] = coming + (AHEAD * chunk if on_gpu else going)
    return device, host, whole if place == "disk" else 0
