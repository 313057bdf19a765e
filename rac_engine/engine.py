"""The pruning job: load → calibrate → solve → propagate → write, one decoder layer after the other.

All work happens in OUT.partial, which becomes OUT by one rename at the end. A journal in it names the finished layers
with the SHA-256 of what was written. A job that is started again verifies those, sends the calibration tokens through
them once more, and goes on, to the same bytes as if it had never stopped.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import rac_engine
from rac_engine.calibrate import Packing, Statistic, Stream
from rac_engine.card import model_card
from rac_engine.checkpoint import Checkpoint, CheckpointWriter, disk_errors, publish, write_file, write_manifest
from rac_engine.decode import load_tokenizer
from rac_engine.doctor import cpu_name, versions
from rac_engine.errors import BadInput, Interrupted
from rac_engine.journal import Journal
from rac_engine.models import Block, Matrix, Model
from rac_engine.recipe import PruneSettings, Recipe, dump, load_recipe, parse_pattern
from rac_engine.sizes import format_seconds
from rac_engine.solve import MatrixResult, Target, find_method, left_dense, prune_matrices
from rac_engine.traces import Calibration, load_calibration
from rac_engine.verify import verify
from rac_kernels import FactorError, native

JOURNAL = "rac/journal.jsonl"


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
    progress: Callable[[str], None] = lambda _: None,
) -> PruneReport:
    """Prune the checkpoint in the folder `model` into the new folder `out`.

    `recipe` is a recipe or its file (the sections `calibration` and `prune` count), or the settings alone;
    `calibration` replaces what the recipe names. A job found unfinished in OUT.partial goes on, unless `restart`.
    `progress` is told in words what is being done, and how many seconds are left once a layer has shown its pace.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out, recipe = Path(out), _recipe(Path(model), recipe)
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; choose another output folder, or remove it")
    source, settings = Model.open(Checkpoint.open(model)), recipe.prune
    skipped = skipped_matrices(source, settings)
    packing = None
    if find_method(settings.method).needs == "nothing":
        calibration = None
    else:
        calibration = calibration or calibration_of(recipe)
        packing = Packing.of(calibration, settings.chunk_tokens)
    run = _describe(source, settings, calibration, packing, _device(device))
    peak_memory(reset=True)
    with claimed(out) as partial:
        journal = _open_journal(partial, _identity(run), restart)
        try:
            with torch.inference_mode():
                job = _Job(source, settings, skipped, packing, device, partial, journal, progress)
                job.run()
                report = job.report(out, run, dump(recipe))
                _read_back(partial, source, progress)
            publish(partial, out)
        except KeyboardInterrupt:
            done = len(journal.records) - 1
            raise Interrupted(f"stopped with {done} of {source.layers} layers done") from None
        finally:
            if len(journal.records) < 2 and partial.exists():  # nothing worth going on with
                shutil.rmtree(partial)
    return report


def _read_back(partial: Path, source: Model, progress: Callable[[str], None]) -> None:
    """Refuse to publish what does not read back as it should: a disk that lies is found out here, not by a user."""
    if problems := verify(partial, source.checkpoint.path, progress).problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RuntimeError(f"{partial}: the finished output is damaged: {problems[0]}{more}")


def skipped_matrices(model: Model, settings: PruneSettings) -> dict[str, str]:
    """On-disk names of the matrices that are not to be pruned, and why.

    Raises `BadInput` where a pattern does not fit a matrix, or an entry of `dense` names none.
    """
    unused, skipped = set(settings.dense), {}

    def naming(*names: str) -> list[str]:
        found = [entry for entry in settings.dense if any(re.fullmatch(entry, name) for name in names)]
        unused.difference_update(found)
        return found

    for name in (model.family.embedding, model.family.head):
        naming(name.removesuffix(".weight"))  # dense in any case
    for matrix in (matrix for layer in range(model.layers) for matrix in model.matrices(layer)):
        if found := naming(matrix.path, matrix.module):
            skipped[matrix.name] = f"left dense by {found[0]!r}"
        elif settings.pattern is None and settings.sparsity == 0:
            skipped[matrix.name] = "sparsity 0"
        elif settings.pattern is not None and matrix.columns % parse_pattern(settings.pattern)[1]:
            raise BadInput(
                f"{matrix.path}: its {matrix.columns} columns are no whole groups for pattern {settings.pattern}; "
                "choose another pattern, or name the matrix under `dense`"
            )
    if unused:
        raise BadInput(f"dense: {min(unused)!r} names no matrix of this model; `rac plan` lists their names")
    return skipped


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
    )


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """OUT.partial, for this process alone while it works there."""
    partial = out.with_name(out.name + ".partial")
    if not partial.parent.is_dir():
        raise BadInput(f"{partial.parent}: no such folder; make it first")
    with disk_errors(partial):
        partial.mkdir(exist_ok=True)
    folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{partial}: another process is working there; wait for it, or choose another output"
            ) from None
        if not partial.exists() or not os.path.samestat(os.fstat(folder), partial.stat()):
            raise BadInput(f"{out}: another process has just finished it")
        yield partial
    finally:
        os.close(folder)


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
        device: str,
        partial: Path,
        journal: Journal,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.skipped, self.device = model, settings, skipped, device
        self.partial, self.journal, self.progress = partial, journal, progress
        self.dtype = model.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self.target = Target(settings.sparsity, settings.pattern, settings.damping, settings.block_size)
        self.clock = _Clock()
        self.resumed = 0
        self.writer = CheckpointWriter(model.checkpoint, partial)
        wanted = [
            matrix.layer for layer in range(model.layers) for matrix in model.matrices(layer) if self._wants(matrix)
        ]
        self.last = max(wanted, default=-1)
        """The last layer with anything to prune: the tokens need to come no further."""
        self.stream: Stream | None = None
        if packing is not None and wanted:
            with self.clock("embed"):
                self.stream = Stream(model, packing, self.dtype, device)

    def run(self) -> None:
        """All layers, each one's tensors being read while the one before is pruned."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, 0)
            for layer in range(self.model.layers):
                with self.clock("read"):
                    tensors, finished = ahead.result()
                if not finished:
                    self.journal.cut(1 + layer)
                if layer + 1 < self.model.layers:
                    ahead = reader.submit(self._read, layer + 1)
                if finished:
                    self.resumed += 1
                    self._replay(layer, tensors)
                else:
                    self._prune(layer, tensors)
                del tensors
        with self.clock("write"):
            self.writer.finish()

    def _read(self, layer: int) -> tuple[dict[str, Tensor], bool]:
        """A layer's tensors, and whether they are the pruned ones that an earlier job has left."""
        names = self.model.tensor_names(layer)
        if len(self.journal.records) > 1 + layer:
            digests = self.journal.records[1 + layer]["tensors"]
            if all(self.writer.accept(name, digests[name]) for name in names):
                return {name: self.writer.read(name) for name in names}, True
        tensors = {name: self.model.checkpoint.read(name) for name in names}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise BadInput(f"{self.model.checkpoint.path}: tensor {name!r} holds NaN or Inf; the model is damaged")
        return tensors, False

    def _replay(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Send the tokens through a finished layer."""
        if self.stream is not None and layer < self.last:
            self.tell(layer, "was done, going through it again")
            with self.clock("forward"):
                for block in self.model.build_layer(layer, tensors, self.dtype, self.device):
                    self.stream.advance(block)

    def _prune(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Prune a layer, write it, and enter it in the journal."""
        work = _Layer(self, layer, tensors)
        work.prune()
        with self.clock("write"):
            digests = {
                name: self.writer.write(name, work.pruned[name]) if name in work.pruned else self.writer.copy(name)
                for name in tensors
            }
            self.writer.sync()
            self.journal.append({"layer": layer, "tensors": digests, "matrices": work.rows})

    def stages(self, layer: int) -> list[list[Matrix]]:
        """The matrices of each stage of a layer that are to be pruned."""
        matrices = self.model.matrices(layer)
        return [
            [matrix for matrix in matrices if matrix.stage == stage and self._wants(matrix)]
            for stage in range(matrices[-1].stage + 1)
        ]

    def tell(self, layer: int, what: str) -> None:
        """Report progress."""
        done, layers = layer - self.resumed, self.model.layers
        left = f", {format_seconds(self.clock.seconds() / done * (layers - layer))} left" if done > 0 else ""
        self.progress(f"layer {layer + 1}/{layers}: {what}{left}")

    def report(self, out: Path, run: dict[str, Any], recipe: str) -> PruneReport:
        """Write what goes beside the weights."""
        rows = [row for record in self.journal.records[1:] for row in record["matrices"]]
        notes = [f"{row['name']}: {note}" for row in rows for note in row["notes"]]
        end = {
            "type": "end",
            "seconds": self.clock.seconds(),
            "phases": self.clock.phases,
            "peak_memory": peak_memory(),
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

    def _wants(self, matrix: Matrix) -> bool:
        return matrix.name not in self.skipped


class _Layer:
    """One decoder layer being pruned: `pruned` has its new matrices by on-disk name, `rows` an object each."""

    def __init__(self, job: _Job, layer: int, tensors: dict[str, Tensor]) -> None:
        self.job, self.layer, self.tensors = job, layer, tensors
        self.stages = job.stages(layer)
        self.pruned: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.blocks: list[Block] = []

    def prune(self) -> None:
        job, stream = self.job, self.job.stream
        for matrix in job.model.matrices(self.layer):
            if matrix.name in job.skipped:
                self._note(matrix, left_dense(self.tensors[matrix.name], job.skipped[matrix.name]), 0.0)
        if stream is None:
            for stage in self.stages:
                self._solve(stage, None)
        elif self.layer <= job.last:
            self.blocks = job.model.build_layer(self.layer, self.tensors, job.dtype, job.device)
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
            entrance, exit_ = self.stages[2 * number : 2 * number + 2]
            if entrance:
                with job.clock("calibrate"):
                    statistic = self._statistic(entrance)
                    stream.observe_inputs(block, statistic)
                self._solve(entrance, statistic)
            kept = None
            if exit_:
                with job.clock("calibrate"):
                    statistic = self._statistic(exit_)
                    kept = stream.observe_inner(block, statistic)
                self._solve(exit_, statistic)
            if self.layer < job.last or any(self.stages[2 * number + 2 :]):
                with job.clock("forward"):
                    stream.advance(block, kept)

    def _prune_at_once(self, stream: Stream) -> None:
        """Every matrix is calibrated on what the dense layer gives, as published."""
        job = self.job
        with job.clock("calibrate"):
            statistics = {number: self._statistic(stage) for number, stage in enumerate(self.stages) if stage}
            stream.observe_layer(self.blocks, statistics)
        for number in list(statistics):
            self._solve(self.stages[number], statistics.pop(number))
        if self.layer < job.last:
            with job.clock("forward"):
                for block in self.blocks:
                    stream.advance(block)

    def _statistic(self, stage: list[Matrix]) -> Statistic:
        self.job.tell(self.layer, " ".join(matrix.module.rpartition(".")[2] for matrix in stage))
        full = find_method(self.job.settings.method).needs == "hessian"
        return Statistic(stage[0].columns, full, self.job.device)

    def _solve(self, stage: list[Matrix], statistic: Statistic | None) -> None:
        """Prune the matrices of a stage and put them into the layer."""
        job, settings = self.job, self.job.settings
        if not stage:
            return
        began = time.monotonic()
        weights = [self.tensors[matrix.name].to(job.device) for matrix in stage]
        with job.clock("solve"):
            try:
                known = None if statistic is None else statistic.value
                results = prune_matrices(weights, known, settings.method, job.target, settings.unseen)
            except FactorError as error:
                raise FactorError(f"{stage[0].path}: {error}") from None
        seconds = time.monotonic() - began
        linears = {name: linear for block in self.blocks for name, linear in block.linears.items()}
        for matrix, result in zip(stage, results, strict=True):
            share = matrix.rows / sum(other.rows for other in stage)
            self._note(matrix, result, seconds * share)
            if result.skipped is None:
                self.pruned[matrix.name] = result.weight.cpu()
                if linears:
                    linears[matrix.module].weight = nn.Parameter(result.weight.to(job.dtype), requires_grad=False)

    def _note(self, matrix: Matrix, result: MatrixResult, seconds: float) -> None:
        stream = self.job.stream
        row = {
            "type": "matrix",
            "layer": matrix.layer,
            "module": matrix.module,
            "name": matrix.name,
            "rows": matrix.rows,
            "columns": matrix.columns,
            "sparsity": result.zeros / (matrix.rows * matrix.columns),
            "zeros": result.zeros,
            "objective": result.objective,
            "relative_error": result.relative_error,
            "damping": result.damping,
            "tokens": None if stream is None or result.skipped else stream.packing.counted,
            "seconds": seconds,
            "notes": result.notes,
        }
        self.rows.append(row if result.skipped is None else {**row, "skipped": result.skipped})


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


def _device(name: str) -> str:
    """What is reported for a device; `BadInput` if it is not there."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r}: {str(error).splitlines()[0]}; `rac doctor` shows what there is") from None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name


def _describe(
    model: Model, settings: PruneSettings, calibration: Calibration | None, packing: Packing | None, device: str
) -> dict[str, Any]:
    """The "run" object: what decides the result, and on what machine it was made."""
    checkpoint = model.checkpoint
    return {
        "type": "run",
        "versions": {"rac_engine": rac_engine.__version__, **versions()},
        "machine": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(logical=False),
            "threads": torch.get_num_threads(),
            "memory": psutil.virtual_memory().total,
            "device": device,
            "kernels": f"native {native.info()['isa']}" if native.available() else "torch",
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
            "sequences": len(calibration.sequences),
            "tokens": packing.counted,
        },
        "settings": settings.model_dump(mode="json"),
    }


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for an unfinished job to go on, by names a user understands."""
    machine = {key: run["machine"][key] for key in ("cpu", "threads", "device", "kernels")}
    calibration = run["calibration"] and run["calibration"]["sha256"]
    parts = {"versions": run["versions"], "machine": machine, "settings": run["settings"]}
    named = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return {"model": run["model"]["sha256"], "calibration": calibration, **named}


def _open_journal(partial: Path, identity: dict[str, Any], restart: bool) -> Journal:
    """The journal of a new job, or of one that was interrupted and has the same identity."""
    path = partial / JOURNAL
    if any(partial.iterdir()) and not path.exists():
        raise BadInput(f"{partial}: not empty, and no unfinished job; remove it or choose another output folder")
    if restart:
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    journal = Journal(path)
    if not journal.records:
        journal.append({"job": identity})
    known = journal.records[0].get("job", {})
    for name in {**known, **identity}:
        if known.get(name) != identity.get(name):
            raise BadInput(
                f"{partial}: holds an unfinished job with another {name}: {known.get(name)}, now {identity.get(name)}; "
                "go on with the same, or start afresh with --restart"
            )
    return journal
