"""The process that asks math-verify: run as a program, it answers each line, [expected, given] as JSON.

It imports nothing of the engine. math-verify compares numbers to six decimals and leaves out what it cannot read, so
it is given the answer alone, and where it says that two are one, they are held against each other to fifty digits.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from typing import IO, Any

SECONDS = 5
"""Time that math-verify has to read an answer, and again to compare it."""

MEMORY = 4 << 30

_DIGITS = 50

_DECIMAL = re.compile(r"[-+]?[0-9]*\.([0-9]+)")


def _reader() -> Any:
    """A function from text to what math-verify reads in it: all of it, or nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    form = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    latex = LatexExtractionConfig(normalization_config=form, boxed_match_priority=-1)

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(
            f"${text}$",
            extraction_config=[latex],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=SECONDS,
        )
        return found

    return read


def differ(expected: Any, given: Any, texts: tuple[str, str]) -> bool:
    """Whether two expressions that math-verify takes for one are not, by their values to fifty digits.

    Symbols stand for a number each. What has no value is not said to differ. A decimal differs from a number that it
    does not round.
    """
    from sympy import Float, MatrixBase, Rational

    if isinstance(expected, MatrixBase) and isinstance(given, MatrixBase):
        return any(differ(*pair, texts=("", "")) for pair in zip(expected.flat(), given.flat(), strict=True))
    symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
    numbers = {symbol: Rational(7 + 4 * index, 5 + 2 * index) for index, symbol in enumerate(symbols)}
    values = [each.doit().subs(numbers).evalf(_DIGITS) for each in (expected, given)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    apart, size = abs(values[0] - values[1]), max(abs(value) for value in values)
    for text in texts:
        if decimal := _DECIMAL.fullmatch(text.strip()):
            significant = len(re.sub(r"^[-+]?[0.]*|\.", "", text.strip()))
            return bool(significant < 6 or 2 * apart > Float(10, _DIGITS) ** -len(decimal[1]))
    exact = not (expected.has(Float) or given.has(Float))
    return bool(apart > size * Float(10, _DIGITS) ** (-40 if exact else -12))


def _serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer each line, [expected, given] as JSON, with a line: true or false."""
    from math_verify import verify
    from math_verify.utils import timeout

    read, apart = _reader(), timeout(timeout_seconds=SECONDS)(differ)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=answers, flush=True)
    for line in questions:
        same = False
        with suppress(Exception):  # whatever sympy makes of it
            texts = json.loads(line)
            expected, given = (read(text) for text in texts)
            same = bool(expected and given) and verify(expected, given, timeout_seconds=SECONDS)
            if same:
                with suppress(AttributeError, TypeError):  # relations and sets have no values
                    same = not apart(expected[0], given[0], tuple(texts))
        print("true" if same else "false", file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
