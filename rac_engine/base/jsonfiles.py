"""JSON in which no object gives a key twice, since readers differ in which of the two they believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import read_small


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice[:50]!r} is given twice")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_once)
"""Reads values one after the other out of a longer text, by its `raw_decode`."""


def loads(text: bytes | str) -> Any:
    """The value that a JSON text stands for. Raises `ValueError` for other text and for a key that is given twice."""
    return json.loads(text, object_pairs_hook=_once)


def loads_object(text: bytes, what: str, mend: str) -> dict[str, Any]:
    """The JSON object in a UTF-8 text. `BadInput` for anything else calls it `what` and says how to `mend` it."""
    try:
        value = loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what}: not valid JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{what}: not a JSON object; {mend}")
    return value


def read_json(path: Path) -> Any:
    """The JSON in a file of our own; `BadInput` if it is missing or broken."""
    try:
        return loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from None


def read_json_object(path: Path, limit: int, missing: str, mend: str) -> dict[str, Any]:
    """The JSON object in a stranger's file: a regular one of at most `limit` bytes.

    `BadInput` says what to do about one that is not there (`missing`) or broken (`mend`).
    """
    try:
        text = read_small(path, limit)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; {missing}") from None
    return loads_object(text, str(path), mend)
