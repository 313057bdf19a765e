"""Intervals, paired tests and summaries of answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (at 95% by default): E. B. Wilson, J. Am. Stat. Assoc. 22 (1927)."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    middle = share + square / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally good, from the problems that just one of them solved."""
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1))
    return min(2 * tail / 2**trials, 1.0)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with its 95% interval, decode lengths in tokens, and the share that the length limit cut off."""
    lengths, correct = sorted(row["tokens"] for row in rows), sum(row["correct"] for row in rows)
    return {
        "problems": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "ci95": list(wilson(correct, len(rows))),
        "mean_tokens": statistics.fmean(lengths),
        "median_tokens": statistics.median(lengths),
        "p95_tokens": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "cut_off_share": sum(row["finish_reason"] in ("length", "context") for row in rows) / len(rows),
        "kinds": {
            kind: {"problems": len(here), "accuracy": sum(row["correct"] for row in here) / len(here)}
            for kind in sorted({row["kind"] for row in rows if row["kind"] is not None})
            if (here := [row for row in rows if row["kind"] == kind])
        },
    }


def compare(rows: list[dict[str, Any]], earlier: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """These answers against `earlier` ones to the same problems: who solved what the other did not, and lengths."""
    lost = sum(old["correct"] and not new["correct"] for new, old in zip(rows, earlier, strict=True))
    gained = sum(new["correct"] and not old["correct"] for new, old in zip(rows, earlier, strict=True))
    return {
        "baseline": name,
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar(lost, gained),
        "length_ratio": sum(row["tokens"] for row in rows) / max(sum(row["tokens"] for row in earlier), 1),
    }


def mean_of(sums: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """The mean of what tokens of independent sequences have, and its standard error over the sequences.

    `sums` are a sequence's sum and its number of tokens. The mean is a ratio of two sums, whose error is that of its
    linear approximation (W. G. Cochran, Sampling Techniques, 3rd edition 1977, section 6.4); None for one sequence.
    """
    counted = [(total, tokens) for total, tokens in sums if tokens]
    every, count = sum(tokens for _, tokens in counted), len(counted)
    mean = math.fsum(total for total, _ in counted) / every
    if count < 2:
        return mean, None
    squares = math.fsum((total - mean * tokens) ** 2 for total, tokens in counted)
    return mean, math.sqrt(squares * count / (count - 1)) / every
