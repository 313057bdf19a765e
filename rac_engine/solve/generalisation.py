"""What the tokens of a calibration teach: the error on other tokens that is to be expected, by the error on these.

A least-squares fit with d free numbers a row, on t independent tokens, has an error on those tokens of σ² (1 − d/t) and
one on others of σ² (1 + d/t), so that their ratio is about 1 + 2 d/t; generalised cross-validation rests on the same
(Craven and Wahba, 1979). Here d grows with the weights that are kept of a row of n, (1 − sparsity) · n. Tokens of a
sequence are not independent, and outputs that are matched are not to be had without error: both are in a constant c of
the method, measured on real weights (benchmarks/tokens.py, where the points stand beside the law),

    error held out ≈ (1 + c · (1 − sparsity) · n / tokens) · error seen.
"""

from __future__ import annotations

import math

from rac_engine.solve.method import Method

MOST = 2.0
"""The ratio beyond which tokens are too few: half of what is measured on tokens seen is then learnt by heart."""


def expected_gap(method: Method, inputs: int, tokens: float, sparsity: float) -> float | None:
    """The error on tokens held out over that on the `tokens` that a matrix with so many inputs is pruned by.

    None where it was not measured for the method, or there are no tokens.
    """
    if method.learns is None or not tokens:
        return None
    return 1 + method.learns * (1 - sparsity) * inputs / tokens


def enough_tokens(method: Method, inputs: int, sparsity: float) -> int | None:
    """Tokens with which the errors differ by a factor of MOST; None where that was not measured for the method."""
    return None if method.learns is None else math.ceil(method.learns * (1 - sparsity) * inputs / (MOST - 1))
