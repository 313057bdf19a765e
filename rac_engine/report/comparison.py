"""The table that compares the evaluated models of a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rac_engine.base.sizes import percent
from rac_engine.engine import Metrics, load_metrics
from rac_engine.evaluation import evaluations
from rac_engine.jobs.layout import DENSE, PRUNED, RAC, RECIPE, VARIANTS
from rac_engine.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Row:
    """One model of the comparison: shares in [0, 1], lengths in tokens."""

    name: str
    calibration: str
    """What it was calibrated on, in a word ("traces"); empty where it was not."""
    method: str
    """How it was pruned; empty where it was not."""
    description: str
    """The calibration in words."""
    sparsity: float | None
    """None for a model of which only answers are known."""
    accuracy: float
    ci95: tuple[float, float]
    mean_tokens: float
    p95_tokens: float
    cut_off_share: float
    problems: int
    main: bool = False

    @property
    def label(self) -> str:
        """Calibration and method apart: `traces · sparsegpt`."""
        return " · ".join(filter(None, [self.calibration, self.method]))


def table(rows: list[Row]) -> str:
    """`rows` as aligned text for a terminal."""
    head = (
        "name",
        "calibration · method",
        "sparsity",
        "accuracy [95% interval]",
        "mean decode",
        "p95 decode",
        "cut off",
    )
    body = [
        (
            row.name,
            row.label,
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
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *body]
    ]
    return "\n".join([aligned[0], "─" * len(aligned[0]), *aligned[1:]])


def comparison(out: Path, metrics: Metrics | None = None) -> list[Row]:
    """The evaluated models of a job, dense first, then the main one, then the variants as the recipe orders them."""
    metrics = metrics or load_metrics(out / RAC)
    recipe = recipe_of(out)
    variants = [variant.name for variant in recipe.compare] if recipe else []
    rows = []
    for name, evaluation in evaluations(out, variants).items():
        label = recipe.name if name == PRUNED and recipe else name
        of = metrics if name == PRUNED else None
        if (out / RAC / VARIANTS / name).is_dir():
            of = load_metrics(out / RAC / VARIANTS / name)
        figures, run = evaluation["summary"], of.run if of else {}
        calibration = run.get("calibration") or {}
        rows.append(
            Row(
                name=label,
                calibration=calibration.get("label", ""),
                method=run.get("settings", {}).get("method", ""),
                description=calibration.get("description", "none" if of else ""),
                sparsity=of.sparsity if of else 0.0 if name == DENSE else None,
                accuracy=float(figures["accuracy"]),
                ci95=(float(figures["ci95"][0]), float(figures["ci95"][1])),
                mean_tokens=float(figures["mean_tokens"]),
                p95_tokens=float(figures["p95_tokens"]),
                cut_off_share=float(figures["cut_off_share"]),
                problems=int(figures["problems"]),
                main=name == PRUNED,
            )
        )
    return rows


def recipe_of(out: Path) -> Recipe | None:
    """The recipe that a job has left in `out`, if it is there."""
    path = out / RAC / RECIPE
    return load_recipe(path) if path.is_file() else None
