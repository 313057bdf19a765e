"""The loop over the layers, in an output folder that is claimed and has its journal open."""

from __future__ import annotations

import time
from typing import Any

import torch

from rac_engine.base.process import trim_memory
from rac_engine.engine.context import Context
from rac_engine.engine.embeddings import pruned_embeddings
from rac_engine.engine.layer import Layer
from rac_engine.engine.recovery import records_of_recovery, recover, was_recovered
from rac_engine.engine.rows import matrix_row
from rac_engine.engine.stages import prune_layer
from rac_engine.engine.streams import replay


def prune_layers(context: Context) -> None:
    """Prune all layers and enter them in the journal; those that an earlier job has finished are replayed.

    Then the model learns, where it is to, and everything that is in no layer is written.
    """
    if not (context.settings.recover and was_recovered(context)):
        _prune_each(context)
    if context.settings.recover:
        recover(context)
    context.files.journal.cut(1 + len(context.numbers) + records_of_recovery(context))
    _write_rest(context)


def _prune_each(context: Context) -> None:
    """Prune the layers that no earlier job has finished, and send the tokens through those that one has."""
    files, journal = context.files, context.files.journal
    overlap = context.memory.choice.overlap
    trim_memory()  # what the tokenizer and the files of traces took
    with files:
        files.begin_reading(0)
        fresh = False
        for number in context.numbers:
            tensors, finished = files.read()
            if not (finished or fresh):
                journal.cut(1 + number)
                fresh, context.began = True, time.monotonic()
            more = number + 1 in context.numbers
            if more and overlap:
                files.begin_reading(number + 1)
            context.timeline.layer = number
            if finished:
                context.resumed += 1
                replay(context, number, tensors)
                del tensors
            else:
                layer = Layer(context, number, tensors)
                del tensors  # the layer's alone, so that dense matrices go as pruned ones come
                with context.timeline.span("compute", number):
                    prune_layer(layer)
                    if context.memory.on_gpu:
                        torch.cuda.synchronize(context.device)  # before the pinned memory of its weights goes
                files.begin_writing(number, list(layer.tensors), layer.pruned, layer.rows, layer.block_rows)
                del layer
                if not overlap:
                    files.settle()
            if more and not overlap:
                files.begin_reading(number + 1)
        files.settle()


def _write_rest(context: Context) -> None:
    """Write everything that is in no layer, and enter it in the journal."""
    files = context.files
    with context.clock("write"):
        rows, digests = list[dict[str, Any]](), dict[str, str]()
        for matrix, table, result in pruned_embeddings(context):
            rows.append(matrix_row(matrix, result, table, context.target(matrix)))
            if result.skipped is None:
                for name in (matrix.name, *context.model.tied_copies):
                    digests[name] = files.writer.write(name, result.weight)
        files.journal.append({"tensors": digests | files.writer.finish(), "matrices": rows})
