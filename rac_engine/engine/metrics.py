"""metrics.jsonl read back: the run, a row a matrix, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import loads
from rac_engine.base.sizes import percent
from rac_engine.base.stored import Natural, Object, Positive, Stored, Whole, mistake_in
from rac_engine.jobs.layout import METRICS
from rac_engine.solve import DAMPING

TIED = "tied: lm_head has the same zeros"
"""Note on a table of embeddings that is the head too."""


def rule_text(settings: dict[str, Any]) -> str:
    """Pattern or sparsity as text, `2:4` or `50% unstructured`, what kept values are, and whether some matrices have
    another one."""
    rule = settings.get("pattern") or f"{percent(settings.get('sparsity'))} unstructured"
    if settings.get("values", "same") != "same":
        rule += f", kept values {settings['values']}"
    if settings.get("allocation", "uniform") != "uniform":
        rule += f", allocated by {settings['allocation']}"
    count = len(settings.get("overrides") or ())
    return rule + (f", {count} override{'s' if count > 1 else ''}" if count else "")


def tensor_of(row: Mapping[str, Any]) -> str:
    """The name of the tensor that has a matrix, by the matrix's row: its own, or that of all experts."""
    return str(row.get("tensor", row["name"]))


@dataclass(frozen=True)
class Metrics:
    """Metrics of a job: the run (versions, model, calibration, settings), a row a matrix, and how it ended.

    Blocks and layers have rows where the dense model went beside the pruned one.
    """

    run: dict[str, Any]
    matrices: list[dict[str, Any]]
    end: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def pruned(self) -> list[dict[str, Any]]:
        """Rows of the matrices that are pruned."""
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
    def held_out_error(self) -> float | None:
        """Mean relative error of the matrices' outputs on tokens that were held out; None where none were."""
        errors = [matrix["held_out_error"] for matrix in self._judged]
        return sum(errors) / len(errors) if errors else None

    @property
    def gap(self) -> float | None:
        """Mean error on tokens that were held out over that on those seen, of the matrices that have both."""
        judged = [matrix for matrix in self._judged if matrix.get("relative_error") is not None]
        seen = sum(matrix["relative_error"] for matrix in judged)
        return sum(matrix["held_out_error"] for matrix in judged) / seen if seen else None

    @property
    def dampings(self) -> str:
        """The damping as text; where it was chosen, what was chosen most often, and from where to where."""
        if (given := self.run.get("settings", {}).get("damping")) is not None:
            return f"{given:g}"
        found = sorted(matrix["damping"] for matrix in self.pruned if matrix.get("damping") is not None)
        if not found or found[0] == found[-1]:
            return f"{found[0] if found else DAMPING:g}"
        return f"{found[0]:g} to {found[-1]:g} by held-out error, {found[len(found) // 2]:g} in the median"

    @property
    def last_layer(self) -> dict[str, Any] | None:
        """The row of the last layer behind which hidden states were compared with the dense model's."""
        return max(self.layers, key=lambda row: int(row["layer"]), default=None)

    @property
    def worst(self) -> dict[str, Any] | None:
        """The matrix with the largest relative error."""
        return max(self._measured, key=lambda matrix: float(matrix["relative_error"]), default=None)

    @property
    def _judged(self) -> list[dict[str, Any]]:
        return [matrix for matrix in self.pruned if matrix.get("held_out_error") is not None]

    @property
    def _measured(self) -> list[dict[str, Any]]:
        return [matrix for matrix in self.pruned if matrix.get("relative_error") is not None]


def source_name(run: dict[str, Any], otherwise: str = "model") -> str:
    """Name of the checkpoint that a run pruned, on one line; records of earlier versions have its path."""
    model = run.get("model", {})
    return " ".join((model.get("name") or Path(model.get("path", "")).name).split()) or otherwise


def layer_of(matrix: dict[str, Any]) -> str:
    """Number of a matrix's decoder layer; nothing for lm_head and embeddings, whose modules stand by themselves."""
    return str(matrix["layer"]) if "." in str(matrix["module"]) else ""


def place_of(matrix: dict[str, Any], between: str = ", ") -> str:
    """A matrix's place in the model, in words."""
    layer = layer_of(matrix)
    return f"layer {layer}{between}{matrix['module']}" if layer else str(matrix["module"])


class _StoredModel(Stored):
    name: str = ""
    revision: str | None = None
    declared: dict[str, str | list[str]] = {}
    path: str = ""
    sha256: str | None = None
    parameters: Whole | None = None


class _StoredSettings(Stored):
    method: str = ""
    sparsity: float | None = None
    pattern: str | None = None
    block_size: Positive = 128


class _StoredCalibration(Stored):
    label: str = ""
    description: str
    source: str
    part: str
    sequences: Whole
    tokens: Whole


class _StoredRun(Stored):
    model: _StoredModel = _StoredModel()
    settings: _StoredSettings
    calibration: _StoredCalibration | None = None
    versions: Object = {}
    machine: Object = {}


class _StoredValues(Stored):
    kind: str
    group: Positive
    added_error: float | None = None


class _StoredTarget(Stored):
    sparsity: float
    pattern: str | None


class _StoredMatrix(Stored):
    layer: Whole
    module: str
    name: str
    rows: Positive
    columns: Positive
    zeros: Natural
    zeros_before: Natural = 0
    sparsity: float
    relative_error: float | None = None
    held_out_error: float | None = None
    damping: float | None = None
    tokens: Natural | None = None
    seconds: float | None = None
    target: _StoredTarget | None = None
    values: _StoredValues | None = None
    lost: Whole | None = None
    tensor: str | None = None
    expert: Natural | None = None
    skipped: str | None = None
    skipped_code: str | None = None
    notes: list[str] = []


class _StoredErrors(Stored):
    relative_error: float | None = None
    held_out_error: float | None = None


class _StoredLayer(_StoredErrors):
    layer: Whole
    by_source: list[_StoredErrors] = []


class _StoredBlock(_StoredLayer):
    block: Whole
    module: str


class _StoredEnd(Stored):
    seconds: float = 0.0
    phases: dict[str, float] = {}
    peak_memory: Natural | None = None
    notes: list[str] = []


_ENTRIES: dict[str, type[BaseModel]] = {
    "run": _StoredRun,
    "matrix": _StoredMatrix,
    "block": _StoredBlock,
    "layer": _StoredLayer,
    "end": _StoredEnd,
}


def load_metrics(folder: Path) -> Metrics:
    """Read `folder`/metrics.jsonl. Raises `BadInput` where it is missing or a line is broken."""
    path = folder / METRICS
    if not path.is_file():
        raise BadInput(f"{path} not found; give the output folder of `rac prune` or `rac run`")
    run: dict[str, Any] = {}
    end: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {"matrix": [], "block": [], "layer": []}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = loads(line)
                kind = entry["type"]
                mistake = mistake_in(entry, _ENTRIES[kind])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                mistake = (
                    str(error)
                    if isinstance(error, ValueError)
                    else "its `type` should be run, matrix, block, layer or end"
                )
            if mistake is not None:
                raise BadInput(f"{path}:{number}: not a metrics entry ({mistake}); the file is damaged") from None
            if kind in rows:
                rows[kind].append(entry)
            elif kind == "run":
                run = entry
            else:
                end = entry
    if not run:
        raise BadInput(f"{path}: says nothing of the run; the file is damaged")
    return Metrics(run, rows["matrix"], end, rows["block"], rows["layer"])
