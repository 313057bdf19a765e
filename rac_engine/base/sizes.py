"""Sizes as people write and read them: 1M tokens, 6GiB of memory, 3 min 05 s."""

from __future__ import annotations

import re

from rac_engine.base.errors import BadInput

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Read a count or a number of bytes: `8192`, `"8k"`, `"1.5M"` (decimal), `"6GiB"` (binary).

    Raises `BadInput` for anything that is not a whole number of units of at least zero.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise BadInput(f"size {text} is negative")
        return text
    found = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise BadInput(f"{text!r} is not a size; write for example 8192, 8k, 1M or 6GiB")
    whole, _, fraction = found[1].partition(".")
    parts, rest = divmod(int(fraction or 0) * unit, 10 ** len(fraction))
    if rest:
        raise BadInput(f"{text!r} is not a whole number; write for example 8192, 8k, 1M or 6GiB")
    return int(whole) * unit + parts


def format_bytes(count: float) -> str:
    """`1.5 GiB`, `640 KiB`, `12 B`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if abs(count) < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB" if abs(count) < 999.5 else f"{count:.0f} TiB"


def format_count(count: float) -> str:
    """`950`, `49.2k`, `1M`, `7.62G`."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T" if abs(count) < 999.5 else f"{count:.0f}T"


def format_seconds(seconds: float) -> str:
    """`0.35 s`, `42 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float | None, digits: int = 1, strip: bool = True) -> str:
    """`50%`, `48.3%`, a dash for None; `50.0%` without `strip`. Only 0 is shown as 0%, only 1 as 100%."""
    if share is None:
        return "–"
    text = f"{100 * share:.{digits}f}"
    if share > 0 and float(text) == 0:
        return f"<{10**-digits:g}%"
    if share < 1 and float(text) == 100:
        return f">{100 - 10**-digits:g}%"
    return f"{text.rstrip('0').rstrip('.') if strip and '.' in text else text}%"


def figure(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant places, without exponent where that reads well; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
