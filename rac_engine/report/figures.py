"""Figures of a report: heatmaps and histograms as SVG geometry, with the numbers beside them in text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rac_engine.base.sizes import figure, percent
from rac_engine.engine import Metrics, layer_of, place_of
from rac_engine.jobs.layout import DENSE

_BLUES = ("#eef4fa", "#cfe2f1", "#9cc5e2", "#5fa1cd", "#2d7bb2", "#12578b", "#08365c")
_AMBERS = ("#fdf5e8", "#fae0b8", "#f4c279", "#e59a3f", "#c66d1c", "#954611", "#5e2708")


@dataclass(frozen=True)
class Cell:
    """A matrix in a heatmap: its text and colours, and the title that a pointer or a screen reader gets."""

    text: str
    title: str
    background: str = ""
    ink: str = ""


@dataclass(frozen=True)
class Heatmap:
    """A table of cells, layers down and modules across, with a legend of the colours `scale` from `low` to `high`."""

    title: str
    caption: str
    modules: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    scale: Sequence[str]
    low: str
    high: str

    @property
    def letters(self) -> int:
        """Letters of the longest text in a cell, at least of "down", for which columns are made wide enough."""
        return max(4, *(len(cell.text) for _, cells in self.rows for cell in cells if cell is not None))


@dataclass(frozen=True)
class Histogram:
    """Decode lengths of one model, in the bins that all models share."""

    name: str
    bars: list[tuple[float, float, float, float, str]]
    """Left, top, width and height in SVG units, and a title; bins without answers have none."""
    outline: str
    """SVG path along the tops of the dense model's bars, to compare with."""
    mean_x: float
    """SVG position of the mean."""
    mean: float
    cut_off: float
    """Share of the answers that met the length limit; they are in no bar."""
    summary: str


@dataclass(frozen=True)
class Lengths:
    """The histograms of all models, each `width` by `height` SVG units, with the axis that they share."""

    histograms: list[Histogram]
    ticks: list[tuple[float, str]]
    """SVG position and text."""
    limit: int
    """Tokens at which an answer is cut off; 0 if that is not known."""
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
    """A module's short name: `q` for `self_attn.q_proj`."""
    return module.rpartition(".")[2].removesuffix("_proj") or module


def _heatmap(
    metrics: Metrics, title: str, caption: str, scale: Sequence[str], key: str, top: float, show: Callable[[float], str]
) -> Heatmap:
    """A heatmap of the entry `key` of each matrix's row, from 0 to `top`, with `show` for its text."""
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
    """A heatmap of the zeros in each matrix."""
    caption = "Zeros in each matrix, as a share of its weights (per cent)."
    return _heatmap(metrics, "Sparsity", caption, _BLUES, "sparsity", 1.0, lambda share: f"{100 * share:.4g}")


def error_map(metrics: Metrics) -> Heatmap:
    """A heatmap of the relative error of each matrix's outputs."""
    caption = "Squared error of each matrix's outputs on the calibration tokens, as a share of the outputs' own square."
    top = _most(metrics.pruned, "relative_error")
    return _heatmap(metrics, "Relative error", caption, _AMBERS, "relative_error", top, _shares_shown(top))


def held_out_maps(metrics: Metrics) -> list[Heatmap]:
    """Heatmaps of what was measured on tokens that were held out; none where there were none.

    The errors of the matrices' outputs on them, what these are times the errors on tokens that were seen, and how far
    the hidden states behind each block are from the dense model's.
    """
    found = list[Heatmap]()
    if metrics.held_out_error is not None:
        caption = "The same on sequences that no solver learned from."
        top = _most(metrics.pruned, "held_out_error")
        found.append(_heatmap(metrics, "Held-out error", caption, _AMBERS, "held_out_error", top, _shares_shown(top)))
        rows = [{**row, "gap": _gap(row)} for row in metrics.matrices]
        caption = "Held-out error over the error on tokens that were seen: 1 where nothing was learned by heart."
        top = _most(rows, "gap")
        found.append(_heatmap(Metrics(metrics.run, rows), "Gap", caption, _BLUES, "gap", top, lambda gap: f"{gap:.3g}"))
    return found + ([_block_map(metrics)] if metrics.blocks else [])


def _block_map(metrics: Metrics) -> Heatmap:
    """A heatmap of the hidden states' distance from the dense model's behind each block."""
    sides = {"relative_error": "", "held_out_error": " held out"}
    sides = {key: side for key, side in sides.items() if any(row.get(key) is not None for row in metrics.blocks)}
    numbers = sorted({(row["block"], row["module"]) for row in metrics.blocks})
    at = {(row["layer"], row["block"], row["module"]): row for row in metrics.blocks}
    top = max((_most(metrics.blocks, key) for key in sides), default=0.0)
    show = _shares_shown(top)

    def cell(layer: int, block: tuple[int, str], key: str) -> Cell | None:
        value = at.get((layer, *block), {}).get(key)
        if value is None:
            return None
        title = f"layer {layer}, behind {block[1]}{sides[key]}: {value:.6g}"
        return Cell(show(value), title, *_colour(_AMBERS, value / top if top else 0))

    rows = [
        (str(layer), [cell(layer, block, key) for block in numbers for key in sides])
        for layer in sorted({row["layer"] for row in metrics.blocks})
    ]
    caption = (
        "Squared distance of the hidden states behind each block from the dense model's, as a share of their square."
    )
    names = [_short(module) + side for _, module in numbers for side in sides.values()]
    return Heatmap("Hidden states", caption, names, rows, _AMBERS, "0", show(top))


def _most(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The largest value of an entry, 0 if no row has one."""
    return max((row[key] for row in rows if row.get(key)), default=0.0)


def _gap(row: dict[str, Any]) -> float | None:
    """The held-out error over the one on tokens seen, where both are known."""
    seen, held = row.get("relative_error"), row.get("held_out_error")
    return held / seen if seen and held is not None else None


def _shares_shown(top: float) -> Callable[[float], str]:
    """A way to show shares of which `top` is the largest."""
    digits = 2 if top >= 0.1 else 1 - math.floor(math.log10(top or 1))
    return lambda error: f"{error:.{digits}f}" if digits <= 4 else f"{error:.1e}"


def _nice(step: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least `step`."""
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    return next(int(power * m) for m in (1, 2, 5, 10) if power * m >= step)


@dataclass(frozen=True)
class _Bins:
    """Bins of decode lengths that all models share."""

    tokens: int
    """Width of a bin."""
    count: int
    top: float
    """Largest share of a model's answers in one bin."""

    @property
    def unit(self) -> float:
        """Width of a bin in SVG units."""
        return Lengths.width / self.count

    def x(self, tokens: float) -> float:
        """SVG position of a length."""
        return tokens / self.tokens * self.unit

    def y(self, share: float) -> float:
        """SVG position of the top of a bar, from above."""
        return Lengths.height * (1 - share / self.top)


def decode_lengths(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> Lengths | None:
    """Histograms of the answers that ended, on one axis and one vertical scale; those cut off are told apart.

    `results` are evaluations by model and `labels` the models' names in the report; None where there are no answers.
    """
    if not any(result.get("rows") for result in results.values()):
        return None
    longest = max(row["tokens"] for result in results.values() for row in result["rows"])
    width = _nice(longest / 48)
    count = longest // width + 1
    shares = {name: _shares(result["rows"], width, count) for name, result in results.items()}
    bins = _Bins(width, count, max(map(max, shares.values())) or 1.0)
    outline = _outline(shares[DENSE], bins) if DENSE in shares else ""
    histograms = [
        _histogram(labels[name], results[name]["summary"], own, bins, outline if name != DENSE else "")
        for name, own in shares.items()
    ]
    span = count * width
    ticks = [(round(bins.x(value), 2), f"{value:,}") for value in range(0, span, _nice(span / 7))]
    limit = max(int(result.get("settings", {}).get("max_new_tokens", 0)) for result in results.values())
    return Lengths(histograms, ticks, limit)


def _shares(rows: Sequence[dict[str, Any]], width: int, count: int) -> list[float]:
    """The share of a model's answers that ended in each of `count` bins, `width` tokens wide."""
    ended = [row["tokens"] for row in rows if row["finish_reason"] not in ("length", "context")]
    return [sum(1 for length in ended if length // width == number) / len(rows) for number in range(count)]


def _histogram(name: str, figures: dict[str, Any], shares: Sequence[float], bins: _Bins, outline: str) -> Histogram:
    """A model's histogram; `figures` is the summary of its evaluation."""
    bars = [
        (
            round(number * bins.unit, 2),
            round(bins.y(share), 2),
            round(max(bins.unit - 1, 0.5), 2),
            round(Lengths.height * share / bins.top, 2),
            f"{number * bins.tokens} to {(number + 1) * bins.tokens - 1} tokens: {percent(share)}",
        )
        for number, share in enumerate(shares)
        if share
    ]
    mean, cut_off = figures["mean_tokens"], figures["cut_off_share"]
    summary = (
        f"{name}: mean {figure(mean)} tokens, 95% within {figure(figures['p95_tokens'])}, {percent(cut_off)} cut off"
    )
    return Histogram(name, bars, outline, round(min(bins.x(mean), Lengths.width), 2), mean, cut_off, summary)


def _outline(shares: Sequence[float], bins: _Bins) -> str:
    """An SVG path along the tops of a histogram's bars, with gaps where there are none."""
    path, before = [], 0.0
    for number, share in enumerate([*shares, 0.0]):
        if share or before:
            start = "" if before else f"M{number * bins.unit:.2f} {Lengths.height}"
            path.append(f"{start}V{bins.y(share):.2f}" + (f"H{(number + 1) * bins.unit:.2f}" if share else ""))
        before = share
    return "".join(path)
