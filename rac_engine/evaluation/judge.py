"""Whether a given answer is the expected one: as text, as a number, or as the same mathematics by math-verify.

math-verify (with sympy behind it) is asked in a process of its own, with limits on its time and memory: it sets alarms,
and what a model writes may be an expression that nobody can evaluate. `mathematics.py` is that process.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata, util
from types import TracebackType

from rac_engine.evaluation import mathematics
from rac_engine.evaluation.compare import same_answer
from rac_engine.evaluation.mathematics import SECONDS

LONGEST = 2000
"""Characters of an answer that is compared otherwise than as text."""


class Judge:
    """Compares answers; the process for mathematics is started when first needed and ends with the `with` block."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None = None
        self._until = 0.0
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
        if expected.split() == given.split():
            return True
        if max(len(expected), len(given)) > LONGEST:
            return False
        self._until = time.monotonic() + 4 * SECONDS
        return same_answer(expected, given, self._same_mathematics)

    def _same_mathematics(self, expected: str, given: str) -> bool:
        """Whether math-verify takes two parts of answers for one; False once their time is over."""
        left = self._until - time.monotonic()
        return self._knows_mathematics and left > 0 and self._ask(expected, given, left)

    def _ask(self, expected: str, given: str, seconds: float) -> bool:
        """Ask math-verify; False where it says nothing in time."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", mathematics.__file__],
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
            if (said := self._answer(seconds)) is not None:
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
