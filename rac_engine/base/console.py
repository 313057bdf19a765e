"""Progress for people while a job runs: numbered steps, notes, and one line that moves."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from typing import Self, TextIO

from rac_engine.base.errors import one_line
from rac_engine.base.sizes import format_seconds

_EVERY = 0.1  # seconds between two lines of progress on a terminal, and
_EVERY_IN_LOG = 10.0  # in a log
_COLUMNS = 80  # of a terminal that does not say how wide it is


class Console:
    """Progress of a job, as text on a stream, by default stderr; nothing at all if `quiet`.

    On a terminal progress redraws one line, as wide as the terminal is at the time; in a log it is a line every ten
    seconds, so that logs stay short and nobody wonders whether the job still lives. Leaving the console as a context
    wipes the line, so that what is printed next begins on an empty one. A stream that takes no more text ends the
    progress, never the job.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet or self.stream is None  # closed by whoever started the process
        self.live = not self.quiet and self.stream.isatty()
        self.began = time.monotonic()
        self._shown = self.began
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._wipe()
        self._write(f"{text}\n")

    def progress(self, what: object) -> None:
        """Say where the work is right now; the next call replaces it, and most calls do nothing."""
        now = time.monotonic()
        if self.quiet or now - self._shown < (_EVERY if self.live else _EVERY_IN_LOG):
            return
        self._shown = now
        line = f"  {one_line(str(what))}"
        if self.live:
            room = _columns(self.stream) - 1  # in the last column the cursor would go to the next line
            shown, width = _cut(line, room)
            self._write(f"\r{shown}{' ' * (min(self._width, room) - width)}")
            self._width = width
        else:
            self._write(f"{line}  [{format_seconds(now - self.began)}]\n")

    def step(self, number: int, count: int, name: str) -> None:
        """Print the heading of a step."""
        self._shown = time.monotonic()
        so_far = f"  ({format_seconds(time.monotonic() - self.began)} so far)" if number > 1 else ""
        self.say(f"[{number}/{count}] {name}{so_far}")

    def _wipe(self) -> None:
        if self._width:
            self._write(f"\r{' ' * min(self._width, _columns(self.stream) - 1)}\r")
            self._width = 0

    def _write(self, text: str) -> None:
        if self.quiet:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # full, closed, or at the end of a broken pipe
            self.quiet = True


def _columns(stream: TextIO) -> int:
    """Columns that a terminal has now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError, AttributeError):  # no terminal after all, as far as the system knows
        return _COLUMNS


def _cut(line: str, room: int) -> tuple[str, int]:
    """The beginning of a line that takes at most `room` columns, and the columns that it takes."""
    width = 0
    for at, char in enumerate(line):
        columns = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width + columns > room:
            return line[:at], width
        width += columns
    return line, width
