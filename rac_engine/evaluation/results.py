"""Results of evaluations, read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import read_json
from rac_engine.base.stored import Natural, Stored, Whole, mistake_in
from rac_engine.jobs.layout import DENSE, EVAL, PRUNED, RAC


class _StoredAnswer(Stored):
    id: str
    kind: str | None
    answer: str
    predicted: str | None
    correct: bool
    tokens: Natural
    finish_reason: str | None


class _StoredSummary(Stored):
    problems: Whole
    accuracy: float
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]
    mean_tokens: float
    p95_tokens: float
    cut_off_share: float


class _StoredEvalSettings(Stored):
    max_new_tokens: Natural = 0


class _StoredLoss(Stored):
    tokens: Natural
    loss: float


class _StoredPerplexity(Stored):
    source: str
    sha256: str
    mean_loss: float
    perplexity: float
    by_sequence: Annotated[list[_StoredLoss], Field(min_length=1)]


class _StoredAnswers(Stored):
    """What results hold of answers."""

    summary: _StoredSummary
    rows: Annotated[list[_StoredAnswer], Field(min_length=1)]


class _StoredEvaluation(Stored):
    perplexity: list[_StoredPerplexity] = []
    settings: _StoredEvalSettings = _StoredEvalSettings()
    notes: list[str] = []


def load_evaluation(path: Path) -> dict[str, Any]:
    """The results that `rac eval` wrote to `path`. Raises `BadInput` for a file that is missing, damaged or another."""
    found = read_json(path)
    mistake = mistake_in(found, _StoredEvaluation)
    if not mistake and (not found.get("perplexity") or "rows" in found):
        mistake = mistake_in(found, _StoredAnswers)
    if mistake:
        raise BadInput(f"{path}: not a result of `rac eval` ({mistake})")
    made: dict[str, Any] = found
    return made


def evaluations(out: Path, names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The answers in `out`/rac/eval by name: dense first, then pruned, then `names`, then what else there is."""
    found = {path.stem: path for path in sorted((out / RAC / EVAL).glob("*.json"))}
    order = [name for name in (DENSE, PRUNED, *names) if name in found]
    order += [name for name in found if name not in order]
    loaded = {name: load_evaluation(found[name]) for name in order}
    return {name: results for name, results in loaded.items() if "rows" in results}
