"""The distribution of a matrix's scores w_ij² h_jj, h the diagonal of H: sums and a histogram.

w² h_jj is what the outputs' squared error grows by if that weight alone goes and nothing makes up for it; its root is
Wanda's score. Allocation of sparsity over a model needs no more of a matrix than this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BINS_AN_OCTAVE = 32

LOWEST, HIGHEST = -192, 192

"""log2 of the scores that the histogram tells apart; those beyond count in its first or last bin."""

ROWS_BYTES = 32 << 20  # bytes of rows held in fp64 at a time


@dataclass(frozen=True)
class ScoreProfile:
    """Distribution of the scores w_ij² h_jj of a matrix; `+` gives that of two matrices together."""

    count: int
    zeros: int
    """Scores that are 0: they are in no bin."""
    total: float
    """Σ w² h."""
    histogram: Tensor
    """[(HIGHEST − LOWEST) · BINS_AN_OCTAVE] int64 on the CPU, evenly spaced in log2 of the score."""

    def __add__(self, other: ScoreProfile) -> ScoreProfile:
        return ScoreProfile(
            self.count + other.count,
            self.zeros + other.zeros,
            self.total + other.total,
            self.histogram + other.histogram,
        )


def score_profile(W: Tensor, norms: Tensor) -> ScoreProfile:
    """The profile of W [rows, n], any float dtype, with norms [n], Σ_t x_tj², finite and at least 0; sums in fp64."""
    _check(W, norms)
    bins = (HIGHEST - LOWEST) * BINS_AN_OCTAVE
    histogram = torch.zeros(bins, dtype=torch.int64, device=W.device)
    total = 0.0
    zeros = 0
    for roots in _roots(W, norms):
        total += float(roots.square().sum())
        positive = roots[roots > 0]
        zeros += roots.numel() - positive.numel()
        places = ((2 * positive.log2() - LOWEST) * BINS_AN_OCTAVE).floor().clamp(0, bins - 1)
        histogram += torch.bincount(places.long(), minlength=bins)
    return ScoreProfile(W.numel(), zeros, total, histogram.cpu())


def _roots(W: Tensor, norms: Tensor) -> Iterator[Tensor]:
    """|w| √h in fp64, by runs of rows."""
    scale = norms.double().sqrt()
    step = max(ROWS_BYTES // (8 * max(W.shape[1], 1)), 1)
    for top in range(0, len(W), step):
        yield W[top : top + step].double().abs_().mul_(scale)


def _check(W: Tensor, norms: Tensor) -> None:
    if W.ndim != 2 or norms.shape != (W.shape[1],):
        raise ValueError(f"norms must be [{W.shape[-1]}] to fit W {list(W.shape)}, not {list(norms.shape)}")


def workspace(rows: int, n: int) -> int:
    """Bytes that the profile of W [rows, n] takes: fp64 copies of the rows that are counted at a time."""
    return 6 * min(8 * rows * n, ROWS_BYTES)
