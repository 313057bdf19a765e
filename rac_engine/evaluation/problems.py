"""Problems with known answers, from files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.traces import Messages, question_of, read_jsonl


@dataclass(frozen=True)
class Problem:
    """A problem and its right answer. `id` decides the random numbers of the answers to it."""

    id: str
    messages: Messages
    answer: str
    kind: str | None


def load_problems(path: Path) -> list[Problem]:
    """Problems of a JSONL file: `problem` (or `prompt`, `messages`) and `answer`, with `kind` and `id` if they like.

    Raises `BadInput` that names the line for one that is broken or lacks something, and for ids that repeat.
    """
    problems, ids = list[Problem](), set[str]()
    for where, record in read_jsonl(path):
        answer = record.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise BadInput(f"{where}: needs `answer`, as text or a number")
        name = str(record.get("id", len(problems)))
        if name in ids:
            raise BadInput(f"{where}: id {name!r} is there twice")
        ids.add(name)
        kind = record.get("kind")
        problems.append(
            Problem(name, question_of(record, where), str(answer).strip(), None if kind is None else str(kind))
        )
    if not problems:
        raise BadInput(f"{path}: holds no problem")
    return problems


def problems_sha256(problems: list[Problem]) -> str:
    """SHA-256 of what is asked, and of what the right answers are."""
    asked = [(problem.id, problem.messages, problem.answer) for problem in problems]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
