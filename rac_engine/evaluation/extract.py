"""The answer that a completion gives: in a box, behind a mark such as `####` or `Answer:`, or in a sentence."""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")

_EMPTY = re.compile(r"(?:\\[,;:! ]|\\q?quad|\\ldots|\\dots|\\text\{\s*\}|[\s.~…])*")

# What may stand between boxes that are one answer: "or", "and", a comma, the end and begin of mathematics, "x =".
_BETWEEN = re.compile(
    r"(?:\\[\])]|\$|\.(?=\s*\$\$)|\*\*|\s)*"
    r"(?:,|;|(?:,\s*)?(?:\\text\{\s*)?\b(?:and|or)\b(?:\s*\})?|\\quad)"
    r"(?:\\[\[(]|\\quad|\\text\{\s*(?:and|or)\s*\}|\$|\*\*|\s|\b(?:and|or)\b|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)

_HEADING = r"^[#*_ \t>]{0,20}(?:the )?(?:final )?answer[ \t*_]{0,9}[:：]?[ \t*_]{0,9}$"

_MARK = re.compile(
    rf"{_HEADING}|####|\banswer(?:\s+is)?[\s*_]*[:：]|答案\s*(?:是|为|為)?\s*[:：]?", re.IGNORECASE | re.MULTILINE
)

_SENTENCE = re.compile(
    r"\b(?:answer|choice|option)(?:\s+(?:to|for|of)\s[^.:\n]{1,80}?)?\s*(?:\bis\b(?:\s+(?:simply|just|therefore|thus))?"
    r"|\bequals\b|\bwould be\b|\\?=)[\s*:]*",
    re.IGNORECASE,
)

_NO_VALUE = re.compile(
    r"(?:(?:in)?correct|wrong|right|not|consistent|reasonable|valid|verified|confirmed|that|what|the same|indeed|found|"
    r"given|obtained|expected|clear|supposed|also|as follows|in the)\b",
    re.IGNORECASE,
)

_MARKS = 64  # the last ones, which are looked at

_LONGEST = 4000  # characters behind a mark

_BLOCKS = (
    re.compile(r"\\\[(.*?)\\\]", re.DOTALL),
    re.compile(r"\$\$(.*?)\$\$", re.DOTALL),
)

_AFTERWARDS = re.compile(
    r"(?:(?<=[0-9$)}\]*%])|(?<=\\\))|(?<=\\\]))(?:[.!]\s+(?=[A-Z])|,?\s+(?:which|because|since|as|so)\b).*"
)

_HOPE = re.compile(r"\.?\s{0,9}I hope (?:it|this) is correct.*", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """The answer that a completion gives, or None.

    Of the text behind the last `</think>` it is the last box that holds something, with the boxes that are joined to it
    by "or", "and" or a comma; else what stands behind the last mark; else what a sentence says that the answer is.
    """
    said = text.rpartition("</think>")[2]
    return _boxed(said) or _marked(said)


def _boxed(text: str) -> str | None:
    """The content of the last complete box with something in it, braces balanced, and of the boxes joined to it."""
    begun: list[tuple[int, int]] = []  # of the braces that are open here: where what they hold begins, and the box
    boxes: list[tuple[int, int, int]] = []  # begin of a box, and the two ends of its content
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            begun.append((brace.end(), brace.start() if len(brace[0]) > 1 else -1))
        elif begun:
            start, box = begun.pop()
            inner = boxes and boxes[-1][0] > start
            if box >= 0 and not inner and not _EMPTY.fullmatch(text, start, brace.start()):
                boxes.append((box, start, brace.start()))
    joined = boxes[-1:]
    for box, start, end in boxes[-2::-1]:
        if not _BETWEEN.fullmatch(text, end + 1, joined[0][0]):
            break
        joined.insert(0, (box, start, end))
    return ", ".join(dict.fromkeys(text[start:end].strip() for _, start, end in joined)) or None


def _marked(text: str) -> str | None:
    """What stands behind the last mark, or in the last sentence that says what the answer is."""
    marks = [(mark, _value(text, mark.end())) for mark in list(_MARK.finditer(text))[-_MARKS:]]
    strong = [value for mark, value in marks if value and not _is_heading(mark, text)]
    sentences = [value for mark in list(_SENTENCE.finditer(text))[-_MARKS:] if (value := _value(text, mark.end()))]
    telling = [value for value in sentences if not _NO_VALUE.match(value)]
    for values in (strong, telling, [value for _, value in marks if value], sentences):
        if values:
            inner = _SENTENCE.search(values[-1])
            return (inner and _value(values[-1], inner.end())) or values[-1]
    return None


def _is_heading(mark: re.Match[str], text: str) -> bool:
    """Whether `####` begins a heading of Markdown: words, with text below."""
    line, _, below = text[mark.end() :].partition("\n")
    return mark[0] == "####" and bool(re.match(r"[\s*]*[A-Za-z]{2}", line)) and bool(below.strip())


def _value(text: str, at: int) -> str | None:
    """The answer that begins at `at`: a block of mathematics, or the rest of a line without what follows an answer."""
    begin = re.compile(r"[\s*_:：]*").match(text, at)
    rest = text[(at := begin.end() if begin else at) : at + _LONGEST]
    for block in _BLOCKS:
        if found := block.match(rest):
            return found[1].strip() or None
    line = _HOPE.sub("", rest.partition("\n")[0])
    line = _AFTERWARDS.sub("", line).strip("* \t\r")
    return (line if line.endswith("..") else line.rstrip(".。* ")) or None
