"""ThreadSanitizer watches the kernels: every exchange between threads must be ordered by a barrier or an atomic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda.host import ROOT, Program, build, factor_corner, select
from tests.cuda.test_factor_corner import damped, placed, spoil


def test_factor_corner_has_none(watched: Program) -> None:
    """One matrix that has a factor, of as many sub-blocks as there can be, and one that has none."""
    H = damped("plain", 120)
    done = factor_corner(watched, placed([H, spoil(H, 70, -1)], 1), 1, 121)
    assert not done.said and done.status == [0, 72]


def test_select_has_none(watched: Program) -> None:
    """Ties, so that blocks also tell each other how many equal scores they have."""
    scores = (torch.rand(9_001, generator=torch.Generator().manual_seed(0)) * 8).round()
    assert not select(watched, scores, [8_990, 11], [4_000, 5])[-1].said


@pytest.mark.parametrize(
    ("file", "order", "instead"),
    [
        ("factor.cu", "__syncwarp();", ""),
        ("select.cu", "fetch_add(1, memory_order_release)", "fetch_add(1, memory_order_relaxed)"),
    ],
)
def test_one_put_there_is_seen(watched: Program, tmp_path: Path, file: str, order: str, instead: str) -> None:
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    assert text.count(order) == 1
    (tmp_path / file).write_text(text.replace(order, instead))
    program = build(tmp_path, "races", tmp_path / file, watched.path.parent)
    if file == "factor.cu":
        said = factor_corner(program, placed([damped("plain", 40)], 0), 0, 40).said
    else:
        said = select(program, torch.ones(9_000), [9_000], [4_500], times=1)[0].said
    assert "data race" in said
