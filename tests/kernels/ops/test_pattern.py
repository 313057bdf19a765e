"""N:M patterns as text and as numbers."""

from __future__ import annotations

import pytest

from rac_kernels.ops.pattern import parse_pattern


def test_text_and_numbers_mean_the_same() -> None:
    assert parse_pattern("2:4") == parse_pattern((2, 4)) == (2, 4)
    assert parse_pattern(None) is None
    assert parse_pattern("4:4") == (4, 4)  # keeps everything


@pytest.mark.parametrize("pattern", ["5:4", "0:4", (5, 4), " 2:4", "2:4 ", "2 : 4", "2", "2:4:8", "-1:4", "²:4", ""])
def test_what_is_no_pattern_is_refused(pattern: str | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(pattern)
