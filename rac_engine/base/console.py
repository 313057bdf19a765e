"""Progress for people while a job runs: numbered steps, notes, and one line that moves."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rac_engine.base.sizes import format_seconds

_EVERY = 0.1  # seconds between two lines of progress on a terminal, and
_EVERY_IN_LOG = 10.0  # in a log


class Console:
    """Progress of a job, as text on a stream, by default stderr; nothing at all if `quiet`.

    On a terminal progress redraws one line; in a log it is a line every ten seconds, so that logs stay short and nobody
    wonders whether the job still lives.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self._shown = self.began
        self._width = 0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.quiet:
            self._clear()
            print(text, file=self.stream, flush=True)

    def progress(self, what: object) -> None:
        """Say where the work is right now; the next call replaces it, and most calls do nothing."""
        now = time.monotonic()
        if self.quiet or now - self._shown < (_EVERY if self.live else _EVERY_IN_LOG):
            return
        self._shown = now
        line = f"  {what}"
        if self.live:
            print(f"\r{line[:110]}".ljust(self._width + 1), end="", file=self.stream, flush=True)
            self._width = min(len(line), 110)
        else:
            print(f"{line}  [{format_seconds(now - self.began)}]", file=self.stream, flush=True)

    def step(self, number: int, count: int, name: str) -> None:
        """Print the heading of a step."""
        self._shown = time.monotonic()
        so_far = f"  ({format_seconds(time.monotonic() - self.began)} so far)" if number > 1 else ""
        self.say(f"[{number}/{count}] {name}{so_far}")

    def _clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=self.stream)
            self._width = 0
