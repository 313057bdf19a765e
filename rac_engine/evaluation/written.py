"""How an answer is written, made one way: wrappers, spacing, macros and Unicode signs that mean nothing go.

What stays is LaTeX in which a set's braces are ⦃ and ⦄, all text macros are `\\text`, and fractions have their braces.
"""

from __future__ import annotations

import re

_SIGNS = {
    **dict.fromkeys("−–﹣－", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **{"÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∞": r"\infty ", "∅": r"\emptyset "},
    **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "…": r"\ldots ", "⟨": "(", "⟩": ")"},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}"},
    **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"},
    **{"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi "},
    **{sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{"（": "(", "）": ")", "，": ",", "、": ",", "：": ":", "；": ";", "＝": "=", "％": "%", "。": "."},
    **dict.fromkeys("\u00a0\u2002\u2003\u3000", " "),
    **dict.fromkeys("\u2009\u202f", r"\,"),
}
_TRANSLATION = str.maketrans(_SIGNS)

_GROUP = r"(?<![0-9.])([0-9]{1,3}(?:SEPARATOR[0-9]{3})+)(?![0-9])"  # digits in groups of three
_SEPARATORS = re.compile(r" |,\\!|\{,\}|\\[,;: ]|\\thinspace|~")

_REWRITTEN = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|!)(?![A-Za-z])", ""),
        (r"\\(?:[,;:>]|quad\b|qquad\b|thinspace\b|hspace\{[^{}]*\})|(?<!\\)\\(?=\s)|~", " "),
        (r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|operatorname\*?|[mh]box)\s*\{", r"\\text{"),
        (r"\\text\{([ei])\}", r"\1"),
        (r"\\text\{\s*,?\s*(and|or)\s*\}", r" \1 "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*([0-9A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
        (r"(?:√|(?<!\\)\bsqrt)\s*([0-9]+|[A-Za-z]\b)", r"\\sqrt{\1}"),
        (r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9]|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
        (r"\\(?:leq?slant|leq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq?slant|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:l?dots|dotsc|cdots)(?![A-Za-z])|\.{3}", r"\\ldots "),
        (r"\\(?:\{|lbrace(?![A-Za-z]))", "⦃"),
        (r"\\(?:\}|rbrace(?![A-Za-z]))", "⦄"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\varnothing(?![A-Za-z])|⦃\s*⦄", r"\\emptyset"),
        (r"(?<![\\A-Za-z])(?:positive )?infinity\b", r"\\infty"),
        (r"(?<![\\A-Za-z])pi\b", r"\\pi"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])", r"\\text{ degree}"),
        (r"\\(?:lor|vee)(?![A-Za-z])", " or "),
        (r"\s+", " "),
    )
]

_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$((?:[^$]|\\\$)*)\$\$",
        r"(?<!\\)\$((?:[^$]|\\\$)*)(?<!\\)\$",
        r"\\\(((?:(?!\\[()]).)*)\\\)",
        r"\\\[((?:(?!\\[\[\]]).)*)\\\]",
        r"\*\*([^*]*)\*\*",
        r"`([^`]*)`",
        r'"([^"]*)"',
        r"[“]([^”]*)[”]",
    )
]

OPENING, CLOSING = "([{⦃", ")]}⦄"


def normalized(text: str) -> str:
    """The answer without what only its looks are made of."""
    text = text.translate(_TRANSLATION).strip()
    text = _unwrapped(text)
    text = re.sub(_GROUP.replace("SEPARATOR", f"(?:{_SEPARATORS.pattern})"), lambda m: _SEPARATORS.sub("", m[0]), text)
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    return _unwrapped(text)


def _unwrapped(text: str) -> str:
    """Without what is around the whole: `$`, `**`, a box, a text macro, and the sentence's full stop."""
    while True:
        inner = text.strip()
        if inner.endswith((".", ",", ";")) and not inner.endswith(".."):
            inner = inner[:-1]
        for wrapper in _WRAPPERS:
            if found := wrapper.fullmatch(inner):
                inner = found[1]
        for macro in (r"\boxed{", r"\text{", r"\textbf{", r"\mathbf{", "{"):
            if inner.startswith(macro) and closing(inner, len(macro) - 1) == len(inner) - 1:
                inner = inner[len(macro) : -1]
        if inner == text:
            return without_dollars(text)
        text = inner


def without_dollars(text: str) -> str:
    """Without signs of mathematics within text, such as `$3$ and $5$`: they come in pairs."""
    bare = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    signs = re.findall(r"(?<!\\)\$", bare)
    if signs and len(signs) % 2 == 0:
        return re.sub(r"(?<!\\)\$", "", bare)
    return re.sub(r"(?<=\S)(?<!\\)\$$", "", bare)


def closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` is closed, or -1. The two ends of an interval may differ in kind."""
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] in OPENING) - (text[index] in CLOSING)
        if not depth:
            return index
    return -1


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The pieces between separators that stand outside of all brackets."""
    pieces, begin, depth, at = list[str](), 0, 0, 0
    while at < len(text):
        depth += (text[at] in OPENING) - (text[at] in CLOSING)
        if not depth and (found := separator.match(text, at)) and found.end() > at:
            pieces.append(text[begin:at].strip())
            begin = at = found.end()
        else:
            at += 1
    return [*pieces, text[begin:].strip()]


def as_latex(text: str) -> str:
    """The answer with a set's braces as LaTeX has them."""
    return text.replace("⦃", r"\{").replace("⦄", r"\}")


def without_text(text: str) -> str:
    """The answer with the content of its text macros as plain words."""
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split())
