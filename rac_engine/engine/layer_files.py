"""Tensors of decoder layers between disk and memory: the next layer is read and the last one written meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from rac_engine.base.files import require_space
from rac_engine.checkpoint import CheckpointWriter
from rac_engine.jobs.clock import Clock
from rac_engine.jobs.journal import Journal
from rac_engine.jobs.timeline import Timeline
from rac_engine.models import Model


class LayerFiles:
    """Reads layers from the checkpoint, or from the unfinished output, and writes pruned ones with their record.

    One layer is read and one written at a time, each on a thread that lives while this is entered as a context.
    With `pin`, tensors are read into page-locked memory.
    """

    def __init__(
        self,
        model: Model,
        writer: CheckpointWriter,
        journal: Journal,
        clock: Clock,
        timeline: Timeline,
        pin: bool,
    ) -> None:
        self.model, self.writer, self.journal = model, writer, journal
        self._clock, self._timeline, self._pin = clock, timeline, pin
        self._threads = ExitStack()
        self._ahead: Future[tuple[dict[str, Tensor], bool]] | None = None
        self._behind: Future[None] | None = None

    def __enter__(self) -> LayerFiles:
        self._reading = self._threads.enter_context(ThreadPoolExecutor(1))
        self._writing = self._threads.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def begin_reading(self, layer: int) -> None:
        """Begin to read a layer."""
        self._ahead = self._reading.submit(self._read, layer)

    def read(self) -> tuple[dict[str, Tensor], bool]:
        """The tensors of the layer whose reading was begun, and whether an earlier job has pruned and written it."""
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        with self._clock("read"):
            return ahead.result()

    def begin_writing(
        self,
        layer: int,
        names: list[str],
        pruned: dict[str, Tensor],
        rows: list[dict[str, Any]],
        blocks: list[dict[str, Any]],
    ) -> None:
        """Begin to write a layer's tensors `names`, those not in `pruned` as they were, once the last one is written.

        `rows` and `blocks` are the layer's lines of metrics.jsonl, for its record in the journal.
        """
        self.settle()
        record = {"matrices": rows, "blocks": blocks}
        self._behind = self._writing.submit(self._write, layer, names, pruned, record)

    def settle(self) -> None:
        """Wait until what was begun to be written is on the disk: at most one layer is in memory for that."""
        if self._behind is not None:
            with self._clock("write"):
                self._behind.result()
            self._behind = None

    def _read(self, layer: int) -> tuple[dict[str, Tensor], bool]:
        with self._timeline.span("read", layer):
            names = self.model.tensor_names(layer)
            if len(self.journal.records) > 1 + layer:
                digests = self.journal.records[1 + layer]["tensors"]
                kept = {name: self.writer.reuse(name, digests[name]) for name in names}
                whole = {name: tensor for name, tensor in kept.items() if tensor is not None}
                if len(whole) == len(names):
                    return whole, True
            return {name: self.model.checkpoint.read(name, pin=self._pin) for name in names}, False

    def _write(self, layer: int, names: list[str], pruned: dict[str, Tensor], record: dict[str, Any]) -> None:
        with self._timeline.span("write", layer):
            require_space(self.writer.folder, 0)
            digests = {
                name: self.writer.write(name, pruned[name]) if name in pruned else self.writer.copy(name)
                for name in names
            }
            self.writer.sync()
            self.journal.append({"layer": layer, "tensors": digests, **record})
