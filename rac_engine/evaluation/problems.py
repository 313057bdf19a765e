"""Problems with known answers, from files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.evaluation.extract import extract_answer
from rac_engine.traces import Messages, answer_of, id_of, question_of, read_records


@dataclass(frozen=True)
class Problem:
    """A problem and its right answer. `id` decides the random numbers of the answers to it."""

    id: str
    messages: Messages
    answer: str
    kind: str | None


def load_problems(path: Path, columns: Mapping[str, str] | None = None) -> list[Problem]:
    """Problems of a file or folder in any layout that is known, with `kind` (or `subject`) and `id` if they have them.

    `columns` says which column plays a role. An `answer` that is missing is taken from the last box of a `solution`.
    Raises `BadInput` that names the line for one that is broken or lacks something, and for ids that repeat.
    """
    problems, ids = list[Problem](), set[str]()
    for where, record in read_records(path, columns):
        answer = answer_of(record, where)
        solution = record.get("solution")
        if not answer and isinstance(solution, str):
            answer = extract_answer(solution) or ""
        if not answer:
            there = ", ".join(f"`{key}`" for key in list(record)[:20])
            raise BadInput(
                f"{where}: needs `answer`, as text or a number; it has {there or 'nothing'}: name the column with "
                "--column answer=NAME"
            )
        name, own = id_of(record)
        if name is not None and not own and name in ids:
            name = f"{name}#{len(problems)}"  # a name that is no `id` need not be its record's alone
        name = str(len(problems)) if name is None else name
        if name in ids:
            raise BadInput(f"{where}: id {name!r} is there twice")
        ids.add(name)
        kind = next((record[key] for key in ("kind", "subject") if record.get(key) is not None), None)
        problems.append(Problem(name, question_of(record, where), answer, None if kind is None else str(kind)))
    if not problems:
        raise BadInput(f"{path}: holds no problem")
    return problems


def problems_sha256(problems: list[Problem]) -> str:
    """SHA-256 of what is asked, and of what the right answers are."""
    asked = [(problem.id, problem.messages, problem.answer) for problem in problems]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
