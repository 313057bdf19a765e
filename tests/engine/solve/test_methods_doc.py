"""The method that docs/methods.md shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rac_engine.solve import METHODS, prune_matrix

DOC = Path(__file__).parents[3] / "docs" / "methods.md"


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_example_is_a_method(pattern: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    monkeypatch.setattr("rac_engine.solve.method.METHODS", dict(METHODS))
    exec(compile(found[1], str(DOC), "exec"), {"__name__": "chance"})
    torch.manual_seed(0)
    x, W = torch.randn(300, 32) @ torch.randn(32, 32), torch.randn(16, 32)
    result = prune_matrix(W, x.T @ x, "chance", 0.5, pattern)
    assert result.zeros == W.numel() // 2
    assert result.relative_error is not None and 0 < result.relative_error < 1
    assert result.iterations
