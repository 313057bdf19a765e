"""What finished jobs leave behind, read back: metrics, evaluations, and the table that compares models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rac_engine.errors import BadInput

RAC = "rac"
METRICS = "metrics.jsonl"
STEPS = "steps.jsonl"
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
TRACES = "traces"


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


def rule_text(settings: dict[str, Any]) -> str:
    """`2:4`, or `50% unstructured`, and whether some matrices are pruned by another rule."""
    rule = settings.get("pattern") or f"{percent(settings.get('sparsity'))} unstructured"
    if settings.get("allocation", "uniform") != "uniform":
        rule += f", allocated by {settings['allocation']}"
    count = len(settings.get("overrides") or ())
    return rule + (f", {count} override{'s' if count > 1 else ''}" if count else "")


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: the run (versions, model, calibration, settings), an object a matrix, and how it ended."""

    run: dict[str, Any]
    matrices: list[dict[str, Any]]
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def pruned(self) -> list[dict[str, Any]]:
        return [matrix for matrix in self.matrices if not matrix.get("skipped")]

    @property
    def weights(self) -> int:
        """Elements of all pruned matrices."""
        return sum(matrix["rows"] * matrix["columns"] for matrix in self.pruned)

    @property
    def zeros(self) -> int:
        """Zeros in all pruned matrices."""
        return sum(matrix["zeros"] for matrix in self.pruned)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the pruned matrices' outputs; None where no method measured it."""
        errors = [matrix["relative_error"] for matrix in self._measured]
        return sum(errors) / len(errors) if errors else None

    @property
    def worst(self) -> dict[str, Any] | None:
        """The matrix with the largest relative error."""
        return max(self._measured, key=lambda matrix: float(matrix["relative_error"]), default=None)

    @property
    def _measured(self) -> list[dict[str, Any]]:
        return [matrix for matrix in self.pruned if matrix.get("relative_error") is not None]


def layer_of(matrix: dict[str, Any]) -> str:
    """Number of a matrix's decoder layer; nothing for lm_head and embeddings, whose modules stand by themselves."""
    return str(matrix["layer"]) if "." in str(matrix["module"]) else ""


def place_of(matrix: dict[str, Any], between: str = ", ") -> str:
    """Where a matrix stands, in words."""
    layer = layer_of(matrix)
    return f"layer {layer}{between}{matrix['module']}" if layer else str(matrix["module"])


@dataclass(frozen=True)
class Row:
    """One model of the comparison: shares in [0, 1], lengths in tokens."""

    name: str
    calibration: str
    sparsity: float | None
    """None for a model of which only answers are known."""
    accuracy: float
    ci95: tuple[float, float]
    mean_tokens: float
    p95_tokens: float
    cut_off_share: float
    problems: int
    main: bool = False


class _Stored(BaseModel):
    """What has to be so in a file that this program wrote; whatever else stands there is kept as it is."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


_Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_Size = Annotated[_Whole, Field(ge=1)]
_Natural = Annotated[_Whole, Field(ge=0)]
_Object = dict[str, Any]


class _StoredModel(_Stored):
    path: str = ""
    sha256: str | None = None
    parameters: _Whole | None = None


class _StoredSettings(_Stored):
    method: str = ""
    sparsity: float | None = None
    pattern: str | None = None
    block_size: _Size = 128


class _StoredCalibration(_Stored):
    description: str
    source: str
    part: str
    sequences: _Whole
    tokens: _Whole


class _StoredRun(_Stored):
    model: _StoredModel = _StoredModel()
    settings: _StoredSettings
    calibration: _StoredCalibration | None = None
    versions: _Object = {}
    machine: _Object = {}


class _StoredTarget(_Stored):
    sparsity: float
    pattern: str | None


class _StoredMatrix(_Stored):
    layer: _Whole
    module: str
    name: str
    rows: _Size
    columns: _Size
    zeros: _Natural
    zeros_before: _Natural = 0
    sparsity: float
    relative_error: float | None = None
    damping: float | None = None
    tokens: _Natural | None = None
    seconds: float | None = None
    target: _StoredTarget | None = None
    tensor: str | None = None
    expert: _Natural | None = None
    skipped: str | None = None
    notes: list[str] = []


class _StoredEnd(_Stored):
    seconds: float = 0.0
    phases: dict[str, float] = {}
    peak_memory: _Natural | None = None
    notes: list[str] = []


class _StoredAnswer(_Stored):
    id: str
    kind: str | None
    answer: str
    predicted: str | None
    correct: bool
    tokens: _Natural
    finish_reason: str | None


class _StoredSummary(_Stored):
    problems: _Whole
    accuracy: float
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)]
    mean_tokens: float
    p95_tokens: float
    cut_off_share: float


class _StoredEvalSettings(_Stored):
    max_new_tokens: _Natural = 0


class _StoredEvaluation(_Stored):
    summary: _StoredSummary
    rows: Annotated[list[_StoredAnswer], Field(min_length=1)]
    settings: _StoredEvalSettings = _StoredEvalSettings()


_ENTRIES: dict[str, type[BaseModel]] = {"run": _StoredRun, "matrix": _StoredMatrix, "end": _StoredEnd}


def _mistake(value: Any, wanted: type[BaseModel]) -> str | None:
    """The first thing in `value` that is not as `wanted` has it, in words."""
    try:
        wanted.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return None


def loads(text: bytes | str) -> Any:
    """JSON in which no object gives a key twice. Raises `ValueError` for other text."""

    def once(pairs: list[tuple[str, Any]]) -> _Object:
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


def load_metrics(folder: Path) -> Metrics:
    """Read `folder`/metrics.jsonl. Raises `BadInput` where it is missing or a line is broken."""
    path = folder / METRICS
    if not path.is_file():
        raise BadInput(f"{path} not found; give the output folder of `rac prune` or `rac run`")
    run: dict[str, Any] = {}
    end: dict[str, Any] = {}
    matrices = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = loads(line)
                kind = entry["type"]
                mistake = _mistake(entry, _ENTRIES[kind])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                mistake = str(error) if isinstance(error, ValueError) else "its `type` should be run, matrix or end"
            if mistake is not None:
                raise BadInput(f"{path}:{number}: not a metrics entry ({mistake}); the file is damaged") from None
            if kind == "matrix":
                matrices.append(entry)
            elif kind == "run":
                run = entry
            else:
                end = entry
    if not run:
        raise BadInput(f"{path}: says nothing of the run; the file is damaged")
    return Metrics(run, matrices, end)


def load_evaluation(path: Path) -> dict[str, Any]:
    """The results that `rac eval` wrote to `path`. Raises `BadInput` for a file that is missing, damaged or another."""
    found = read_json(path)
    if mistake := _mistake(found, _StoredEvaluation):
        raise BadInput(f"{path}: not a result of `rac eval` ({mistake})")
    made: dict[str, Any] = found
    return made


def step_times(out: Path) -> dict[str, float]:
    """Seconds of the finished steps of a `rac run`, from its journal; nothing for a folder that `rac prune` made."""
    path = out / RAC / STEPS
    lines = path.read_bytes().splitlines()[1:] if path.is_file() else []
    try:
        records = [loads(line.partition(b" ")[2]) for line in lines]
        return {str(record["step"]): float(record["seconds"]) for record in records}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: not the journal of a run ({error!r})") from None


def evaluations(out: Path, names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The results in `out`/rac/eval by name: dense first, then pruned, then `names`, then what else there is."""
    found = {path.stem: path for path in sorted((out / RAC / "eval").glob("*.json"))}
    order = [name for name in ("dense", "pruned", *names) if name in found]
    order += [name for name in found if name not in order]
    return {name: load_evaluation(found[name]) for name in order}


def table(rows: list[Row]) -> str:
    """`rows` as aligned text for a terminal."""
    head = ("name", "sparsity", "accuracy [95% interval]", "mean decode", "p95 decode", "cut off")
    body = [
        (
            row.name,
            percent(row.sparsity),
            f"{row.accuracy:.3f} [{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]",
            f"{row.mean_tokens:.0f}",
            f"{row.p95_tokens:.0f}",
            percent(row.cut_off_share),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in [head, *body]
    ]
    return "\n".join([aligned[0], "─" * len(aligned[0]), *aligned[1:]])
