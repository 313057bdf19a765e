"""What a job says of its progress."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from rac_engine.engine.context import Context


@pytest.mark.parametrize(
    ("resumed", "began", "layer", "left"),
    [
        pytest.param(0, 2.0, 2, ", 8 s left", id="two layers in two seconds"),
        pytest.param(1, 2.0, 2, ", 16 s left", id="one of them an earlier job's"),
        pytest.param(0, 0.0, 0, "", id="the first layer"),
        pytest.param(2, None, 1, "", id="a layer of an earlier job"),
    ],
)
def test_the_time_left_goes_by_the_layers_of_this_job_alone(
    resumed: int, began: float | None, layer: int, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    said: list[str] = []
    context: Any = SimpleNamespace(model=SimpleNamespace(layers=10), resumed=resumed, progress=said.append)
    context.began = None if began is None else 1000.0 - began
    Context.tell(context, layer, "q k v")
    assert said == [f"layer {layer + 1}/10: q k v{left}"]
