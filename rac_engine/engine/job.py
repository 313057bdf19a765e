"""The loop over the layers, in an output folder that is claimed and has its journal open."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.files import disk_errors, require_space, write_file
from rac_engine.base.process import peak_memory
from rac_engine.base.sizes import format_seconds
from rac_engine.calibrate import Packing, Stream
from rac_engine.checkpoint import CheckpointWriter
from rac_engine.engine.card import model_card
from rac_engine.engine.context import PruneReport
from rac_engine.engine.layer import Layer
from rac_engine.engine.survey import Allocation
from rac_engine.jobs.clock import Clock
from rac_engine.jobs.journal import Journal
from rac_engine.jobs.publish import write_manifest
from rac_engine.jobs.timeline import Timeline
from rac_engine.models import EMBEDDINGS, Matrix, Model
from rac_engine.plan import MemoryPlan, dtype_of, target_of
from rac_engine.recipe import PruneSettings
from rac_engine.solve import MatrixResult, Target, left_dense, prune_table


class Job:
    """The loop over the layers, in an output folder that is claimed and has its journal open."""

    def __init__(
        self,
        model: Model,
        settings: PruneSettings,
        skipped: dict[str, str],
        packing: Packing | None,
        memory: MemoryPlan,
        begun: int,
        device: str,
        partial: Path,
        journal: Journal,
        allocation: Allocation | None,
        clock: Clock,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.skipped, self.device = model, settings, skipped, device
        self.partial, self.journal, self.progress = partial, journal, progress
        self.memory, self.begun = memory, begun
        self.dtype, self.allocation = dtype_of(model, settings, memory.on_gpu), allocation
        self.hessians: int | None = None
        """How many Hessians may be gathered in one pass over the tokens; None: all of a stage."""
        self.clock, self.timeline = clock, Timeline()
        self.resumed = 0
        self._behind: Future[None] | None = None
        self.writer = CheckpointWriter(model.checkpoint, partial, memory.disk if packing is not None else 0)
        parts = model.parts(settings.also)
        self.stages = parts[-1] + 1
        """The decoder layers and, if it is to be pruned, lm_head behind them."""
        wanted = [m.layer for m in model.prunable(settings.also) if m.layer != EMBEDDINGS and self._wants(m)]
        self.last = max(wanted, default=-1)
        """The last of them with anything to prune: the tokens need to come no further."""
        self._table = model.matrices(EMBEDDINGS) if EMBEDDINGS in parts else []
        self.stream: Stream | None = None
        self.dense: Stream | None = None
        """The dense model's hidden states, where its outputs are to be reconstructed."""
        if packing is not None and wanted:
            with self.clock("embed"), self.timeline.span("compute"):
                choice = memory.choice
                where = (choice.place, partial, choice.keep_bytes, self.timeline)
                table = next((pruned.weight for _, _, pruned in self._pruned_table()), None)
                self.stream = Stream(model, packing, self.dtype, device, *where, table)
                del table
                if settings.reconstructs != "layer":
                    self.dense = Stream(model, packing, self.dtype, device, *where)

    def run(self) -> None:
        """All layers: the next one's tensors are read and the last one's written while one is pruned."""
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            overlap = self.memory.choice.overlap
            ahead = reader.submit(self._read, 0)
            fresh = False
            for layer in range(self.stages):
                with self.clock("read"):
                    tensors, finished = ahead.result()
                if not (finished or fresh):
                    self.journal.cut(1 + layer)
                    fresh = True
                more = layer + 1 < self.stages
                if more and overlap:
                    ahead = reader.submit(self._read, layer + 1)
                self.timeline.layer = layer
                if finished:
                    self.resumed += 1
                    self._replay(layer, tensors)
                    del tensors
                else:
                    work = Layer(self, layer, tensors)
                    with self.timeline.span("compute", layer):
                        work.prune()
                        if self.memory.on_gpu:
                            torch.cuda.synchronize(self.device)  # before the pinned memory of its weights goes
                    del tensors
                    self.settle()
                    self._behind = writer.submit(self._write, layer, list(work.tensors), work.pruned, work.rows)
                    del work
                    if not overlap:
                        self.settle()
                if more and not overlap:
                    ahead = reader.submit(self._read, layer + 1)
            self.settle()
        self.journal.cut(1 + self.stages)
        with self.clock("write"):
            rows, digests = list[dict[str, Any]](), dict[str, str]()
            for matrix, table, pruned in self._pruned_table():
                rows.append(self.row(matrix, pruned, table))
                if pruned.skipped is None:
                    digests[matrix.name] = self.writer.write(matrix.name, pruned.weight)
            self.journal.append({"tensors": digests | self.writer.finish(), "matrices": rows})

    def _pruned_table(self) -> Iterator[tuple[Matrix, Tensor, MatrixResult]]:
        """The table of embeddings as it was and is to be, if that was asked for: so quick that it is not held."""
        for matrix in self._table:
            table = self.model.embedding()
            if not self._wants(matrix):
                yield matrix, table, left_dense(table, self.skipped[matrix.name])
                continue
            tied = ["tied: lm_head has the same zeros"] if self.model.config.tie_word_embeddings else []
            result = prune_table(table, self.target(matrix))
            yield matrix, table, replace(result, notes=[*result.notes, *tied])

    def settle(self) -> None:
        """Wait until the layer before is written: one at a time, so that no more than one is in memory for that."""
        if self._behind is not None:
            with self.clock("write"):
                self._behind.result()
            self._behind = None

    def make_room(self, matrix: Matrix) -> None:
        """Wait for the layer before where the matrix's stage needs the memory that it has."""
        within = matrix.layer < self.model.layers
        if within and (self.model.is_mixture(matrix.layer), matrix.stage) in self.memory.alone:
            with self.timeline.waiting():
                self.settle()

    def _read(self, layer: int) -> tuple[dict[str, Tensor], bool]:
        """A layer's tensors, and whether they are the pruned ones that an earlier job has left."""
        with self.timeline.span("read", layer):
            return self._read_layer(layer)

    def _read_layer(self, layer: int) -> tuple[dict[str, Tensor], bool]:
        names = self.model.tensor_names(layer)
        if len(self.journal.records) > 1 + layer:
            digests = self.journal.records[1 + layer]["tensors"]
            kept = {name: self.writer.accept(name, digests[name]) for name in names}
            whole = {name: tensor for name, tensor in kept.items() if tensor is not None}
            if len(whole) == len(names):
                return whole, True
        return {name: self.model.checkpoint.read(name, pin=self.memory.on_gpu) for name in names}, False

    def _replay(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Send the tokens through a finished layer."""
        if self.stream is not None and layer < self.last:
            self.tell(layer, "was done, going through it again")
            with self.clock("forward"):
                for block in self.model.build_layer(layer, tensors, self.dtype, self.device):
                    self.stream.advance(block)
                if self.dense is not None:
                    original = {name: self.model.checkpoint.read(name) for name in tensors}
                    for block in self.model.build_layer(layer, original, self.dtype, self.device):
                        self.dense.advance(block)

    def _write(self, layer: int, names: list[str], pruned: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Write a layer and enter it in the journal."""
        with self.timeline.span("write", layer):
            require_space(self.partial, 0)
            digests = {
                name: self.writer.write(name, pruned[name]) if name in pruned else self.writer.copy(name)
                for name in names
            }
            self.writer.sync()
            self.journal.append({"layer": layer, "tensors": digests, "matrices": rows})

    def groups(self, layer: int) -> list[list[Matrix]]:
        """The matrices of a layer that are to be pruned, those that share an input together."""
        wanted = filter(self._wants, self.model.matrices(layer))
        return [list(group) for _, group in itertools.groupby(wanted, key=lambda matrix: matrix.group)]

    def tell(self, layer: int, what: str) -> None:
        """Report progress."""
        done, layers = layer - self.resumed, self.model.layers
        left = f", {format_seconds(self.clock.seconds() / done * (layers - layer))} left" if 0 < done < layers else ""
        self.progress(f"layer {layer + 1}/{layers}: {what}{left}" if layer < layers else f"behind the layers: {what}")

    def report(self, out: Path, run: dict[str, Any], recipe: str, remarks: list[str]) -> PruneReport:
        """Write what goes beside the weights."""
        rows = [row for record in self.journal.records[1:] for row in record["matrices"]]
        notes = [
            *remarks,
            *self.model.notes(),
            *([f"allocation {self.settings.allocation}: {self.allocation.describe()}"] if self.allocation else []),
            *self._tuning(rows),
            *(f"{row['name']}: {note}" for row in rows for note in row["notes"]),
        ]
        end = {
            "type": "end",
            "seconds": self.clock.seconds(),
            "phases": self.clock.phases,
            "timeline": self.timeline.rows(),
            "busy": self.timeline.busy(),
            "peak_memory": peak_memory(),
            "plan": self.memory.summary(),
            "memory": self._memory(),
            "notes": notes,
        }
        card = model_card({**run, "matrices": rows, "end": {"notes": notes}})  # no times: the same job, the same bytes
        with disk_errors(self.partial):
            write_file(self.partial / "README.md", card.encode())
            write_file(self.partial / "rac/recipe.yaml", recipe.encode())
            lines = "".join(json.dumps(line) + "\n" for line in [run, *rows, end])
            write_file(self.partial / "rac/metrics.jsonl", lines.encode())
        write_manifest(self.partial)
        return PruneReport(out, run, rows, end, self.resumed)

    def _memory(self) -> dict[str, Any]:
        """Planned and measured peaks in bytes: of the process beyond what it had before, and of the device."""
        plan, program = self.memory, next(phase.host["program"] for phase in self.memory.phases)
        peaks: dict[str, Any] = {
            "baseline": self.begun,
            "host_planned": plan.host_peak - program,
            "host_measured": peak_memory() - self.begun,
        }
        if plan.on_gpu:
            peaks |= {
                "device_planned": plan.device_peak,
                "device_measured": torch.cuda.max_memory_allocated(self.device),
            }
        return peaks

    def _tuning(self, rows: list[dict[str, Any]]) -> list[str]:
        """What reordering and tuning the blocks came to."""
        notes = []
        if moved := {row["layer"] for row in rows if "reordered" in row}:
            notes = [f"{len(moved)} MLPs have their inner neurons in another order, for the pattern"]
        blocks = {(row["layer"], row["tuned"]["before"], row["tuned"]["after"]) for row in rows if "tuned" in row}
        if not blocks:
            return notes
        before, after = (sum(block[place] for block in sorted(blocks)) / len(blocks) for place in (1, 2))
        return [
            *notes,
            f"{len(blocks)} blocks tuned for {self.settings.epochs} epochs: of the hidden states that they give, "
            f"{before:.3g} of the square was off before and {after:.3g} after, in the mean",
        ]

    def target(self, matrix: Matrix) -> Target:
        """What is asked of a matrix."""
        target = target_of(self.settings, matrix)
        if self.allocation is None or matrix.name not in self.allocation.sparsities:
            return target
        return replace(target, sparsity=self.allocation.sparsities[matrix.name])

    def row(
        self, matrix: Matrix, result: MatrixResult, dense: Tensor, seconds: float = 0.0, tokens: int | None = None
    ) -> dict[str, Any]:
        """A matrix's line of metrics.jsonl; `dense` is its tensor as it was."""
        before = matrix.of(dense)
        row = {
            "type": "matrix",
            "layer": matrix.layer,
            "module": matrix.module,
            "name": matrix.name,
            "rows": matrix.rows,
            "columns": matrix.columns,
            "sparsity": result.zeros / (matrix.rows * matrix.columns),
            "zeros": result.zeros,
            "zeros_before": before.numel() - int(before.count_nonzero()),
            "objective": result.objective,
            "relative_error": result.relative_error,
            "magnitude_error": result.magnitude_error,
            "damping": result.damping,
            "ridge": result.ridge,
            "iterations": result.iterations,
            "tokens": tokens,
            "seconds": seconds,
            "notes": result.notes,
        }
        if result.skipped is None:
            target = self.target(matrix)
            row["target"] = {"sparsity": target.sparsity, "pattern": target.pattern}
        if matrix.group.expert is not None:
            row["expert"] = matrix.group.expert
        if matrix.tensor != matrix.name:
            row["tensor"] = matrix.tensor
        return row if result.skipped is None else {**row, "skipped": result.skipped}

    def _wants(self, matrix: Matrix) -> bool:
        return matrix.name not in self.skipped
