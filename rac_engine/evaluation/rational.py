"""Rational numbers in answers, exactly: decimals, fractions, mixed numbers, powers, factorials and sums of those."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>E[-+]?[0-9]+)?"
    r"|(?P<sign>\\frac|\\times|\\cdot|[-+*/^!(){}]))"
)

_SCIENTIFIC = re.compile(r"([0-9]\.[0-9]+)e(?=[-+]?[0-9])")  # 2e-5 may be twice Euler's number, less 5

_MIXED = re.compile(r"(-?)\s*([0-9]+)\s*(?:\s([0-9]+)/([0-9]+)|\\frac\{([0-9]+)\}\{([0-9]+)\})")

DECIMAL = re.compile(r"[-+]?[0-9]*\.([0-9]+)")

LONGEST = 1000  # characters of a number

_DEEPEST = 40  # brackets within one another

_BITS = 1 << 17  # of a number on the way

SIGNIFICANT = 6
"""Digits from which on a rounded decimal stands for a number that no decimal gives exactly."""


def rational(text: str) -> Fraction | None:
    """The number, or None for what is no rational number or too large to work with."""
    text = _SCIENTIFIC.sub(r"\1E", text.strip())
    if not text or len(text) > LONGEST:
        return None
    try:
        if mixed := _MIXED.fullmatch(text):
            whole, over, under = int(mixed[2]), int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
            return (whole + Fraction(over, under)) * (-1 if mixed[1] else 1) if over < under else None
        return _Reader(text).all()
    except (ValueError, ZeroDivisionError):
        return None


def same_number(expected: str, given: str) -> bool | None:
    """Whether two rational numbers are one; None unless both are rational numbers.

    A decimal of six digits or more stands for a fraction that it is the rounded value of, if no decimal is exact.
    """
    numbers = rational(expected), rational(given)
    if numbers[0] is None or numbers[1] is None:
        return None
    return numbers[0] == numbers[1] or rounds(expected, numbers[1]) or rounds(given, numbers[0])


def rounds(text: str, exact: Fraction) -> bool:
    """Whether `text` is a decimal of at least six digits that rounds a fraction which no decimal gives exactly."""
    decimal = DECIMAL.fullmatch(text.strip())
    rest = exact.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if decimal is None or rest == 1 or len(re.sub(r"^[-+]?[0.]*|\.", "", text.strip())) < SIGNIFICANT:
        return False
    return abs(Fraction(text.strip()) - exact) * 2 <= Fraction(1, 10 ** len(decimal[1]))


class _Reader:
    """Reads an expression of rational numbers by recursive descent. Raises `ValueError` for anything else."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str | Fraction] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found:
                raise ValueError(text)
            number, exponent = found["number"], found["exponent"]
            self._tokens.append(found["sign"] if number is None else _literal(number, exponent))
            at = found.end()
        self._at = self._depth = 0

    def all(self) -> Fraction:
        """The value of the whole text."""
        value = self._sum()
        if self._at < len(self._tokens):
            raise ValueError("more follows")
        return value

    def _next(self, *wanted: str) -> str | None:
        if self._at < len(self._tokens) and self._tokens[self._at] in wanted:
            self._at += 1
            return str(self._tokens[self._at - 1])
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._next("+", "-"):
            value = _bounded(value + self._product() * (1 if sign == "+" else -1))
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while True:
            if sign := self._next("*", r"\times", r"\cdot", "/"):
                right = self._factor()
            elif self._at < len(self._tokens) and self._tokens[self._at] == "(":
                sign, right = "*", self._factor()
            else:
                return value
            value = _bounded(value / right if sign == "/" else value * right)

    def _factor(self) -> Fraction:
        if sign := self._next("-", "+"):
            with_sign = self._deeper(self._factor)
            return -with_sign if sign == "-" else with_sign
        value = self._atom()
        while self._next("!"):
            if value.denominator > 1 or not 0 <= value <= 2000:
                raise ValueError("no factorial")
            value = Fraction(math.factorial(int(value)))
        if self._next("^"):
            power = self._deeper(self._factor)
            bits = max(abs(value.numerator), value.denominator).bit_length()
            if power.denominator > 1 or abs(power) * bits > _BITS:
                raise ValueError("no power that is rational, or a large one")
            value **= int(power)
        return value

    def _atom(self) -> Fraction:
        if self._next(r"\frac"):
            over, under = self._bracket("{"), self._bracket("{")
            return _bounded(over / under)
        for bracket in ("(", "{"):
            if self._at < len(self._tokens) and self._tokens[self._at] == bracket:
                return self._bracket(bracket)
        if self._at == len(self._tokens) or isinstance(number := self._tokens[self._at], str):
            raise ValueError("no number")
        self._at += 1
        return number

    def _bracket(self, kind: str) -> Fraction:
        if not self._next(kind):
            raise ValueError(f"no {kind}")
        value = self._deeper(self._sum)
        if not self._next(")" if kind == "(" else "}"):
            raise ValueError("not closed")
        return value

    def _deeper(self, read: Callable[[], Fraction]) -> Fraction:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        value = read()
        self._depth -= 1
        return value


def _literal(digits: str, exponent: str | None) -> Fraction:
    power = int((exponent or "E0")[1:])
    if abs(power) > LONGEST:
        raise ValueError("too large")
    return Fraction(digits.replace(",", "").rstrip(".") or "0") * Fraction(10) ** power


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > _BITS:
        raise ValueError("too large")
    return value
