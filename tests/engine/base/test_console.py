"""The line of progress: as wide as the terminal is now, wiped before results, and never a reason for a job to end."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from rac_engine.base.console import Console


class Terminal:
    """A terminal of the system's, with a width that can change, and what is on its line."""

    def __init__(self) -> None:
        self.reader, number = pty.openpty()
        self.stream: TextIO = os.fdopen(number, "w", encoding="utf-8")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self) -> str:
        data = b""
        while select.select([self.reader], [], [], 0.1)[0]:
            data += os.read(self.reader, 1 << 16)
        return data.decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.stream.close()
    os.close(made.reader)


def show(console: Console, what: str) -> None:
    console._shown = 0.0
    console.progress(what)


def test_progress_is_as_wide_as_the_terminal_is_now(terminal: Terminal) -> None:
    console = Console(stream=terminal.stream)
    for columns in (40, 200, 25):
        terminal.resize(columns)
        show(console, "x" * 300)
        assert terminal.read() == "\r  " + "x" * (columns - 3)
    show(console, "short")
    assert terminal.read() == "\r  short" + " " * 17
    terminal.resize(10)
    show(console, "数" * 20)  # two columns each
    assert terminal.read() == "\r  数数数"


def test_what_is_printed_behind_progress_begins_on_an_empty_line(terminal: Terminal) -> None:
    terminal.resize(80)
    with Console(stream=terminal.stream) as console:
        show(console, "checksums of 13 files")
    terminal.stream.write("OUT: done")
    terminal.stream.flush()
    *_, blank, result = terminal.read().split("\r")
    assert blank == " " * len("  checksums of 13 files") and result == "OUT: done"
    with pytest.raises(KeyError), Console(stream=terminal.stream) as console:
        show(console, "layer 1/2")
        raise KeyError
    assert terminal.read().endswith("\r")


def test_names_in_progress_do_not_command_the_terminal(terminal: Terminal) -> None:
    show(Console(stream=terminal.stream), "a\x1b[2J\nb")
    assert terminal.read() == "\r  a\\x1b[2J b"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stream_that_takes_no_more_ends_the_progress_and_not_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Console(stream=io.StringIO())
    closed.stream.close()
    monkeypatch.setattr(sys, "stderr", None)
    for console in (Console(stream=Full()), closed, Console()):
        with console:
            console.step(1, 2, "a")
            show(console, "b")
            console.say("c")
