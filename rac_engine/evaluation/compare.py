"""Whether two answers are one: part by part, exactly where that can be said, else as `ask` says of the parts.

An answer is a list, a tuple, an interval or set, or one value with a label (`x =`) and a unit. Values are compared as
words, as rational numbers, and at last as mathematics by `ask(expected, given)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rac_engine.evaluation.rational import rational, same_number
from rac_engine.evaluation.units import Quantity, quantity
from rac_engine.evaluation.written import CLOSING, OPENING, as_latex, closing, normalized, split, without_text

Ask = Callable[[str, str], bool]

_MOST = 40  # items of a list that are looked for in any order, and parts within one another

_STEPS = 5000  # comparisons of parts

_SEPARATOR = re.compile(r",?\s+(?:and|or)(?![A-Za-z])|[,;]|\\cup(?![A-Za-z])")

_OR = re.compile(r",?\s+or(?![A-Za-z])|[,;]|\\cup(?![A-Za-z])")

_RELATION = re.compile(r"<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])")

_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")

_BUILT_SET = re.compile(r"⦃\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid(?![A-Za-z])|\||:)\s*(.*)⦄")

_NAME = (
    r"(?:\\(?!frac|sqrt|sin|cos|tan|cot|sec|csc|log|ln|sum|int|lim|binom|pm|emptyset|infty)[A-Za-z]+\s*[A-Z]{0,3}"
    r"|[A-Za-z]{1,3})(?:_(?:\w|\{[^{}]*\}))?'*(?:\^\{-1\})?(?:\([^()=]*\))?"
)

_LABEL = re.compile(rf"{_NAME}|\|{_NAME}\||\\text\{{[^{{}}]*\}}|\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\)")

_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Z])")

_CHOICE = re.compile(r"(?:option|choice|answer)?\s*(?:\(([A-Za-z])\)\s*[.:]?|([A-Z])(?:[.):]|$))\s*(.*)", re.IGNORECASE)

_FURTHER = re.compile(r"(?:,|and\b|or\b|\(?[A-Z]\)?(?:[.):]|$))", re.IGNORECASE)

_ONE_VARIABLE = re.compile(r"[-0-9./{}\\frac]*[A-Za-z](?:\^\{?[0-9]+\}?)?")

_WORD = re.compile("[A-Za-z]{2}|:")

_OPERATOR = re.compile(r"[\\\\^_=+*]")

_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")


def same_answer(expected: str, given: str, ask: Ask) -> bool:
    """Whether `given`, as a model wrote it, is the answer `expected`."""
    wanted, found = normalized(expected), normalized(given)
    if not wanted or not found:
        return False
    return _Comparison(lambda *texts: ask(*map(as_latex, texts))).same(wanted, found)


@dataclass(frozen=True)
class _Parts:
    """An answer's items and what is around them: "" for a bare list, "⦃⦄" for a set, "(]" and so on in order."""

    around: str
    items: list[str]

    @property
    def one(self) -> bool:
        return self.around == "" and len(self.items) == 1

    def distinct(self) -> _Parts:
        """A set, in which a number that is written twice counts once."""
        if self.in_order:
            return self
        values = [rational(item) for item in self.items]
        new = [item for at, item in enumerate(self.items) if values[at] is None or values[at] not in values[:at]]
        return _Parts(self.around, new)

    @property
    def in_order(self) -> bool:
        return self.around not in ("", "⦃⦄") or any(r"\ldots" in item for item in self.items)


class _Comparison:
    """Compares two normalized answers, in no more than so many steps."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._depth = self._steps = 0

    def same(self, expected: str, given: str) -> bool:
        """Whether two answers, or two parts of answers, are one."""
        if _squeezed(expected) == _squeezed(given) or _same_words(expected, given):
            return True
        if (decided := _same_choice(expected, given)) is not None:
            return decided
        if (decided := same_number(expected, given)) is not None:
            return decided
        self._steps += 1
        if self._depth > _MOST or self._steps > _STEPS:
            return False
        wanted, found = _parts(expected), _parts(given)
        if len(wanted.items) != len(found.items):
            wanted, found = wanted.distinct(), found.distinct()
        self._depth += 1
        one = wanted.one and found.one
        same = self._same_one(*wanted.items, *found.items) if one else self._same_parts(wanted, found)
        self._depth -= 1
        return same

    def _same_parts(self, expected: _Parts, given: _Parts) -> bool:
        if expected.one or given.one:  # a label before a tuple, or an inequality for an interval
            changed = [_opened(parts.items[0]) if parts.one else None for parts in (expected, given)]
            opened = [new or _text(parts) for new, parts in zip(changed, (expected, given), strict=True)]
            return any(changed) and self.same(*opened)
        if len(expected.items) != len(given.items):
            return False
        kinds = {expected.around, given.around}
        if len(kinds) > 1 and kinds not in ({"", "()"}, {"", "⦃⦄"}):
            return False
        labels = [_labels(parts.items) for parts in (expected, given)]
        several = any(len(set(names)) > 1 for names in labels) and not all(labels)
        if several or expected.in_order or given.in_order:
            return all(map(self.same, expected.items, given.items))
        return self._same_in_any_order(expected.items, given.items)

    def _same_in_any_order(self, expected: list[str], given: list[str]) -> bool:
        if len(expected) > _MOST:
            return all(map(self.same, expected, given))
        left = list(given)
        for item in expected:
            at = next((at for at, other in enumerate(left) if self.same(item, other)), None)
            if at is None:
                return False
            left.pop(at)
        return True

    def _same_one(self, expected: str, given: str) -> bool:
        intervals = _interval(expected), _interval(given)
        if intervals[0] and intervals[1]:
            return intervals[0][0] == intervals[1][0] and self.same(intervals[0][1], intervals[1][1])
        if any(_RELATION.search(text) for text in (expected, given)):
            both = all(_RELATION.search(text) for text in (expected, given))
            return both and self._ask(expected, given)
        (name, wanted), (other, found) = _labelled(expected), _labelled(given)
        if name and other and name != other and "\\text" not in name + other:
            return False
        equations = [len(split(text, _EQUALS)) > 1 for text in (expected, given)]
        if (wanted, found) != (expected, given) and (bool(name) == bool(other) or not all(equations)):
            return self.same(wanted, found)
        if (decided := _same_equation(expected, given)) is not None:
            return decided and self._ask(expected, given)
        return self._same_quantity(quantity(expected), quantity(given))

    def _same_quantity(self, expected: Quantity, given: Quantity) -> bool:
        if not expected.goes_with(given):
            return False
        for wanted, found in expected.values(given):
            number = same_number(wanted, found)
            if number or (number is None and self._same_value(wanted, found)):
                return True
        return False

    def _same_value(self, expected: str, given: str) -> bool:
        if _squeezed(expected) == _squeezed(given):
            return True
        wanted, found = (_BASE.fullmatch(_squeezed(text)) for text in (expected, given))
        if wanted and found:
            return wanted.groups() == found.groups()
        if wanted or found:  # a base may be left out, as a unit may
            return (wanted[1] if wanted else _squeezed(expected)) == (found[1] if found else _squeezed(given))
        texts = without_text(expected), without_text(given)
        if all(not _OPERATOR.search(text) for text in texts) and any(_WORD.search(text) for text in texts):
            return False  # other words
        if not any(re.search(r"[A-Za-z(|]", text) for text in texts):  # figures in a row, which are no product
            return False
        return self._ask(expected, given)


def _squeezed(text: str) -> str:
    """The text without space, but for space that keeps figures apart."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


def _same_words(expected: str, given: str) -> bool:
    """Whether two texts have the same words and figures, whatever the case, space and dots of abbreviations."""
    texts = without_text(expected), without_text(given)
    if not all(_WORD.search(text) and not _OPERATOR.search(text) for text in texts):
        return False
    letters, others = (
        re.sub(r"(?<=[A-Za-z])\.|['’]|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", "", _squeezed(text)).casefold()
        for text in texts
    )
    return letters == others


def _same_choice(expected: str, given: str) -> bool | None:
    """Whether two choices are one; None if the expected answer is no letter of a choice, or what is given is not."""
    wanted, found = _CHOICE.fullmatch(without_text(expected)), _CHOICE.fullmatch(without_text(given))
    if not wanted or not found or _FURTHER.match(found[3]):
        return None
    if wanted[3] and found[3]:
        return None if wanted[1] is None else False
    letters = [(choice[1] or choice[2]).upper() for choice in (wanted, found)]
    return letters[0] == letters[1]


def _parts(text: str) -> _Parts:
    """Divide an answer at its top-level commas, within the brackets around the whole if there are some."""
    text = text.strip()
    for _ in range(_MOST):
        if text[:1] + text[-1:] != "()" or closing(text, 0) < len(text) - 1 or len(_items(text[1:-1])) > 1:
            break
        text = text[1:-1].strip()
    if built := _BUILT_SET.fullmatch(text):
        return _parts(built[2])
    if len(items := _items(text)) > 1:
        if not (names := _labels(items))[1:] and names and _labelled(items[0])[0]:
            items[0] = _labelled(items[0])[1]  # x = 2, 3
        return _Parts("", [each for item in items if item for each in _both_signs(item)])
    if text and text[0] in OPENING and text[-1] in CLOSING and closing(text, 0) == len(text) - 1:
        inner = _items(text[1:-1])
        if text[0] == "⦃":
            return _Parts("⦃⦄", [each for item in inner for each in _both_signs(item)])
        if len(inner) > 1:
            return _Parts(text[0] + text[-1], inner)
    return _Parts("", _both_signs(text))


def _items(text: str) -> list[str]:
    """The pieces between commas; "and" is none between inequalities, which then hold at once."""
    return split(text, _OR if _RELATION.search(text) else _SEPARATOR)


def _text(parts: _Parts) -> str:
    inner = ", ".join(parts.items)
    return f"{parts.around[0]}{inner}{parts.around[1]}" if parts.around else inner


def _both_signs(item: str) -> list[str]:
    """The two values of a ± b."""
    if len(re.findall(r"\\pm(?![A-Za-z])", item)) != 1 or r"\mp" in item:
        return [item]
    return [re.sub(r"\\pm(?![A-Za-z])", sign, item).strip().removeprefix("+") for sign in "+-"]


def _labels(items: list[str]) -> list[str]:
    return [name for item in items if (name := _labelled(item)[0])]


def _labelled(text: str) -> tuple[str, str]:
    """(label, value) of `x = 5`, `f(x) = …` or `x \\in …`; of a chain of equations the last value."""
    if found := re.match(rf"({_LABEL.pattern})\s*\\in(?![A-Za-z])", text):
        return _squeezed(found[1]), text[found.end() :].strip()
    sides = split(text, _EQUALS)
    if len(sides) == 2 and _LABEL.fullmatch(sides[1]) and not _LABEL.fullmatch(sides[0]):
        sides.reverse()
    if len(sides) > 1 and all(sides) and not _RELATION.search(text):
        if _LABEL.fullmatch(sides[0]):
            return _squeezed(sides[0]), sides[-1]
        if (value := rational(sides[-1])) is not None and all(rational(side) == value for side in sides):
            return "", sides[-1]
    return "", text


def _same_equation(expected: str, given: str) -> bool | None:
    """Whether equations may be one; None if neither is an equation. An equation may give the number on its right."""
    sides = split(expected, _EQUALS), split(given, _EQUALS)
    if len(sides[0]) == len(sides[1]) == 1:
        return None
    if len(sides[0]) > 1:
        return len(sides[1]) > 1
    return not _ONE_VARIABLE.fullmatch(_squeezed(sides[1][0]))


def _opened(text: str) -> str | None:
    """What a label stands before, or the interval that an inequality means."""
    value = _labelled(text)[1]
    if value != text:
        return value
    interval = _interval(text)
    return interval and interval[1]


def _interval(text: str) -> tuple[str, str] | None:
    """(variable, interval) of an inequality that is solved, such as `-3 \\le x < 8`."""
    signs, sides = _RELATION.findall(text), split(text, _RELATION)
    if len(sides) == 2 and not _LABEL.fullmatch(sides[0]):
        sides, signs = sides[::-1], [_turned(sign) for sign in signs]
    elif len(sides) == 3 and signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [_turned(sign) for sign in signs[::-1]]
    if len(sides) == 2 and _LABEL.fullmatch(sides[0]) and signs[0] != r"\ne":
        if signs[0] in ("<", r"\le"):
            return _squeezed(sides[0]), rf"(-\infty, {sides[1]}{')' if signs[0] == '<' else ']'}"
        return _squeezed(sides[0]), rf"{'(' if signs[0] == '>' else '['}{sides[1]}, \infty)"
    if len(sides) == 3 and _LABEL.fullmatch(sides[1]) and {*signs} <= {"<", r"\le"}:
        ends = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
        return _squeezed(sides[1]), f"{ends[0]}{sides[0]}, {sides[2]}{ends[1]}"
    return None


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}.get(sign, sign)
