"""Names of files, on any system."""

from __future__ import annotations

from pathlib import Path


def is_utf8(path: str | Path) -> bool:
    """Whether a path can stand in a file of text: one with other bytes cannot be read back from there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
