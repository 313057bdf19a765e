"""Blocks of the pruned model held against the dense model's: how far the hidden states behind each of them are off.

They are compared on the next pass over the tokens, which has both models' states at hand; so the last block of a layer
is found in the journal with the layer behind it.
"""

from __future__ import annotations

from typing import Any

from rac_engine.calibrate import Drift, Stream
from rac_engine.engine.context import Left
from rac_engine.engine.layer import Layer


def begin_comparing(layer: Layer) -> Drift | None:
    """What compares the states on the pass to come, if the tokens have left a block that is not compared yet."""
    context = layer.context
    if context.left is None or context.stream is None or context.dense is None:
        return None
    return Drift(context.stream.packing, context.device)


def end_comparing(layer: Layer, drift: Drift | None) -> None:
    """Enter what was found on that pass."""
    left = layer.context.left
    if drift is None or left is None:
        return
    layer.context.left = None
    layer.block_rows.append(_row(left, drift))


def compare(layer: Layer, stream: Stream) -> None:
    """Compare in a pass of its own what no other pass has compared."""
    dense, drift = layer.context.dense, begin_comparing(layer)
    if dense is None or drift is None:
        return
    with layer.context.clock("forward"):
        stream.compare(dense, drift)
    end_comparing(layer, drift)


def _row(left: Left, drift: Drift) -> dict[str, Any]:
    """A block's line of metrics.jsonl."""
    seen, held = drift.errors()
    row: dict[str, Any] = {
        "type": "block",
        "layer": left.layer,
        "block": left.block,
        "module": left.module,
        "relative_error": seen,
        "held_out_error": held,
    }
    sources = drift.by_source()
    if len(sources) > 1:
        row["by_source"] = [{"relative_error": seen, "held_out_error": held} for seen, held in sources]
    return row


def layer_rows(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers' lines of metrics.jsonl, each that of its last block."""
    last = {row["layer"]: row for row in blocks}
    return [
        {"type": "layer", **{name: value for name, value in row.items() if name not in ("type", "block", "module")}}
        for row in last.values()
    ]
