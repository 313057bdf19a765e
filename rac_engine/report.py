"""The report of a job: one HTML file that needs no network and no JavaScript.

Everything that came from a checkpoint, a trace or a recipe is escaped by jinja2, and the page's own content security
policy forbids scripts besides. Figures are drawn as inline SVG, with the numbers beside them in text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_engine.card import environment
from rac_engine.checkpoint import disk_errors, replace_file
from rac_engine.errors import BadInput
from rac_engine.recipe import Recipe, load_recipe
from rac_engine.results import (
    RAC,
    TRACES,
    Metrics,
    Row,
    evaluations,
    figure,
    layer_of,
    load_metrics,
    percent,
    place_of,
    read_json,
    step_times,
)
from rac_engine.sizes import format_seconds

REPORT = "report.html"

_BLUES = ("#eef4fa", "#cfe2f1", "#9cc5e2", "#5fa1cd", "#2d7bb2", "#12578b", "#08365c")
_AMBERS = ("#fdf5e8", "#fae0b8", "#f4c279", "#e59a3f", "#c66d1c", "#954611", "#5e2708")
_SHOWN_TRACES = 2
_SHOWN_CHANGES = 8
_CLIP = 1200
_TRACE_COLUMNS = ["id", "text", "finish_reason", "completion_token_ids"]


@dataclass(frozen=True)
class Cell:
    """One matrix in a heatmap: what is printed, its colours, and what a pointer or a screen reader gets."""

    text: str
    title: str
    background: str = ""
    ink: str = ""


@dataclass(frozen=True)
class Heatmap:
    """Layers down, modules across; `scale` are the legend's colours from `low` to `high`."""

    title: str
    caption: str
    modules: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    scale: Sequence[str]
    low: str
    high: str


@dataclass(frozen=True)
class Histogram:
    """Decode lengths of one model on bins shared by all: bars and outline are SVG geometry."""

    name: str
    bars: list[tuple[float, float, float, float, str]]
    outline: str
    mean_x: float
    mean: float
    cut_off: float
    summary: str


@dataclass(frozen=True)
class Lengths:
    """The histograms of all models with the axis that they share (SVG units, `width` x `height` each)."""

    histograms: list[Histogram]
    ticks: list[tuple[float, str]]
    limit: int
    limit_shown: bool
    width: int = 560
    height: int = 74


def comparison(out: Path, metrics: Metrics | None = None) -> list[Row]:
    """The evaluated models of a job, dense first, then the main one, then the variants as the recipe orders them."""
    metrics = metrics or load_metrics(out / RAC)
    recipe = _recipe(out)
    variants = [variant.name for variant in recipe.compare] if recipe else []
    rows = []
    for name, evaluation in evaluations(out, variants).items():
        label = recipe.name if name == "pruned" and recipe else name
        of = metrics if name == "pruned" else None
        if (out / RAC / "variants" / name).is_dir():
            of = load_metrics(out / RAC / "variants" / name)
        figures = evaluation["summary"]
        rows.append(
            Row(
                name=label,
                calibration=((of.run.get("calibration") or {}).get("description", "none") if of else ""),
                sparsity=of.sparsity if of else 0.0 if name == "dense" else None,
                accuracy=float(figures["accuracy"]),
                ci95=(float(figures["ci95"][0]), float(figures["ci95"][1])),
                mean_tokens=float(figures["mean_tokens"]),
                p95_tokens=float(figures["p95_tokens"]),
                cut_off_share=float(figures["cut_off_share"]),
                problems=int(figures["problems"]),
                main=name == "pruned",
            )
        )
    return rows


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
    """The report's HTML."""
    metrics = load_metrics(out / RAC)
    recipe = _recipe(out)
    results = evaluations(out, [variant.name for variant in recipe.compare] if recipe else [])
    rows = comparison(out, metrics)
    labels = dict(zip(results, rows, strict=True))
    recipe_file = out / RAC / "recipe.yaml"
    return (
        environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            title=Path(metrics.run.get("model", {}).get("path", out.name)).name,
            run=metrics.run,
            end=metrics.end,
            metrics=metrics,
            rows=rows,
            dense=next((row for row in rows if row.name == "dense"), None),
            main=next((row for row in rows if row.main), None),
            heatmaps=[_sparsity_map(metrics), _error_map(metrics)],
            lengths=_lengths(results, {name: row.name for name, row in labels.items()}),
            kinds=_kinds(results, {name: row.name for name, row in labels.items()}),
            changes=_changes(results),
            traces=_traces(out) if _calibrated_on_own_traces(metrics) else [],
            times=_times(step_times(out), metrics),
            memory=_memory(metrics),
            lanes=_lanes(metrics),
            notes=[*_short_traces(out, metrics), *_notes(metrics)],
            recipe=recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else "",
        )
    )


def _recipe(out: Path) -> Recipe | None:
    path = out / RAC / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def _colour(scale: Sequence[str], share: float) -> tuple[str, str]:
    """The colour at `share` of `scale` and an ink that reads well on it (WCAG contrast of 4.5 at least)."""
    at = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(at), len(scale) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in scale[low : low + 2]]
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True)]
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
    return "#{:02x}{:02x}{:02x}".format(*mixed), ink


def _short(module: str) -> str:
    """`self_attn.q_proj` → `q`."""
    return module.rpartition(".")[2].removesuffix("_proj") or module


def _grid(
    metrics: Metrics, title: str, caption: str, scale: Sequence[str], key: str, top: float, show: Callable[[float], str]
) -> Heatmap:
    modules = list(dict.fromkeys(matrix["module"] for matrix in metrics.matrices))
    layers = {matrix["layer"]: layer_of(matrix) for matrix in metrics.matrices}
    at = {(matrix["layer"], matrix["module"]): matrix for matrix in metrics.matrices}

    def cell(layer: int, module: str) -> Cell | None:
        matrix = at.get((layer, module))
        if matrix is None:
            return None
        place = f"{place_of(matrix)} ({matrix['rows']} × {matrix['columns']})"
        if matrix.get("skipped"):
            return Cell("dense", f"{place}: {matrix['skipped']}")
        value = matrix.get(key)
        if value is None:
            return Cell("–", f"{place}: not measured")
        return Cell(show(value), f"{place}: {title.lower()} {value:.6g}", *_colour(scale, value / top if top else 0))

    rows = [(layers[layer], [cell(layer, module) for module in modules]) for layer in sorted(layers)]
    return Heatmap(title, caption, [_short(module) for module in modules], rows, scale, "0", show(top))


def _sparsity_map(metrics: Metrics) -> Heatmap:
    caption = "Zeros in each matrix, as a share of its weights (per cent)."
    return _grid(metrics, "Sparsity", caption, _BLUES, "sparsity", 1.0, lambda share: f"{100 * share:.4g}")


def _error_map(metrics: Metrics) -> Heatmap:
    top = max((matrix["relative_error"] for matrix in metrics.pruned if matrix.get("relative_error")), default=0.0)
    caption = "Squared error of each matrix's outputs on the calibration tokens, as a share of the outputs' own square."
    digits = 2 if top >= 0.1 else 1 - math.floor(math.log10(top or 1))

    def show(error: float) -> str:
        return f"{error:.{digits}f}" if digits <= 4 else f"{error:.1e}"

    return _grid(metrics, "Relative error", caption, _AMBERS, "relative_error", top, show)


def _nice(step: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least `step`."""
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    return next(int(power * m) for m in (1, 2, 5, 10) if power * m >= step)


def _lengths(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> Lengths | None:
    """Histograms of the answers that ended, on one axis and one vertical scale; those cut off are a column apart."""
    if not any(result.get("rows") for result in results.values()):
        return None
    ended = {
        name: [row["tokens"] for row in result["rows"] if row["finish_reason"] != "length"]
        for name, result in results.items()
    }
    every = [row["tokens"] for result in results.values() for row in result["rows"]]
    limit = max(int(result.get("settings", {}).get("max_new_tokens", 0)) for result in results.values())
    bin_width = _nice(max(every) / 48)
    bins = max(every) // bin_width + 1
    counts = {
        name: [
            sum(1 for length in lengths if length // bin_width == b) / len(results[name]["rows"]) for b in range(bins)
        ]
        for name, lengths in ended.items()
    }
    top = max((share for shares in counts.values() for share in shares), default=0) or 1.0
    width, height = Lengths.width, Lengths.height
    unit = width / bins
    outline = _outline(counts["dense"], unit, height, top) if "dense" in counts else ""
    histograms = []
    for name, shares in counts.items():
        figures = results[name]["summary"]
        bars = [
            (
                round(b * unit, 2),
                round(height * (1 - share / top), 2),
                round(max(unit - 1, 0.5), 2),
                round(height * share / top, 2),
                f"{b * bin_width} to {(b + 1) * bin_width - 1} tokens: {percent(share)}",
            )
            for b, share in enumerate(shares)
            if share
        ]
        summary = (
            f"{labels[name]}: mean {figure(figures['mean_tokens'])} tokens, "
            f"95% within {figure(figures['p95_tokens'])}, {percent(figures['cut_off_share'])} cut off"
        )
        mean_x = round(min(figures["mean_tokens"] / bin_width * unit, width), 2)
        shown = outline if name != "dense" else ""
        mean = figures["mean_tokens"]
        histograms.append(Histogram(labels[name], bars, shown, mean_x, mean, figures["cut_off_share"], summary))
    step = _nice(bins * bin_width / 7)
    ticks = [(round(value / bin_width * unit, 2), f"{value:,}") for value in range(0, bins * bin_width, step)]
    return Lengths(histograms, ticks, limit, max(every) >= limit > 0)


def _outline(shares: list[float], unit: float, height: int, top: float) -> str:
    """An SVG path along the tops of a histogram's bars, with gaps where there are none."""
    path, before = [], 0.0
    for b, share in enumerate([*shares, 0.0]):
        if share or before:
            start = "" if before else f"M{b * unit:.2f} {height}"
            path.append(f"{start}V{height * (1 - share / top):.2f}" + (f"H{(b + 1) * unit:.2f}" if share else ""))
        before = share
    return "".join(path)


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
    """Problems that one of dense and pruned got right and the other did not."""
    if not {"dense", "pruned"} <= results.keys():
        return None
    pairs = list(zip(results["dense"]["rows"], results["pruned"]["rows"], strict=False))
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


def _short_traces(out: Path, metrics: Metrics) -> list[tuple[str, list[str]]]:
    """A note where this job's prompts gave fewer tokens of traces than were asked for."""
    path = out / RAC / TRACES / "traces.json"
    if not path.is_file() or not _calibrated_on_own_traces(metrics):
        return []
    summary = read_json(path)
    tokens, budget = (summary.get(key) if isinstance(summary, dict) else None for key in ("tokens", "budget"))
    if not isinstance(tokens, int) or not isinstance(budget, int):
        raise BadInput(f"{path}: should tell `tokens` and `budget`; the file is damaged")
    if tokens >= budget:
        return []
    return [(f"the prompts gave {tokens:,} tokens of traces, fewer than the {budget:,} asked for", [])]


def _times(steps: dict[str, float], metrics: Metrics) -> list[dict[str, Any]]:
    """Groups of (name, seconds, share of the longest in its group): the job's steps, the pruning's phases."""
    groups = {"The whole job": steps, "Pruning, by phase": metrics.end.get("phases") or {}}
    return [
        {"title": title, "rows": [(name, s, s / max(*seconds.values(), 1e-9)) for name, s in seconds.items()]}
        for title, seconds in groups.items()
        if seconds
    ]


def _memory(metrics: Metrics) -> list[tuple[str, int, int]]:
    """Where, bytes planned and bytes measured at the peak; the host's beyond what the program had before."""
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
    """The job's timeline: for each lane its spans, as start and width in per cent of the job, and what to call them."""
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
    """Everything that was noted, a note with all the places it came from."""
    of_matrices = {f"{matrix['name']}: {note}" for matrix in metrics.matrices for note in matrix.get("notes") or []}
    places: dict[str, list[str]] = {str(note): [] for note in metrics.end.get("notes") or [] if note not in of_matrices}
    for matrix in metrics.matrices:
        where = place_of(matrix, " ")
        if matrix.get("skipped"):
            places.setdefault(str(matrix["skipped"]), []).append(where)
        for note in matrix.get("notes") or []:
            places.setdefault(str(note), []).append(where)
    return list(places.items())
