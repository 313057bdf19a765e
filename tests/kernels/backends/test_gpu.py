"""Tables on a device, whose addresses captured CUDA graphs hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

from rac_kernels.backends import gpu

CPU = torch.device("cpu")
# The package's names are the functions.
ROWS: Callable[..., object] = importlib.import_module("rac_kernels.ops.sweep")._row_table
GROUPS: Callable[..., object] = importlib.import_module("rac_kernels.ops.select")._group_table


def test_tables_are_kept_for_good() -> None:
    """However many others were wanted since."""
    rows, groups = ROWS((7, 5), CPU), GROUPS((7, 5), (3, 2), CPU)
    for count in range(1, 200):
        ROWS((count, 1), CPU)
        GROUPS((count, 1), (1, 0), CPU)
    assert ROWS((7, 5), CPU) is rows and GROUPS((7, 5), (3, 2), CPU) is groups


def test_no_table_is_copied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS((8, 5), CPU)
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    assert ROWS((8, 5), CPU) is rows
    with pytest.raises(RuntimeError, match="run it once with the same shapes"):
        ROWS((8, 6), CPU)
    monkeypatch.undo()
    assert ROWS((8, 6), CPU) is not rows
