"""Standard output and standard error of the command, whatever they are: closed, full, or of few characters.

Results are printed by `emit` alone. Where they cannot be, that is no failure of the job: it is told by `OutputLost`.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PLAIN = {
    "–": "-",
    "−": "-",
    "─": "-",
    "·": "-",
    "×": "x",
    "→": "->",
    "✗": "x",
    "✓": "+",
    "²": "^2",
    "³": "^3",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
"""What is printed for a character of ours that a terminal's encoding lacks; others are spelled out."""

_ERRORS = "rac_engine.plain"


class OutputLost(Exception):
    """Standard output takes no more text; `reason` says why, and is empty where its reader has only gone away."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def emit(text: str) -> None:
    """Print a result, and see that it has gone out. Raises `OutputLost` where it cannot."""
    _put(f"{text}\n")


def flush() -> None:
    """See that all has gone out that others have printed. Raises `OutputLost` where it cannot."""
    _put("")


def complain(text: str) -> None:
    """Print a line to standard error, if anybody can read it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


@contextmanager
def prepared_streams() -> Iterator[None]:
    """Within this, characters that a stream lacks are replaced, and no file gets the number of a closed stream."""
    _occupy()
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_ERRORS)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with suppress(OSError, ValueError):  # it flushes, and may be full
                stream.reconfigure(errors=errors)


def _put(text: str) -> None:
    if sys.stdout is None:  # closed by whoever started the process: nothing is wanted
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop()
        raise OutputLost("") from None
    except (OSError, ValueError) as error:
        _drop()
        raise OutputLost(getattr(error, "strerror", None) or str(error)) from None


def _drop() -> None:
    """Send what is left in standard output's buffer nowhere: Python would complain of it once more at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _occupy() -> None:
    """Give the numbers of closed standard streams to /dev/null, before a file of a job gets them.

    What a library prints would else be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _plain(error: UnicodeError) -> tuple[str, int]:
    """A handler of `codecs`: plain characters for those that an encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char) or ascii(char)[1:-1] for char in lacking), error.end


codecs.register_error(_ERRORS, _plain)
