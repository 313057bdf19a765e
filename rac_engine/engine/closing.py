"""The end of a job: model card, recipe, metrics and manifest are written beside the weights."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.files import disk_errors, write_file
from rac_engine.base.process import peak_memory
from rac_engine.base.sizes import percent
from rac_engine.engine.blocks import layer_rows
from rac_engine.engine.card import model_card
from rac_engine.engine.context import Context
from rac_engine.engine.recovery import recovered
from rac_engine.jobs.layout import CARD, METRICS, RAC, RECIPE
from rac_engine.jobs.publish import write_manifest


@dataclass(frozen=True)
class PruneReport:
    """The output of a job. `run`, `matrices`, `blocks`, `layers` and `end` are the lines of `out`/rac/metrics.jsonl."""

    out: Path
    run: dict[str, Any]
    matrices: list[dict[str, Any]]
    end: dict[str, Any]
    resumed: int
    """Layers that were found finished by an earlier, interrupted job."""
    blocks: list[dict[str, Any]]
    layers: list[dict[str, Any]]


def close_job(
    context: Context,
    out: Path,
    run: dict[str, Any],
    recipe: str,
    remarks: list[str],
    resident: int,
    place: Sequence[str] = (),
) -> PruneReport:
    """Write what goes beside the weights of a finished job, in the folder that will be `out`.

    `run` is its description, `recipe` its recipe as YAML; `remarks` go before all other notes; `resident` are the bytes
    that the process had when the job began. Notes on the `place` where it worked are for the report, not for the card,
    which is the same wherever the job runs.
    """
    folder = context.files.writer.folder
    records = context.files.journal.records[1:]
    rows = [row for record in records for row in record["matrices"]]
    blocks = [row for record in records for row in record.get("blocks", [])]
    learned = recovered(records)
    layers = layer_rows(blocks)
    allocation = context.allocation
    notes = [
        *remarks,
        *context.model.notes(),
        *([f"allocation {context.settings.allocation}: {allocation.describe()}"] if allocation else []),
        *_reordering(rows),
        *_tuning(rows, context.settings.epochs),
        *_dampings(rows),
        *_rounding(rows),
        *_recovery(learned),
        *(f"{row['name']}: {note}" for row in rows for note in row["notes"]),
    ]
    end = {
        "type": "end",
        "seconds": context.clock.seconds(),
        "phases": context.clock.phases,
        "timeline": context.timeline.rows(),
        "busy": context.timeline.busy(),
        "peak_memory": peak_memory(),
        "plan": context.memory.summary(),
        "memory": _memory(context, resident),
        "notes": [*place, *notes],
    }
    if learned is not None:
        end["recovery"] = learned
    card = model_card({**run, "matrices": rows, "end": {"notes": notes}})  # no times: the same job, the same bytes
    with disk_errors(folder):
        write_file(folder / CARD, card.encode())
        write_file(folder / RAC / RECIPE, recipe.encode())
        lines = "".join(json.dumps(line) + "\n" for line in [run, *rows, *blocks, *layers, end])
        write_file(folder / RAC / METRICS, lines.encode())
    write_manifest(folder)
    return PruneReport(out, run, rows, end, context.resumed, blocks, layers)


def _memory(context: Context, resident: int) -> dict[str, Any]:
    """Planned and measured peaks in bytes: of the process beyond what it had before, and of the device."""
    plan, program = context.memory, next(phase.host["program"] for phase in context.memory.phases)
    peaks: dict[str, Any] = {
        "baseline": resident,
        "host_planned": plan.host_peak - program,
        "host_measured": peak_memory() - resident,
    }
    if plan.on_gpu:
        peaks |= {
            "device_planned": plan.device_peak,
            "device_measured": torch.cuda.max_memory_allocated(context.device),
        }
    return peaks


def _reordering(rows: list[dict[str, Any]]) -> list[str]:
    """A note on MLPs whose neurons are in another order."""
    moved = {row["layer"] for row in rows if "reordered" in row}
    return [f"{len(moved)} MLPs have their inner neurons in another order, for the pattern"] if moved else []


def _rounding(rows: list[dict[str, Any]]) -> list[str]:
    """A note on kept weights that were put on a grid, with what that cost in the mean."""
    rounded = [row for row in rows if "values" in row]
    if not rounded:
        return []
    kinds = " and ".join(sorted({row["values"]["kind"] for row in rounded}))
    weights, lost = sum(row["rows"] * row["columns"] for row in rounded), sum(row["lost"] for row in rounded)
    note = f"kept weights of {len(rounded)} matrices are {kinds} with scales: {percent(lost / weights)} became zero"
    added = [row["values"]["added_error"] for row in rounded if "added_error" in row["values"]]
    if added:
        note += f"; of their outputs' square {sum(added) / len(added):.3g} is off by rounding, in the mean"
    return [note]


def _tuning(rows: list[dict[str, Any]], epochs: int) -> list[str]:
    """A note on the blocks that were tuned, with the mean of their errors before and after."""
    blocks = {(row["layer"], row["tuned"]["before"], row["tuned"]["after"]) for row in rows if "tuned" in row}
    if not blocks:
        return []
    before, after = (sum(block[place] for block in sorted(blocks)) / len(blocks) for place in (1, 2))
    return [
        f"{len(blocks)} blocks tuned for {epochs} epochs: of the hidden states that they give, "
        f"{before:.3g} of the square was off before and {after:.3g} after, in the mean"
    ]


def _dampings(rows: list[dict[str, Any]]) -> list[str]:
    """A note on the dampings that were chosen."""
    chosen = sorted(row["damping"] for row in rows if "dampings" in row)
    if not chosen:
        return []
    middle = statistics.median_low(chosen)
    return [f"damping chosen by held-out error: {chosen[0]:g} to {chosen[-1]:g}, {middle:g} in the median"]


def _recovery(learned: dict[str, Any] | None) -> list[str]:
    """A note on what the whole model has learned after it was pruned."""
    if learned is None:
        return []
    where = "on sequences held out" if learned["held_out"] else "on the sequences it learned from, as none is held out"
    said = (
        f"recovered in {len(learned['passes'])} passes over the calibration: the divergence of its next tokens from "
        f"the dense model's is {learned['after']:.3g} nats, {learned['before']:.3g} before, {where}"
    )
    kept = f"pass {learned['kept']} is kept" if learned["kept"] else "no pass made it less: the weights are as pruned"
    return [f"{said}; {kept}"]
