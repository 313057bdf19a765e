"""A timeline of reading, moving, computing and writing each layer, to see what a job really waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LANES = ("read", "copy", "compute", "write")

"""Weights read and checked; activations on their way to and from device or disk; arithmetic; layers written."""


@dataclass
class _Row:
    start: float
    end: float
    busy: float = 0.0


class Timeline:
    """Seconds since it was made, by lane and layer. Any thread may add to it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, int], _Row] = {}
        self.layer = 0
        """The layer at work, to which `copy` counts."""

    @contextmanager
    def span(self, lane: str, layer: int | None = None) -> Iterator[None]:
        """The time within counts to a lane, of that layer or the one at work."""
        layer = self.layer if layer is None else layer
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(lane, layer, start, time.monotonic() - start)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time within does not count as computing, though it lies within a span that does."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add("compute", self.layer, start, start - time.monotonic(), end=start)

    def add(self, lane: str, layer: int, start: float, busy: float, end: float | None = None) -> None:
        """Add `busy` seconds, by default all from `start` (of `time.monotonic`)."""
        with self._lock:
            end = start + busy if end is None else end
            row = self._rows.setdefault((lane, layer), _Row(start, end))
            row.start, row.end, row.busy = min(row.start, start), max(row.end, end), row.busy + busy

    def rows(self) -> list[dict[str, Any]]:
        """An object a lane and layer: from when to when, and for how many seconds of that it worked."""
        with self._lock:
            found = sorted(self._rows.items(), key=lambda item: (LANES.index(item[0][0]), item[0][1]))
            return [
                {
                    "lane": lane,
                    "layer": layer,
                    "start": round(row.start - self._began, 4),
                    "end": round(row.end - self._began, 4),
                    "busy": round(row.busy, 4),
                }
                for (lane, layer), row in found
            ]

    def busy(self) -> dict[str, float]:
        """Seconds of work of each lane that worked at all."""
        totals: dict[str, float] = {}
        for row in self.rows():
            totals[row["lane"]] = totals.get(row["lane"], 0.0) + row["busy"]
        return {lane: round(seconds, 4) for lane, seconds in totals.items()}
