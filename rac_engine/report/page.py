"""The report of a job: one HTML file that needs no network and no JavaScript.

Everything that came from a checkpoint, a trace or a recipe is escaped by jinja2, and the page's own content security
policy forbids scripts besides. Figures are drawn as inline SVG, with the numbers beside them in text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, replace_file
from rac_engine.base.jsonfiles import read_json
from rac_engine.base.sizes import format_seconds
from rac_engine.engine import Metrics, environment, load_metrics, place_of, source_name
from rac_engine.evaluation import evaluations
from rac_engine.jobs.layout import DENSE, PRUNED, RAC, RECIPE, REPORT, TRACES, TRACES_SUMMARY
from rac_engine.jobs.steps import step_times
from rac_engine.pack import load_report
from rac_engine.report.comparison import comparison, recipe_of
from rac_engine.report.figures import decode_lengths, error_map, held_out_maps, sparsity_map

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_TRACES = 2
_SHOWN_CHANGES = 8
_CLIP = 1200  # characters of a trace that are shown
_TRACE_COLUMNS = ["id", "text", "finish_reason", "completion_token_ids"]


def write_report(out: str | Path) -> Path:
    """Write `out`/rac/report.html from what the job left in `out`/rac and return its path.

    Raises `BadInput` where `out` is no output of `rac prune` or `rac run`.
    """
    out = Path(out)
    path = out / RAC / REPORT
    page = render(out)
    with disk_errors(path):
        replace_file(path, page.encode("utf-8", "backslashreplace"))
    return path


def render(out: Path) -> str:
    """The report of the job in the folder `out`, as HTML."""
    metrics = load_metrics(out / RAC)
    recipe = recipe_of(out)
    results = evaluations(out, [variant.name for variant in recipe.compare] if recipe else [])
    rows = comparison(out, metrics)
    labels = {name: row.name for name, row in zip(results, rows, strict=True)}
    recipe_file = out / RAC / RECIPE
    return (
        environment(_TEMPLATES, autoescape=True)
        .get_template("report.html.j2")
        .render(
            title=source_name(metrics.run, out.name),
            run=metrics.run,
            end=metrics.end,
            metrics=metrics,
            packed=load_report(out),
            rows=rows,
            dense=next((row for row in rows if row.name == DENSE), None),
            main=next((row for row in rows if row.main), None),
            heatmaps=[sparsity_map(metrics), error_map(metrics), *held_out_maps(metrics)],
            lengths=decode_lengths(results, labels),
            kinds=_kinds(results, labels),
            changes=_changes(results),
            traces=_traces(out) if _calibrated_on_own_traces(metrics) else [],
            times=_times(step_times(out), metrics),
            memory=_memory(metrics),
            lanes=_lanes(metrics),
            notes=[*_of_traces(out, metrics), *_of_answers(results, labels), *_notes(metrics)],
            recipe=recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else "",
        )
    )


def _kinds(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> dict[str, Any] | None:
    """Accuracy by kind of problem and model, where the problems have kinds."""
    kinds = sorted({row["kind"] for result in results.values() for row in result.get("rows", []) if row.get("kind")})
    if len(kinds) < 2:
        return None

    def accuracy(result: dict[str, Any], kind: str) -> float | None:
        rows = [row for row in result["rows"] if row.get("kind") == kind]
        return sum(bool(row["correct"]) for row in rows) / len(rows) if rows else None

    return {
        "models": list(labels.values()),
        "rows": [(kind, [accuracy(result, kind) for result in results.values()]) for kind in kinds],
    }


def _changes(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Problems that the dense model got right and the pruned one did not, and the number of those the other way."""
    if not {DENSE, PRUNED} <= results.keys():
        return None
    pairs = list(zip(results[DENSE]["rows"], results[PRUNED]["rows"], strict=False))
    lost = [(dense, pruned) for dense, pruned in pairs if dense["correct"] and not pruned["correct"]]
    gained = sum(1 for dense, pruned in pairs if pruned["correct"] and not dense["correct"])
    return {"lost": lost[:_SHOWN_CHANGES], "lost_count": len(lost), "gained_count": gained, "pairs": len(pairs)}


def _calibrated_on_own_traces(metrics: Metrics) -> bool:
    return (metrics.run.get("calibration") or {}).get("source") == f"{RAC}/{TRACES}"


def _traces(out: Path) -> list[dict[str, str]]:
    """The first traces as text, clipped."""
    files = sorted((out / RAC / TRACES).glob("*.parquet"))
    if not files:
        return []
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(files[0]) as reader:
            rows = next(reader.iter_batches(_SHOWN_TRACES, columns=_TRACE_COLUMNS), None)
    except Exception as error:  # whatever Arrow finds wrong with a file
        raise BadInput(f"{files[0]}: not a file of traces ({' '.join(str(error).split())[:200]})") from None
    return [
        {
            "id": str(row.get("id", "")),
            "text": text if len(text) <= _CLIP else text[:_CLIP] + " …",
            "finish_reason": str(row.get("finish_reason", "")),
            "tokens": str(len(row.get("completion_token_ids") or [])),
        }
        for row in (rows.to_pylist() if rows is not None else [])
        for text in [str(row.get("text", ""))]
    ]


def _of_answers(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Notes on the models' answers."""
    return [(f"{labels[name]}: {note}", []) for name, result in results.items() for note in result.get("notes", [])]


def _of_traces(out: Path, metrics: Metrics) -> list[tuple[str, list[str]]]:
    """Notes on this job's traces: those of the sampling, and one if they have fewer tokens than were asked for."""
    path = out / RAC / TRACES / TRACES_SUMMARY
    if not path.is_file() or not _calibrated_on_own_traces(metrics):
        return []
    summary = read_json(path)
    tokens, budget = (summary.get(key) if isinstance(summary, dict) else None for key in ("tokens", "budget"))
    if not isinstance(tokens, int) or not isinstance(budget, int):
        raise BadInput(f"{path}: should tell `tokens` and `budget`; the file is damaged")
    noted = summary.get("notes", [])
    found = [f"traces: {note}" for note in noted] if isinstance(noted, list) else []
    if tokens < budget:
        found.append(f"the prompts gave {tokens:,} tokens of traces, fewer than the {budget:,} asked for")
    return [(note, []) for note in found]


def _times(steps: dict[str, float], metrics: Metrics) -> list[dict[str, Any]]:
    """The job's steps and the pruning's phases: name, seconds, and share of the longest in their group."""
    groups = {"The whole job": steps, "Pruning, by phase": metrics.end.get("phases") or {}}
    return [
        {"title": title, "rows": [(name, s, s / max(*seconds.values(), 1e-9)) for name, s in seconds.items()]}
        for title, seconds in groups.items()
        if seconds
    ]


def _memory(metrics: Metrics) -> list[tuple[str, int, int]]:
    """Place, bytes planned and bytes measured at the peak; on the host beyond what the program had before."""
    peaks, plan = metrics.end.get("memory"), metrics.end.get("plan")
    found = []
    for where, name in (("host", "host, beyond the program"), ("device", "GPU")):
        if isinstance(peaks, dict):
            planned, measured = peaks.get(f"{where}_planned"), peaks.get(f"{where}_measured")
            if isinstance(planned, int) and isinstance(measured, int):
                limitless = isinstance(plan, dict) and plan.get("host_limit") is None
                if where == "host" and measured > planned and limitless:
                    name += " (without a limit the heap keeps what was freed)"
                found.append((name, planned, measured))
    return found


def _lanes(metrics: Metrics) -> list[tuple[str, list[tuple[float, float, str]]]]:
    """The job's timeline: each lane's spans, with start and width in per cent of the job and a title."""
    timeline, layers = metrics.end.get("timeline"), (metrics.run.get("model") or {}).get("layers")
    spans: dict[str, list[tuple[float, float, str]]] = {}
    try:
        rows = [(str(row["lane"]), row["layer"], float(row["start"]), float(row["end"])) for row in timeline or []]
    except (KeyError, TypeError, ValueError):
        return []
    whole = max((end for *_, end in rows), default=0.0)
    for lane, layer, start, end in rows:
        if whole > 0 and 0 <= start <= end:
            what = "lm_head" if layer == layers else f"layer {layer}"
            name = f"{lane}, {what}: {format_seconds(end - start)}"
            spans.setdefault(lane, []).append((100 * start / whole, 100 * (end - start) / whole, name))
    return list(spans.items())


def _notes(metrics: Metrics) -> list[tuple[str, list[str]]]:
    """Notes of the job and of its matrices, each with all the places that it came from."""
    of_matrices = {f"{matrix['name']}: {note}" for matrix in metrics.matrices for note in matrix.get("notes") or []}
    places: dict[str, list[str]] = {str(note): [] for note in metrics.end.get("notes") or [] if note not in of_matrices}
    for matrix in metrics.matrices:
        where = place_of(matrix, " ")
        if matrix.get("skipped"):
            places.setdefault(str(matrix["skipped"]), []).append(where)
        for note in matrix.get("notes") or []:
            places.setdefault(str(note), []).append(where)
    return list(places.items())
