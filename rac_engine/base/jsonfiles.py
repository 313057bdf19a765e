"""JSON in which no object gives a key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput


def loads(text: bytes | str) -> Any:
    """JSON in which no object gives a key twice. Raises `ValueError` for other text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is given twice")
        return made

    return json.loads(text, object_pairs_hook=once)


def read_json(path: Path) -> Any:
    """The JSON in `path`; `BadInput` if it is missing or broken."""
    try:
        return loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from None
