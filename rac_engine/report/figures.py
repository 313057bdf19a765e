"""The figures of a report: heatmaps and histograms as geometry, with the numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rac_engine.base.sizes import figure, percent
from rac_engine.engine import Metrics, layer_of, place_of

_BLUES = ("#eef4fa", "#cfe2f1", "#9cc5e2", "#5fa1cd", "#2d7bb2", "#12578b", "#08365c")

_AMBERS = ("#fdf5e8", "#fae0b8", "#f4c279", "#e59a3f", "#c66d1c", "#954611", "#5e2708")


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


def sparsity_map(metrics: Metrics) -> Heatmap:
    caption = "Zeros in each matrix, as a share of its weights (per cent)."
    return _grid(metrics, "Sparsity", caption, _BLUES, "sparsity", 1.0, lambda share: f"{100 * share:.4g}")


def error_map(metrics: Metrics) -> Heatmap:
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


def decode_lengths(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> Lengths | None:
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
