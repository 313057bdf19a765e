"""Units of answers: what may be left out, and what says that two equal numbers are not one answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from rac_engine.evaluation.rational import rational
from rac_engine.evaluation.written import without_text

_TEXT_UNIT = re.compile(r"(.*?[^\s\\])\s*((?:\\text\{[^{}]*\}(?:\s*\^\s*\{?[0-9]\}?)?[\s./]*)+(?:[CFK]|[a-z]+)?)")

_SHORT = (
    r"(?:[cdkm]?m|[km]?g|[mk]?[lL]|ft|hr?s?|min|oz|lbs?|mi|yds?|in|sec|mph|kph|km/h|m/s)(?:\^\{?[23]\}?)?(?![A-Za-z])"
)

_PLAIN_UNIT = re.compile(
    rf"(.*?)(?:\s*({_SHORT}(?:/[a-z]+)?)|\s+([A-Za-z]{{3,}}(?:\^\{{?[23]\}}?)?(?:[\s/-]+[A-Za-z]+(?:\^\{{?[23]\}}?)?){{0,4}}))"
)

_NO_UNIT = re.compile(
    r"(?i:and|or|to|plus|minus|times|by|over|mod|is|are|not|than|more|less|least|most|about|percent|divided|squared|cubed|"
    r"hundred|thousand|million|billion|trillion|dozen|hal(?:f|ves)|thirds?|quarters?|sqrt|sin|cos|tan|log)"
)

_CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "￥": "yen", "₹": "rupee"}

_CURRENCY = re.compile(r"(-?)\s*(\\\$|[$€£¥￥₹])\s*(-?)(?!\\?[$€£¥￥₹])(.+)")

_PERCENT = re.compile(r"(.*?)\s*(?:\\?%|\\text\{\s*(?:\\?%|percent(?:age)?)\s*\}|percent(?:age)?)")

_NAMES = {
    name: short
    for short, names in {
        "cm": "centimeter centimetre",
        "mm": "millimeter millimetre",
        "m": "meter metre",
        "km": "kilometer kilometre",
        "in": "inch inche",
        "ft": "foot feet",
        "mi": "mile",
        "h": "hour hr",
        "min": "minute",
        "s": "second sec",
        "kg": "kilogram",
        "g": "gram",
        "lb": "pound",
        "l": "liter litre",
        "ml": "milliliter millilitre",
        "mi h": "mph",
        "km h": "kmh kph kmph",
        "degree": "deg",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Quantity:
    """A value as text, the words of its unit, and whether it is a percentage."""

    value: str
    unit: frozenset[str] = frozenset()
    percent: bool = False

    def goes_with(self, other: Quantity) -> bool:
        """Whether the units do not contradict each other: one may be left out, or said in more words."""
        return self.unit <= other.unit or other.unit <= self.unit

    def values(self, given: Quantity) -> Iterator[tuple[str, str]]:
        """The pairs of values of which one has to be equal: 40% may stand for 40, and for 0.4."""
        if self.percent == given.percent:
            yield self.value, given.value
            return
        plain, percent = (given, self) if self.percent else (self, given)
        number, share = rational(plain.value), rational(percent.value)
        if share is None or number is None or abs(share) >= 1:
            yield self.value, given.value
        if share is not None and number is not None:
            yield str(number), str(Fraction(share, 100))


def quantity(text: str) -> Quantity:
    """Take the unit from a value: text behind it, plain words behind a number, a currency before it, or `%`."""
    if found := _PERCENT.fullmatch(text):
        return Quantity(found[1].strip(), percent=True) if found[1].strip() else Quantity(text)
    if found := _CURRENCY.fullmatch(text):
        inner = quantity(found[4])
        return Quantity(found[1] + found[3] + inner.value, inner.unit | {_CURRENCIES[found[2]]})
    if (found := _TEXT_UNIT.fullmatch(text)) and r"\text" not in found[1]:
        return _measured(text, found[1], without_text(found[2]))
    if (found := _PLAIN_UNIT.fullmatch(text)) and rational(found[1]) is not None:
        return _measured(text, found[1], found[2] or found[3])
    return Quantity(text)


def _measured(text: str, value: str, said: str) -> Quantity:
    words = re.findall(r"[A-Za-z]+(?:\s*\^\s*\{?[0-9]\}?)?", said)
    if any(_NO_UNIT.fullmatch(word) for word in words):
        return Quantity(text)
    names, power = set[str](), ""
    for word in words:
        name, _, exponent = re.sub(r"[\s{}]", "", word).partition("^")
        name = name.lower() if len(name) > 1 else name
        if name in ("square", "sq", "cubic", "cu"):
            power = "2" if name[0] == "s" else "3"
            continue
        name = name.removesuffix("s") if len(name) > 3 or name in ("lbs", "hrs", "yds") else name
        if name not in ("unit", "per", "of", "the"):
            names.update(each + (exponent or power) for each in _NAMES.get(name, name).split())
        power = ""
    return Quantity(value, frozenset(names))
