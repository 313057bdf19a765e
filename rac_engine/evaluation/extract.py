"""The answer that a completion gives."""

from __future__ import annotations

import re

_MARKED = re.compile(r"(?:####|\banswer(?:\s+is)?[\s*]*:)[\s*]*(.+)", re.IGNORECASE)

_BRACE = re.compile(r"\\boxed\{|[{}]")


def extract_answer(text: str) -> str | None:
    """The answer that a completion gives, or None."""
    said = text.rpartition("</think>")[2]
    boxed = _last_boxed(said)
    if boxed is not None:
        return boxed
    marked = _MARKED.findall(said)
    return marked[-1].strip("* \t\r").rstrip(".* ") if marked else None


def _last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{…}`, braces within it balanced."""
    begun: list[int] = []  # where the braces that are open here begin to hold something, boxes among them
    boxes, last = set[int](), (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            begun.append(brace.end())
            if len(brace[0]) > 1:
                boxes.add(brace.end())
        elif begun and (start := begun.pop()) in boxes and start > last[0]:
            last = start, brace.start()
    return None if last[0] < 0 else text[slice(*last)].strip()
