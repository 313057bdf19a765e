"""N:M patterns: at most N nonzeros in every M consecutive columns of a row."""

from __future__ import annotations

import re

Pattern = tuple[int, int]

FORM = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")
"""N:M as text."""


def parse_pattern(pattern: str | Pattern | None) -> Pattern | None:
    """``"2:4"`` or ``(2, 4)`` → ``(2, 4)``: N weights stay of every M. None stays None.

    N is what stays, as in the N:M literature. Where N = M all weights stay: a pattern like any other to an op, though a
    recipe refuses it. Raises ValueError for other text, and unless 1 <= N <= M.
    """
    if pattern is None:
        return None
    if isinstance(pattern, str):
        match = FORM.fullmatch(pattern)
        if not match:
            raise ValueError(f"pattern {pattern!r} is not of the form N:M, such as 2:4")
        pattern = int(match[1]), int(match[2])
    keep, group = pattern
    if not 1 <= keep <= group:
        raise ValueError(f"pattern {keep}:{group} must keep at least 1 and at most {group} of every {group} weights")
    return keep, group


def check_pattern_fits(pattern: Pattern, columns: int) -> None:
    """Raises ValueError if ``columns`` cannot be cut into whole groups of M."""
    if columns % pattern[1]:
        raise ValueError(
            f"pattern {pattern[0]}:{pattern[1]} needs columns in whole groups of {pattern[1]}, not {columns}"
        )


def zeros_of(sparsity: float, count: int) -> int:
    """Number of weights that go, of `count`: the largest whose share, as a double, is within `sparsity`.

    That is floor(sparsity · count) of the number that was written: of .29 the product with 100 is 28.999…, but 29 go.
    For a share k/count that was worked out before it is k again.
    """
    k = min(max(int(sparsity * count), 0), count)
    if k < count and (k + 1) / count <= sparsity:
        return k + 1
    return k - 1 if k and k / count > sparsity else k


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless 0 <= sparsity <= 1 (NaN included)."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} must lie between 0 and 1")
