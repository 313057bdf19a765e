"""The pruning job: load → calibrate → solve → propagate → write, one decoder layer after the other.

All work happens in OUT.partial, which becomes OUT by one rename at the end. A journal in it names the finished layers
with the SHA-256 of what was written. A job that is started again verifies those, sends the calibration tokens through
them once more, and goes on, to the same bytes as if it had never stopped.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import rac_engine
from rac_engine.activations import Activations
from rac_engine.calibrate import Beside, DenseInputs, DenseOutputs, Packing, Statistic, Stream
from rac_engine.card import model_card
from rac_engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    disk_errors,
    publish,
    require_space,
    write_file,
    write_manifest,
)
from rac_engine.decode import load_tokenizer
from rac_engine.doctor import code_sha256, machine, surroundings, versions
from rac_engine.errors import BadInput, Damaged, Interrupted
from rac_engine.journal import Journal, claimed, open_journal, records_of
from rac_engine.memory import PROGRAM_BYTES, MemoryPlan, Shape, dtype_of, plan_memory
from rac_engine.models import EMBEDDINGS, Block, Matrix, Model
from rac_engine.recipe import PruneSettings, Recipe, absolute, dump, load_recipe, parse_pattern
from rac_engine.sizes import format_bytes, format_seconds
from rac_engine.solve import (
    MatrixResult,
    Outputs,
    Target,
    find_method,
    joined,
    left_dense,
    prune_matrices,
    prune_table,
    split_rows,
)
from rac_engine.survey import ALLOCATION, Allocation, allocate, allocated
from rac_engine.timeline import Timeline
from rac_engine.traces import Calibration, Weighting, load_calibration
from rac_engine.tune import tune
from rac_engine.verify import verify
from rac_kernels import FactorError, spread_columns

JOURNAL = "rac/journal.jsonl"
REPLAY = "replay: embeddings, then every finished layer in turn, from the tensors that its record vouches for"
"""The rule by which a job that goes on has the activations again, as its journal names it."""
_PROGRAM_STEP = 256 << 20
_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True)
class PruneReport:
    """What a job made. `run`, `matrices` and `end` are the lines of `out`/rac/metrics.jsonl."""

    out: Path
    run: dict[str, Any]
    matrices: list[dict[str, Any]]
    end: dict[str, Any]
    resumed: int
    """Layers that were found finished by an earlier, interrupted job."""


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | PruneSettings | str | Path | None = None,
    calibration: Calibration | None = None,
    *,
    device: str = "cpu",
    restart: bool = False,
    hessians: int | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    finish: Callable[[Path], object] = lambda _: None,
) -> PruneReport:
    """Prune the checkpoint in the folder `model` into the new folder `out`.

    `recipe` is a recipe or its file (the sections `calibration` and `prune` count), or the settings alone;
    `calibration` replaces what the recipe names. A job found unfinished in OUT.partial goes on, unless `restart`.
    At most `hessians` of a stage are gathered in one pass over the tokens, which changes no result; by default as many
    as the memory plan says. `device_memory` and `host_memory` are limits in bytes that the job keeps to (see memory);
    the host's counts the whole process. `progress` is told in words what is being done, and how many seconds are left
    once a layer has shown its pace.
    `finish` is given the whole folder before it becomes `out`, to put a report there.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out, recipe = Path(out), _recipe(Path(model), recipe)
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; choose another output folder, or remove it")
    with claimed(out) as partial:  # before anything is read: a second process is refused at once
        limits, told = (device_memory, host_memory), (progress, finish)
        return _prune(Path(model), out, partial, recipe, calibration, device, restart, hessians, limits, *told)


def _prune(
    model: Path,
    out: Path,
    partial: Path,
    recipe: Recipe,
    calibration: Calibration | None,
    device: str,
    restart: bool,
    hessians: int | None,
    given_limits: tuple[int | None, int | None],
    progress: Callable[[str], None],
    finish: Callable[[Path], object],
) -> PruneReport:
    """`prune`, in the folder `partial`, which is this process's alone."""
    device_memory, host_memory = given_limits
    source, settings = Model.open(Checkpoint.open(model)), recipe.prune
    skipped = {**skipped_matrices(source, settings), **not_finite(source, settings)}
    device = _device(device)
    packing, begun = None, resident()
    limits = _limits(device, device_memory, host_memory, begun)
    shape = Shape.of(source, settings, limits["on_gpu"])
    if host_memory is not None:
        _give_back()
    if find_method(settings.method).needs == "nothing":
        calibration, memory = None, plan_memory(shape, settings, 0, 0, **limits)
    else:
        calibration = calibration or calibration_of(recipe)
        longest = max((len(sequence.token_ids) for sequence in calibration.sequences), default=0)
        tokens = sum(len(sequence.token_ids) for sequence in calibration.sequences)  # those that do not count too
        chunk = None if restart else _begun_with(partial)
        weighted = any(sequence.weights is not None for sequence in calibration.sequences)
        memory = plan_memory(shape, settings, tokens, longest, chunk=chunk, weighted=weighted, **limits)
        packing = Packing.of(calibration, memory.choice.chunk_tokens)
    run = _describe(source, settings, calibration, packing, device)
    peak_memory(reset=True)
    if memory.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((device_memory or total) / total, device)
    chunk = memory.choice.chunk_tokens
    identity = _identity(run, device, chunk)
    journal = open_journal(partial, JOURNAL, identity, restart, chunk_tokens=chunk, activations=REPLAY)
    try:
        with torch.inference_mode():
            allocation, clock = None, _Clock()
            if packing is not None and any(layers := allocated(source, settings, skipped)):
                with clock("first pass"):
                    choice = memory.choice
                    allocation = allocate(
                        source, settings, layers, packing, choice, device, partial, identity, progress
                    )
            where = (device, partial, journal)
            job = _Job(source, settings, skipped, packing, memory, begun, *where, allocation, clock, progress)
            job.hessians = hessians or memory.choice.hessians
            job.run()
            report = job.report(out, run, dump(absolute(recipe)), _short_of(recipe, calibration))
            finish(partial)
            _read_back(partial, source, progress)
        publish(partial, out)
    except KeyboardInterrupt:
        if out.exists() and not partial.exists():
            return report  # too late: it is published
        done = min(len(journal.records) - 1, source.layers)
        raise Interrupted(f"stopped with {done} of {source.layers} layers done") from None
    finally:
        if memory.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)  # what comes after is not this job's
        # Nothing worth going on with, unless a first pass was made.
        if len(journal.records) < 2 and partial.exists() and not (partial / ALLOCATION).exists():
            shutil.rmtree(partial)
    return report


def _read_back(partial: Path, source: Model, progress: Callable[[str], None]) -> None:
    """Refuse to publish what does not read back as it should: a disk that lies is found out here, not by a user."""
    if problems := verify(partial, source.checkpoint, progress).problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Damaged(f"{partial}: the finished output is damaged: {problems[0]}{more}; run this again")


def skipped_matrices(model: Model, settings: PruneSettings) -> dict[str, str]:
    """On-disk names of the matrices that are not to be pruned, and why.

    Raises `BadInput` where a pattern does not fit a matrix, or an entry of `dense` names none.
    """
    if settings.order == "layer" and any(model.is_mixture(layer) for layer in range(model.layers)):
        raise BadInput("order: layer is for dense models; a mixture of experts is pruned with order: staged")
    unused, skipped = set(settings.dense), {}
    unfit = list(settings.overrides)

    def naming(*names: str) -> list[str]:
        found = [entry for entry in settings.dense if any(re.fullmatch(entry, name) for name in names)]
        unused.difference_update(found)
        return found

    for name in (model.family.embedding, model.family.head):
        naming(name.removesuffix(".weight"))  # known, whether or not they would be pruned
    for matrix in model.prunable(settings.also):
        own = settings.of(matrix.path, matrix.module)
        unfit = [override for override in unfit if not override.names(matrix.path, matrix.module)]
        if found := naming(matrix.path, matrix.module):
            skipped[matrix.name] = f"left dense by {found[0]!r}"
        elif own.pattern is None and own.sparsity == 0:
            skipped[matrix.name] = "sparsity 0"
        elif own.pattern is not None and matrix.columns % parse_pattern(own.pattern)[1]:
            raise BadInput(
                f"{matrix.path}: its {matrix.columns} columns are no whole groups for pattern {own.pattern}; "
                "choose another pattern, or name the matrix under `dense`"
            )
    if unused:
        raise BadInput(f"dense: {min(unused)!r} names no matrix of this model; `rac plan` lists their names")
    if unfit:
        number = settings.overrides.index(unfit[0])
        raise BadInput(
            f"overrides.{number}: {', '.join(map(repr, unfit[0].modules))} names no matrix of this model; "
            "`rac plan` lists their names"
        )
    return skipped


def target_of(settings: PruneSettings, matrix: Matrix) -> Target:
    """What the settings, overrides included, ask of a matrix."""
    own = settings.of(matrix.path, matrix.module)
    return Target(own.sparsity, own.pattern, own.damping, own.block_size)


def not_finite(model: Model, settings: PruneSettings) -> dict[str, str]:
    """What of the model holds NaN or Inf, to be left as it is; `BadInput` unless the settings say so."""
    names = model.checkpoint.nonfinite()
    if names and settings.nonfinite == "refuse":
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise BadInput(
            f"{model.checkpoint.path}: tensor {names[0]!r}{more} holds NaN or Inf; the model is damaged "
            "(nonfinite: dense leaves such a matrix as it is)"
        )
    matrices = model.prunable(settings.also) if names else ()
    stacked = [matrix.name for matrix in matrices if matrix.tensor in names]
    return dict.fromkeys([*names, *stacked], "holds NaN or Inf")


def calibration_of(recipe: Recipe) -> Calibration:
    """What a recipe's `calibration` section names, with its model's tokenizer; `BadInput` where it names nothing."""
    wanted = recipe.calibration
    if wanted.source is None:
        raise BadInput(f"calibration is missing: {recipe.prune.method} needs traces, a .jsonl or text:FILE")
    return load_calibration(
        wanted.source,
        part=wanted.part,
        tokens=wanted.tokens,
        tokenizer=load_tokenizer(recipe.model),
        sequence_length=wanted.sequence_length,
        weighting=Weighting(wanted.weight_completion, wanted.weight_positions, wanted.weight_column),
    )


@dataclass
class _Clock:
    """Seconds since the start, and how many of them went to what."""

    started: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - began

    def seconds(self) -> float:
        return time.monotonic() - self.started


class _Job:
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
        clock: _Clock,
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
                    work = _Layer(self, layer, tensors)
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


class _Layer:
    """One decoder layer being pruned: `pruned` has its new matrices by on-disk name, `rows` an object each."""

    def __init__(self, job: _Job, layer: int, tensors: dict[str, Tensor]) -> None:
        self.job, self.layer, self.tensors = job, layer, tensors
        self.groups = job.groups(layer)
        self.pruned: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.blocks: list[Block] = []
        self.beside: dict[int, Beside] = {}
        """Of the blocks, by their numbers, through which the dense model's tokens have still to go."""
        self.reordered = set[str]()
        """Modules whose neurons are in another order than in the checkpoint: dense they must not be written."""

    def prune(self) -> None:
        job, stream = self.job, self.job.stream
        for matrix in job.model.matrices(self.layer):
            if matrix.name in job.skipped:
                self._note(matrix, left_dense(matrix.of(self.tensors[matrix.tensor]), job.skipped[matrix.name]), 0.0)
        if stream is None:
            for group in self.groups:
                self._solve(group, None)
        elif self.layer <= job.last:
            self.blocks = job.model.build_layer(self.layer, self.tensors, job.dtype, job.device)
            if job.dense is not None:
                # Held here alone, so that a block's dense weights go when nothing needs them any more.
                self.beside = {
                    number: Beside(job.dense, block)
                    for number, block in enumerate(
                        job.model.build_layer(self.layer, self.tensors, job.dtype, job.device)
                    )
                }
            if job.settings.order == "layer":
                self._prune_at_once(stream)
            else:
                self._prune_in_stages(stream)
        order = {matrix.name: number for number, matrix in enumerate(job.model.matrices(self.layer))}
        self.rows.sort(key=lambda row: order[row["name"]])

    def _prune_in_stages(self, stream: Stream) -> None:
        """Every matrix is calibrated on what the pruned matrices before it give."""
        job = self.job
        for number, block in enumerate(self.blocks):
            kept = None
            here = [group for group in self.groups if group[0].group.block == number]
            further = self.layer < job.last or any(group[0].group.block > number for group in self.groups)
            tuned = bool(job.settings.epochs and here and block.plan.experts is None)
            if job.settings.reorders:
                self._reorder(stream, block, number)
            for _, stage in itertools.groupby(here, key=lambda group: group[0].stage):
                groups = list(stage)
                if groups[-1][0].group.expert is None:
                    kept = self._prune_groups(stream, block, groups, number, further and not tuned, further or tuned)
                else:
                    self._prune_experts(stream, block, groups, self.beside.get(number))
            if number in self.beside and (further or tuned):
                with job.clock("forward"):
                    self.beside[number].stream.advance(self.beside[number].block)
            if tuned:
                self._tune(stream, block, here)
            # The next block's first pass takes the tokens through this one, if there is room for what that holds on to:
            # with a mixture on either side, or nothing kept of an attention, there is not.
            if block is self.blocks[-1]:
                aside = job.memory.choice.overlap and block.plan.experts is None
            else:
                aside = self.blocks[number + 1].plan.experts is None
            if further and aside and (kept is not None or not block.plan.attention):
                stream.advance_later(block, kept)
            elif further:
                with job.clock("forward"):
                    stream.advance(block, kept)

    def _prune_groups(
        self, stream: Stream, block: Block, groups: list[list[Matrix]], number: int, keep: bool, further: bool
    ) -> Activations | None:
        """Prune groups of a stage, as many in a pass over the tokens as their Hessians may be; see `Stream.observe`.

        `number` is the block's: with its last matrix observed, the dense one beside is done and goes, its tokens moved
        on unless they go no `further`. To `keep` is what the pruned one's tokens gave.
        """
        job, kept = self.job, None
        residual = job.settings.reconstructs == "residual"
        job.make_room(groups[0][0])
        for some in _batches(groups, job.hessians):
            with job.clock("calibrate"):
                statistics = {group[0].group.input: self._statistic(group, self.beside.get(number)) for group in some}
                if number not in self.beside:
                    kept = stream.observe(block, statistics, keep)
                else:
                    kept = stream.observe_beside(block, statistics, self.beside[number], residual, keep, further)
                    if block.last in statistics:
                        del self.beside[number]
            for group in some:
                self._solve(group, statistics.pop(group[0].group.input))
        return kept

    def _reorder(self, stream: Stream, block: Block, number: int) -> None:
        """Give an MLP's inner neurons an order in which the pattern of its last matrix costs least.

        The model is the same in any order, as long as rows of the matrices before and columns of the last one go
        together. So all of them have to be pruned: what stays dense is to be found as it was.
        """
        job = self.job
        own = [matrix for matrix in job.model.matrices(self.layer) if matrix.group.block == number]
        last = next((matrix for matrix in own if matrix.module == block.last), None)
        pattern = None if last is None else job.target(last).pattern
        if last is None or pattern is None or block.plan.attention or any(m.name in job.skipped for m in own):
            return
        before = [matrix for matrix in own if matrix is not last]
        if any(m.rows != last.columns or getattr(block.linears[m.module], "bias", None) is not None for m in before):
            return
        with job.clock("calibrate"):
            statistic = Statistic(last.columns, False, job.device)
            stream.observe(block, {last.module: statistic}, keep=False)
        if not bool(statistic.value.isfinite().all() and statistic.value.any()):
            return
        with job.clock("solve"):
            scores = self.tensors[last.tensor].to(job.device, torch.float32).square().mul_(statistic.value)
            order = spread_columns(scores, pattern).cpu()
            del scores
        # The dense block beside stays as it is: what is asked of it does not depend on the order but for the last bits,
        # and those have to be the same when an unfinished job goes through this layer again.
        for matrix in own:
            dense = self.tensors[matrix.tensor]
            self.tensors[matrix.tensor] = moved = dense[:, order] if matrix is last else dense[order]
            block.linears[matrix.module].weight = nn.Parameter(moved.to(job.device, job.dtype), requires_grad=False)
            self.reordered.add(matrix.module)

    def _tune(self, stream: Stream, block: Block, groups: list[list[Matrix]]) -> None:
        """Tune the pruned matrices of a block whose tokens the dense model has moved on, but the pruned one not yet."""
        job = self.job
        matrices = {m.module: m for m in itertools.chain.from_iterable(groups) if m.tensor in self.pruned}
        if job.dense is None or not matrices:
            return
        job.make_room(groups[-1][0])
        job.tell(self.layer, f"tuning {block.plan.module}")
        with job.clock("tune"):
            weights = {name: self.pruned[matrix.tensor] for name, matrix in matrices.items()}
            made = tune(stream, job.dense, block, weights, job.settings.epochs)
        if made is None:
            for row in self.rows:
                if row["module"] in matrices:
                    row["notes"] = [*row["notes"], "not tuned: hidden states are not finite, or too large to square"]
            return
        for name, weight in made.weights.items():
            self.tensors[matrices[name].tensor] = self.pruned[matrices[name].tensor] = weight.cpu()
        self._install(groups)
        for row in self.rows:
            if row["module"] in matrices:
                weight = self.pruned[row["name"]]
                row["zeros"] = weight.numel() - int(weight.count_nonzero())
                row["sparsity"] = row["zeros"] / weight.numel()
                row["tuned"] = {"before": made.before, "after": made.after}

    def _prune_experts(self, stream: Stream, block: Block, groups: list[list[Matrix]], beside: Beside | None) -> None:
        """Prune a stage of a mixture: each expert by H of the tokens that were routed to it.

        An expert with n tokens, fewer than m = min_tokens · columns, is never pruned by those alone. To `blend`, its H
        becomes H + (m − n)/N · H_all: H_all is of the inputs that all N tokens of the layer give, as if they had all
        come to this expert. At the entrance that is the block's own input, the same for every expert; for the last
        matrix it is estimated by min(N, m) evenly spaced tokens, which are sent through the expert.
        """
        job, rule = self.job, self.job.settings.experts
        job.make_room(groups[0][0])
        everyone = next((group for group in groups if group[0].group.expert is None), None)
        experts = [group for group in groups if group[0].group.expert is not None]
        entrance = experts[0][0].stage == block.groups[0].stage
        common = None
        if everyone is not None:
            common, name = self._statistic(everyone, beside), everyone[0].group.input
        elif entrance and rule.otherwise == "blend":
            common, name = self._statistic(experts[0], beside), block.first
        room = None if job.hessians is None else max(job.hessians - (common is not None), 1)
        least = math.ceil(rule.min_tokens * experts[0][0].columns)
        for number, some in enumerate(_batches(experts, room)):
            extra = {} if number or common is None else {name: common}
            with job.clock("calibrate"):
                shared = common if entrance else None
                statistics, seen = self._gather(stream, block, some, beside, extra, shared, least)
            for group, tokens in zip(some, seen, strict=True):
                why = None
                if tokens < least:
                    why = f"{tokens} tokens, fewer than {least} ({rule.min_tokens:g} for each of its inputs)"
                self._solve(group, statistics.pop(group[0].group.input), tokens, why)
        if everyone is not None:
            self._solve(everyone, common)

    def _gather(
        self,
        stream: Stream,
        block: Block,
        experts: list[list[Matrix]],
        beside: Beside | None,
        extra: dict[str, Statistic],
        common: Statistic | None,
        least: int,
    ) -> tuple[dict[str, Statistic], list[int]]:
        """Statistics of experts' inputs in one pass, and `extra`; of those with fewer than `least` tokens, blended.

        `common` is of all tokens, where that is the same for every expert. Also returns each expert's own tokens.
        """
        blended = self.job.settings.experts.otherwise == "blend"
        statistics = {group[0].group.input: self._statistic(group, beside) for group in experts}
        if beside is None:
            stream.observe(block, {**statistics, **extra})
        else:
            stream.observe_experts(block, {**statistics, **extra}, beside)
        seen = [statistic.tokens for statistic in statistics.values()]
        total = stream.packing.weight or 1.0
        scarce: dict[str, tuple[Statistic, float]] = {}
        for tokens, (name, statistic) in zip(seen, statistics.items(), strict=True):
            lacking = max(least - tokens, 0)
            if not blended or not lacking:
                continue
            if common is None:
                scarce[name] = (statistic, float(lacking))
            else:
                statistic.blend(common, lacking / total)
        if scarce:
            stream.observe_sample(block, scarce, least, beside)
        return statistics, seen

    def _prune_at_once(self, stream: Stream) -> None:
        """Every matrix is calibrated on what the dense layer gives, as published."""
        job = self.job
        for some in _batches(self.groups, job.hessians):
            job.make_room(some[0][0])
            with job.clock("calibrate"):
                statistics = {group[0].group.input: self._statistic(group) for group in some}
                stream.observe_layer(self.blocks, statistics)
            for group in some:
                self._solve(group, statistics.pop(group[0].group.input), install=False)
        self._install(self.groups)
        if self.layer < job.last:
            with job.clock("forward"):
                for block in self.blocks:
                    stream.advance(block)

    def _statistic(self, group: list[Matrix], beside: Beside | None = None) -> Statistic:
        """Room for what is to be known of a group's input, and of what ties it to the dense model if that is `beside`.

        That is outputs of a block's last matrix, inputs where several matrices may share them; of an expert's last
        matrix what is smaller.
        """
        self.job.tell(self.layer, " ".join(matrix.module.rpartition(".")[2] for matrix in group))
        full = find_method(self.job.settings.method).needs == "hessian"
        columns, device = group[0].columns, self.job.device
        match: DenseInputs | DenseOutputs | None = None
        if beside is not None:
            of_expert = group[0].group.expert is not None and len(group[0].group.modules) == 1
            outputs = group[0].group.input == beside.block.last or (of_expert and group[0].rows < columns)
            match = DenseOutputs(columns, group[0].rows, device) if outputs else DenseInputs(columns, device)
        return Statistic(columns, full, device, match)

    def _solve(
        self,
        group: list[Matrix],
        statistic: Statistic | None,
        tokens: int | None = None,
        scarce: str | None = None,
        install: bool = True,
    ) -> None:
        """Prune matrices that share an input and put them into the layer.

        `tokens` is how many came to an expert, `scarce` says that they are too few.
        """
        job, settings = self.job, self.job.settings
        job.make_room(group[0])
        began = time.monotonic()
        weights = [matrix.of(self.tensors[matrix.tensor]).to(job.device).contiguous() for matrix in group]
        with job.clock("solve"):
            try:
                known, match = (None, None) if statistic is None else (statistic.value, statistic.match)
                method, otherwise = settings.method, settings.experts.otherwise
                if scarce is not None and otherwise == "dense":
                    results = [left_dense(weight, scarce) for weight in weights]
                else:
                    if scarce is not None and otherwise == "magnitude":
                        method, known = "magnitude", None
                    parts = [[weight] for weight in weights]
                    if known is not None and not isinstance(match, DenseOutputs):
                        parts = [split_rows(weight) for weight in weights]
                    outputs = None
                    if isinstance(match, DenseInputs):
                        outputs = Outputs.of_inputs(match.cross, match.gram, list(itertools.chain(*parts)))
                    elif match is not None:
                        outputs = Outputs(match.cross, [match.wanted], [match.dense])
                    every = [(part, job.target(m)) for m, some in zip(group, parts, strict=True) for part in some]
                    pieces, targets = [part for part, _ in every], [target for _, target in every]
                    unseen = "magnitude" if group[0].module in self.reordered else settings.unseen
                    found = iter(prune_matrices(pieces, known, method, targets, unseen, outputs))
                    results = [joined(list(itertools.islice(found, len(some)))) for some in parts]
            except FactorError as error:
                raise FactorError(f"{group[0].path}: {error}") from None
        seconds = time.monotonic() - began
        remarks = [] if statistic is None else self._remarks(statistic, group[0].columns)
        for matrix, result in zip(group, results, strict=True):
            if remarks:
                result = replace(result, notes=[*remarks, *result.notes])
            share = matrix.rows / sum(other.rows for other in group)
            if scarce is not None and result.skipped is None:
                how = "pruned by magnitude" if otherwise == "magnitude" else "H blended with that of all tokens"
                result = replace(result, notes=[f"{scarce}: {how}", *result.notes])
            self._note(matrix, result, seconds * share, tokens)
            if result.skipped is None:
                # The dense one is not needed any more: a layer is never in memory twice.
                if matrix.tensor == matrix.name:
                    self.tensors[matrix.tensor] = result.weight.cpu()
                else:
                    if job.dense is not None and not job.memory.on_gpu and matrix.tensor not in self.pruned:
                        # The dense model beside has its weights in the same memory.
                        self.tensors[matrix.tensor] = self.tensors[matrix.tensor].clone()
                    matrix.of(self.tensors[matrix.tensor]).copy_(result.weight)
                self.pruned[matrix.tensor] = self.tensors[matrix.tensor]
        if install:
            self._install([group])

    def _remarks(self, statistic: Statistic, columns: int) -> list[str]:
        """What is odd about an input, for the report."""
        remarks = []
        if statistic.dropped:
            remarks.append(f"{statistic.dropped:,} tokens hold NaN or Inf and were left out")
        if 0 < statistic.tokens < columns and statistic.value.ndim == 2:
            remarks.append(f"{statistic.tokens:,} tokens for {columns:,} inputs: damping alone makes H definite")
        return remarks

    def _install(self, groups: list[list[Matrix]]) -> None:
        """Put pruned matrices into the layer that the tokens go through."""
        linears = {name: linear for block in self.blocks for name, linear in block.linears.items()}
        for matrix in itertools.chain.from_iterable(groups):
            if linears and matrix.tensor in self.pruned:
                weight = matrix.of(self.pruned[matrix.tensor]).to(self.job.device, self.job.dtype)
                linears[matrix.module].weight = nn.Parameter(weight, requires_grad=False)

    def _note(self, matrix: Matrix, result: MatrixResult, seconds: float, tokens: int | None = None) -> None:
        stream = self.job.stream
        if tokens is None and stream is not None and not result.skipped:
            tokens = stream.packing.counted
        row = self.job.row(matrix, result, self.tensors[matrix.tensor], seconds, tokens)
        self.rows.append({**row, "reordered": True} if matrix.module in self.reordered else row)


def _batches(groups: list[list[Matrix]], most: int | None) -> Iterator[list[list[Matrix]]]:
    """Groups in their order, at most `most` together."""
    step = most or len(groups) or 1
    for at in range(0, len(groups), step):
        yield groups[at : at + step]


def resident() -> int:
    """Bytes of memory that this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def _begun_with(partial: Path) -> int | None:
    """Tokens that go through a layer together in the job that was begun there, if one was.

    They decide the last bits of the result, and follow from what memory was free when it began.
    """
    records = records_of(partial / JOURNAL)
    chunk = records[0].get("chunk_tokens") if records else None
    return chunk if isinstance(chunk, int) and chunk > 0 else None


def _limits(device: str, device_memory: int | None, host_memory: int | None, begun: int) -> dict[str, Any]:
    """What `plan_memory` is told of the machine."""
    on_gpu = torch.device(device).type == "cuda"
    if device_memory is not None and not on_gpu:
        raise BadInput(f"--device-memory is for a GPU, and the job runs on {device}; give --host-memory")
    free = None
    if on_gpu:
        # What torch holds in reserve of this device, from an earlier job in this process, is free as well.
        available, total = torch.cuda.mem_get_info(device)
        free = available + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if device_memory is not None and device_memory > total:
            raise BadInput(
                f"--device-memory {format_bytes(device_memory)}: {device} has {format_bytes(total)}; give no more"
            )
    # In steps, so that a job that goes on elsewhere on the same machine finds the same plan.
    program = max(PROGRAM_BYTES, -(-begun // _PROGRAM_STEP) * _PROGRAM_STEP)
    return {
        "on_gpu": on_gpu,
        "device_limit": device_memory,
        "device_spare": free,
        "host_limit": host_memory,
        "spare": psutil.virtual_memory().available + begun,
        "program": program,
    }


def _give_back() -> None:
    """Let glibc give freed memory back at once: it keeps pieces of up to 32 MiB for later, more or less of them as
    threads happen to meet, which a limit has no room for. Elsewhere nothing is done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)


def require_memory(
    model: Model, settings: PruneSettings, device: str, device_memory: int | None, host_memory: int | None
) -> None:
    """`BadInput` for limits, as those of `prune`, in which not even a single token goes through the model."""
    limits = _limits(_device(device), device_memory, host_memory, resident())
    plan_memory(Shape.of(model, settings, limits["on_gpu"]), settings, 1, 1, **limits)


def peak_memory(reset: bool = False) -> int:
    """Bytes of memory that this process had resident at most, since the last `reset` if there was one."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _recipe(model: Path, recipe: Recipe | PruneSettings | str | Path | None) -> Recipe:
    """A recipe with `model` in it, from all that `prune` takes for one."""
    if recipe is None:
        recipe = PruneSettings()
    if isinstance(recipe, PruneSettings):
        return Recipe(model=model, prune=recipe)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    return recipe.model_copy(update={"model": model})


def _short_of(recipe: Recipe, calibration: Calibration | None) -> list[str]:
    """A remark where the calibration has fewer tokens than were asked for."""
    wanted = recipe.calibration.tokens
    if calibration is None or wanted is None or calibration.tokens >= wanted:
        return []
    return [f"the calibration holds {calibration.tokens:,} tokens, fewer than the {wanted:,} asked for"]


def _device(name: str) -> str:
    """The device by its full name ("cuda:0" for "cuda"); `BadInput` if it is not there."""
    # A limit bounds what torch has reserved, so the pieces of it have to fit together: segments that grow and shrink
    # leave next to nothing lying idle. Heeded if CUDA has not started yet, and unless the user has chosen.
    if not any(f"PYTORCH_{part}ALLOC_CONF" in os.environ for part in ("CUDA_", "")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r}: {str(error).splitlines()[0]}; `rac doctor` shows what there is") from None


def _describe(
    model: Model, settings: PruneSettings, calibration: Calibration | None, packing: Packing | None, device: str
) -> dict[str, Any]:
    """The "run" object: what decides the result, and on what machine it was made."""
    checkpoint = model.checkpoint
    return {
        "type": "run",
        "versions": {"rac_engine": rac_engine.__version__, **versions()},
        "machine": {
            **machine(device),
            "cores": psutil.cpu_count(logical=False),
            "memory": psutil.virtual_memory().total,
        },
        "model": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.sha256(),
            "model_type": model.family.model_type,
            "layers": model.layers,
            "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        },
        "calibration": calibration
        and packing
        and {
            "description": calibration.describe(),
            "source": calibration.source,
            "sha256": calibration.sha256,
            "part": calibration.part,
            "weighting": calibration.weighting,
            "sequences": len(calibration.sequences),
            "tokens": packing.counted,
        },
        "code": code_sha256(),
        "settings": settings.model_dump(mode="json"),
    }


def _identity(run: dict[str, Any], device: str, chunk_tokens: int) -> dict[str, Any]:
    """What has to be the same for an unfinished job to go on, by names a user understands."""
    return {
        "model": run["model"]["sha256"],
        "calibration": run["calibration"] and run["calibration"]["sha256"],
        **surroundings(device),
        **{f"settings.{name}": value for name, value in run["settings"].items()},
        "chunk_tokens by the memory plan": chunk_tokens,
    }
