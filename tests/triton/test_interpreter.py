"""The tests of tests/gpu in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
def test_interpreted(interpreted: Callable[[], tuple[int, str]]) -> None:
    code, said = interpreted()
    assert code == 0 and " passed" in said, said
