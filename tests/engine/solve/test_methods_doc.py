"""The method that docs/methods.md shows is a method once its file lies beside the others, with nothing else touched."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rac_engine.solve import methods
from rac_engine.solve.matrices import prune_matrix
from rac_engine.solve.methods import find_method, method_names

DOC = Path(__file__).parents[3] / "docs" / "methods.md"


@pytest.fixture
def chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the method, whose file is found as if it lay in the folder of methods."""
    found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "chance.py").write_text(found[1])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "rac_engine.solve.methods.chance", raising=False)
    assert method_names()[:3] == ["admm", "alps", "chance"]
    return "chance"


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_example_is_a_method(pattern: str | None, chance: str) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(300, 32) @ torch.randn(32, 32), torch.randn(16, 32)
    result = prune_matrix(W, x.T @ x, chance, 0.5, pattern)
    assert result.zeros == W.numel() // 2
    assert result.relative_error is not None and 0 < result.relative_error < 1
    assert result.iterations


def test_every_method_is_called_as_its_file_is() -> None:
    for name in method_names():
        assert find_method(name).name == name
