"""Which tile a program takes: each one exactly once, in bands, by the kernels' own code run on numpy arrays in fp32."""

from __future__ import annotations

import importlib
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rac_kernels.backends import gpu

MODULES = {name: importlib.import_module(f"rac_kernels.ops.{name}") for name in ("hessian", "cross")}


class Narrow(np.ndarray):
    """Numbers of 32 bits, as a GPU has them: whatever numpy makes wider is rounded back after each operation."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
        # The base class would say bool where all is compared.
        plain = [x.view(np.ndarray) if isinstance(x, Narrow) else x for x in inputs]
        return narrow(getattr(ufunc, method)(*plain))

    def to(self, dtype: Any) -> Narrow:
        return narrow(self.view(np.ndarray).astype(dtype))


def narrow(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype({"f": np.float32, "i": np.int32}.get(x.dtype.kind, x.dtype)).view(Narrow)


TL = SimpleNamespace(
    int32=np.int32,
    sqrt=np.sqrt,
    minimum=np.minimum,
    where=lambda condition, x, y: narrow(np.where(np.asarray(condition), np.asarray(x), np.asarray(y))),
)


@pytest.fixture(autouse=True)
def numpy_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        monkeypatch.setattr(module, "tl", TL)


def tiles(module: str, function: str, *arguments: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each tile; `arguments`: how many there are, and what the function takes after the index."""
    count, *rest = arguments
    code = getattr(MODULES[module], function)
    row, column = getattr(code, "fn", code)(narrow(np.arange(count)), *map(narrow, rest[:-1]), rest[-1])
    return np.asarray(row), np.asarray(column)


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter has functions of its own")
@pytest.mark.parametrize(
    ("side", "group"), [*product((1, 2, 3, 7, 8, 9, 16, 17, 28, 64, 148), (1, 3, 8)), (296, 8), (2048, 8)]
)
def test_triangle(side: int, group: int) -> None:
    row, column = tiles("hessian", "triangle_tile", side * (side + 1) // 2, side, group)
    assert (row >= 0).all() and (row <= column).all() and (column < side).all()
    assert len(np.unique(row.astype(np.int64) * side + column)) == len(row)
    band = row // group
    assert (np.diff(band) >= 0).all()
    # Within a band by columns, which its rows share.
    assert (np.diff(column)[np.diff(band) == 0] >= 0).all()


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter has functions of its own")
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("down", "across"), [(1, 1), (1, 9), (9, 1), (8, 8), (17, 5), (28, 148), (300, 7)])
def test_rectangle(down: int, across: int, group: int) -> None:
    row, column = tiles("cross", "rectangle_tile", down * across, down, across, group)
    assert (row >= 0).all() and (row < down).all() and (column >= 0).all() and (column < across).all()
    assert len(np.unique(row.astype(np.int64) * across + column)) == down * across
    band = row // group
    assert (np.diff(band) >= 0).all() and (np.diff(column)[np.diff(band) == 0] >= 0).all()
