"""Whether a given answer is the expected one: as text, as a number, or as the same mathematics by math-verify.

math-verify (with sympy behind it) is asked in a process of its own, with limits on its time and memory: it sets alarms,
and what a model writes may be an expression that nobody can evaluate. This file, run as a program, is that process; it
imports nothing of the engine.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from importlib import metadata, util
from pathlib import Path
from types import TracebackType
from typing import IO

SECONDS = 5

"""Time that math-verify has to read an answer, and again to compare it."""

MEMORY = 4 << 30

LONGEST = 2000

"""Characters of an answer that math-verify is given."""

_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+|/[0-9]+)?")

# Numbers in a row: math-verify takes "3, 1, 2" for a set and "3 1 2" for a product, whatever their order.
_FIGURES = re.compile(r"[-+0-9.,;:/\s]*")


class Judge:
    """Compares answers; the process for mathematics is started when first needed and ends with the `with` block."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None = None
        self.how = "text and numbers"
        """The ways in which answers are compared, in words."""
        self._knows_mathematics = util.find_spec("math_verify") is not None
        if self._knows_mathematics:
            self.how += f", else by math-verify {metadata.version('math-verify')}"

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def same(self, expected: str, given: str | None) -> bool:
        """Whether two answers are one: the same text up to space, the same number, or the same expression."""
        if given is None:
            return False
        if "".join(expected.split()) == "".join(given.split()):
            return True
        numbers = _number(expected), _number(given)
        if None not in numbers or (_FIGURES.fullmatch(expected) and _FIGURES.fullmatch(given)):
            return numbers[0] is not None and numbers[0] == numbers[1]
        return self._knows_mathematics and max(len(expected), len(given)) <= LONGEST and self._ask(expected, given)

    def _ask(self, expected: str, given: str) -> bool:
        """Ask math-verify; False where it says nothing in time."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if self._answer(120) != "ready":  # once it has imported sympy
                self._stop()
                raise OSError("math-verify is installed but does not start; install it again, or remove it")
        with suppress(OSError, ValueError):
            assert self._worker.stdin is not None
            self._worker.stdin.write(json.dumps([expected, given]) + "\n")
            self._worker.stdin.flush()
            if (said := self._answer(4 * SECONDS)) is not None:
                return said == "true"
        self._stop()
        return False

    def _answer(self, seconds: float) -> str | None:
        worker = self._worker
        assert worker is not None and worker.stdout is not None
        ready, _, _ = select.select([worker.stdout], [], [], seconds)
        return worker.stdout.readline().strip() or None if ready else None

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _number(text: str) -> Fraction | None:
    """An integer, decimal or fraction, thousands set apart by commas or not."""
    plain = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.strip().strip("$").strip())
    if not _NUMBER.fullmatch(plain) or len(plain) > 1000:
        return None
    try:
        return Fraction(plain)
    except ZeroDivisionError:
        return None


def _serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer each line, [expected, given] as JSON, with a line: true or false."""
    from math_verify import parse, verify

    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=answers, flush=True)
    for line in questions:
        same = False
        with suppress(Exception):  # whatever sympy makes of it
            expected, given = (parse(f"${text}$", parsing_timeout=SECONDS) for text in json.loads(line))
            same = verify(expected, given, timeout_seconds=SECONDS)
        print("true" if same else "false", file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
