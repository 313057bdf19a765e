"""The hidden states of the calibration tokens: opened at the embeddings, and sent through layers that are finished."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rac_engine.calibrate import Packing, Storage, Stream
from rac_engine.engine.context import Context, Left
from rac_engine.engine.embeddings import pruned_embeddings


def open_streams(context: Context, packing: Packing, folder: Path) -> None:
    """Embed the tokens: for the pruned model, and for the dense one if its outputs are to be reconstructed.

    Activations that are kept on disk lie in `folder`.
    """
    model, choice = context.model, context.memory.choice

    def opened(table: Tensor | None = None) -> Stream:
        return Stream(
            model,
            packing,
            context.dtype,
            Storage(context.device, choice.place, folder, context.timeline),
            choice.keep_bytes,
            table,
        )

    with context.clock("embed"), context.timeline.span("compute"):
        context.stream = opened(next((result.weight for _, _, result in pruned_embeddings(context)), None))
        if context.settings.reconstructs != "layer":
            context.dense = opened()


def replay(context: Context, layer: int, tensors: dict[str, Tensor]) -> None:
    """Send the tokens through a finished layer with the pruned `tensors`, by on-disk names, if any are to go on."""
    if context.stream is None or layer >= context.last:
        return
    context.tell(layer, "was done, going through it again")
    model, dtype, device = context.model, context.dtype, context.device
    with context.clock("forward"):
        for block in model.build_layer(layer, tensors, dtype, device):
            context.stream.advance(block)
        if context.dense is not None:
            original = {name: model.checkpoint.read(name) for name in tensors}
            for number, block in enumerate(model.build_layer(layer, original, dtype, device)):
                context.dense.advance(block)
                context.left = Left(layer, number, block.plan.module)
