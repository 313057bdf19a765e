"""Multiple choice: the choices of a record in any layout known, written below the question with letters."""

from __future__ import annotations

import hashlib
import string
from typing import Any

from rac_engine.traces.conversation import absent, written_down

CHOICES = (
    *("choices", "options", "a", "b", "c", "d", "e", "correct_answer"),
    *(f"incorrect_answer_{number}" for number in (1, 2, 3)),
)
"""Names of columns that hold choices."""

_LETTERS = string.ascii_uppercase
_ASK = "Answer with the letter of the right choice."


def with_choices(values: dict[str, Any], question: str) -> str:
    """A question with its choices below it, if it has some and does not hold them yet."""
    listed = _choices(values)
    if listed is None or all(text in question for _, text in listed):
        return question
    lines = "\n".join(f"{letter}. {text}" for letter, text in listed)
    return f"{question}\n\n{lines}\n\n{_ASK}"


def letter_of(values: dict[str, Any], answer: Any) -> str | None:
    """The letter of the right choice by the `answer` of a record: a letter, a number from 0, or the choice's text.

    None where the record has no choices, or the answer is none of them.
    """
    listed = _choices(values)
    if listed is None:
        return None
    if type(answer) is int:
        return listed[answer][0] if 0 <= answer < len(listed) else None
    said = str(answer).strip()
    letters = [letter for letter, _ in listed]
    if said in letters:
        return said
    found = [letter for letter, text in listed if text == said]
    return found[0] if len(found) == 1 else None


def _choices(values: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Letters (or the record's own labels) and texts of the choices; None if there are none.

    GPQA has the right choice in a column of its own: there the order is that of the texts' SHA-256, the same each time.
    """
    if isinstance(values.get("incorrect_answer_1"), str) and isinstance(values.get("correct_answer"), str):
        names = ("correct_answer", *(f"incorrect_answer_{number}" for number in (1, 2, 3)))
        texts = [str(values[name]).strip() for name in names if not absent(values.get(name))]
        return list(
            zip(
                _LETTERS,
                sorted(texts, key=lambda t: hashlib.sha256(t.encode("utf-8", "replace")).digest()),
                strict=False,
            )
        )
    given = next((written_down(values[name]) for name in ("choices", "options") if not absent(values.get(name))), None)
    if given is None and all(isinstance(values.get(letter), str) for letter in "abcd"):
        given = {letter.upper(): values[letter] for letter in "abcde" if isinstance(values.get(letter), str)}
    if isinstance(given, dict) and isinstance(given.get("text"), list):  # ARC
        labels, given = given.get("label"), given["text"]
        if isinstance(labels, list) and len(labels) == len(given):
            given = {str(label): text for label, text in zip(labels, given, strict=True)}
    if isinstance(given, list) and 1 < len(given) <= len(_LETTERS):
        given = dict(zip(_LETTERS, given, strict=False))
    if not isinstance(given, dict) or len(given) < 2 or not all(isinstance(t, str) for t in given.values()):
        return None
    return [(str(letter), text.strip()) for letter, text in given.items()]
