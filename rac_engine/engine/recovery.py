"""Recovery: the pruned model learns from the dense one on its masks, after all layers are pruned (see `Lessons`).

The kept weights and Adam's state on them lie in files, a layer each: those after the last whole pass, after the best
one, and those of the pass under way. The journal has a record for each pass with the files' SHA-256, then one for the
choice, then one for what was written; a job that is started again goes on behind the last of them. A pass that was cut
off is gone through again from its start, to the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from rac_engine.base.errors import Damaged
from rac_engine.base.files import disk_errors, require_space, sha256_files, sync
from rac_engine.calibrate import Lessons, Packing, Step, Storage
from rac_engine.engine.context import Context
from rac_engine.jobs.layout import RECOVERY
from rac_engine.models import Block, Matrix
from rac_kernels import KeptWeights

_UNDER_WAY = "pass"


def recover(context: Context) -> None:
    """Let the pruned model learn, and write what comes of it, unless a record says that this was done."""
    stream = context.stream
    if stream is None:
        return
    found = _Records(context)
    if not found.written and not found.chosen:
        for each in (stream, context.dense):
            if each is not None:
                each.close()
        context.stream = context.dense = None  # room for what is to come
        with context.clock("recover"), torch.inference_mode(False):
            _learn(context, stream.packing, found)
    if found.chosen and not found.written:
        with context.clock("recover"):
            _write(context, found)
    shutil.rmtree(_folder(context), ignore_errors=True)


def was_recovered(context: Context) -> bool:
    """Whether an earlier job has come so far that the layers are not to be pruned again; what is damaged is dropped.

    That is so once the choice is made: from then on the learned weights take the pruned ones' place.
    """
    found, writer = _Records(context), context.files.writer
    if not (found.chosen and found.best):
        return False
    if found.written:
        digests = {name: digest for record in context.files.journal.records for name, digest in _tensors(record)}
        names = [name for layer in range(context.model.layers) for name in context.model.tensor_names(layer)]
        whole = all(writer.reuse(name, digests[name]) is not None for name in names)
    else:
        whole = found.intact(found.best)
    if not whole:
        found.cut(0)
    return whole


def recovered(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a journal's records say of recovery, for reports; None where there was none."""
    return next((record["recovery"] for record in records if "kept" in record.get("recovery", {})), None)


def records_of_recovery(context: Context) -> int:
    """How many records a journal has of it."""
    return len(_Records(context).records)


def _tensors(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from record.get("tensors", {}).items()


def _folder(context: Context) -> Path:
    return context.files.writer.folder / RECOVERY


class _Records:
    """The journal's records of recovery: those behind the layers'."""

    def __init__(self, context: Context) -> None:
        self._journal, self._folder = context.files.journal, _folder(context)
        self._first = 1 + len(context.numbers)

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of them, in their order."""
        return [record for record in self._journal.records[self._first :] if "recovery" in record]

    @property
    def passes(self) -> list[dict[str, Any]]:
        """Those of passes; the first, of pass 0, is that of the model as it was pruned."""
        return [record for record in self.records if "pass" in record["recovery"]]

    @property
    def chosen(self) -> bool:
        """Whether all passes are done."""
        return any("kept" in record["recovery"] for record in self.records)

    @property
    def written(self) -> bool:
        """Whether what they came to is in the output."""
        return any("tensors" in record for record in self.records)

    @property
    def best(self) -> int:
        """The pass after which the divergence was least; 0: none made it less."""
        return min(self.passes, key=lambda record: float(record["recovery"]["divergence"]))["recovery"]["pass"]

    def intact(self, number: int) -> bool:
        """Whether the files after a pass are as its record says."""
        files: dict[str, str] = self.passes[number]["files"]
        folder = self._folder / str(number)
        if not all((folder / name).is_file() for name in files):
            return False
        return sha256_files(folder, list(files)) == files

    def append(self, recovery: dict[str, Any], **beside: Any) -> None:
        """Enter a record."""
        self._journal.append({"recovery": recovery, "matrices": [], **beside})

    def cut(self, count: int) -> None:
        """Drop all but the first `count`."""
        self._journal.cut(self._first + count)


class _Learner:
    """The pruned model while it learns. Its layers are made of the pruned ones in the output and of the kept weights
    in `source`, where those are; `move` puts them in `target`."""

    def __init__(self, context: Context, dtype: torch.dtype, source: Path | None, target: Path) -> None:
        self.context, self._dtype = context, dtype
        self.source, self.target = source, target
        self.number, self.share = 0, 0.0
        """The step that is under way, and the share of all tokens that have been gone through with it."""
        self._kept: dict[str, KeptWeights] = {}

    def build(self, layer: int) -> list[Block]:
        tensors, self._kept = _layer(self.context, layer, self.source)
        return self.context.model.build_layer(layer, tensors, self._dtype, self.context.device)

    def parameters(self, layer: int, blocks: list[Block]) -> list[nn.Parameter]:
        linears = {name: linear for block in blocks for name, linear in block.linears.items()}
        found = []
        for matrix in _learning(self.context, layer):
            weight = linears[matrix.module].get_parameter("weight").detach().clone()
            linears[matrix.module].weight = nn.Parameter(weight)
            found.append(linears[matrix.module].get_parameter("weight"))
        return found

    def move(self, layer: int, gradients: list[Tensor]) -> None:
        for matrix, gradient in zip(_learning(self.context, layer), gradients, strict=True):
            self._kept[matrix.name].step(gradient, self.number, self.share)
        _save(self.target / _file(layer), self._kept)


def _learn(context: Context, packing: Packing, found: _Records) -> None:
    """Go through all passes that are not recorded, and enter the choice among them."""
    folder, passes = _folder(context), context.settings.recover
    dtype = torch.float32 if context.dtype == torch.float16 else context.dtype  # whose gradients vanish
    storage = Storage(context.device, context.memory.choice.place, context.files.writer.folder, context.timeline)
    lessons = Lessons(context.model, packing, dtype, storage)

    def dense(layer: int) -> list[Block]:
        names = context.model.tensor_names(layer)
        tensors = {name: context.model.checkpoint.read(name) for name in names}
        return context.model.build_layer(layer, tensors, dtype, context.device)

    context.progress("recovery: asking the dense model")
    lessons.ask(dense)
    if found.passes and not all(found.intact(number) for number in {found.best, len(found.passes) - 1} - {0}):
        found.cut(0)
    if not found.passes:
        context.progress("recovery: judging the pruned model")
        before = lessons.judge(_Learner(context, dtype, None, folder).build)
        found.append({"pass": 0, "divergence": before, "steps": 0}, files={})
    with lessons.learning() as step:
        for number in range(len(found.passes), passes + 1):
            _pass(context, lessons, step, dtype, found, number)
    lessons.close()
    rows = [{k: v for k, v in record["recovery"].items() if k != "steps"} for record in found.passes]
    best = found.best
    found.append(
        {
            "kept": best,
            "before": rows[0]["divergence"],
            "after": rows[best]["divergence"],
            "held_out": lessons.held_out,
            "passes": rows[1:],
        }
    )


def _pass(context: Context, lessons: Lessons, step: Step, dtype: torch.dtype, found: _Records, number: int) -> None:
    """Go through the tokens once, judge the model that this makes, and enter it."""
    folder, steps = _folder(context), sum(record["recovery"]["steps"] for record in found.passes)
    under_way, last = folder / _UNDER_WAY, folder / str(number - 1)
    shutil.rmtree(under_way, ignore_errors=True)
    with disk_errors(folder):
        under_way.mkdir(parents=True)
    learner = _Learner(context, dtype, last if number > 1 else None, under_way)
    batches, lost, weight, tokens = lessons.batches(number), 0.0, 0.0, 0
    for at, pieces in enumerate(batches, 1):
        context.progress(f"recovery: pass {number}/{context.settings.recover}, step {at}/{len(batches)}")
        tokens += sum(piece.tokens for piece in pieces)
        learner.number = steps + at
        learner.share = (number - 1 + tokens / lessons.tokens) / context.settings.recover
        learned = step(pieces, learner)
        lost, weight = lost + learned.divergence, weight + learned.weight
        learner.source = under_way
    context.progress(f"recovery: pass {number}/{context.settings.recover}, judging")
    divergence = lessons.judge(learner.build)
    names = [_file(layer) for layer in range(context.model.layers) if _learning(context, layer)]
    with disk_errors(folder):
        for name in names:
            sync(under_way / name)
        shutil.rmtree(folder / str(number), ignore_errors=True)
        under_way.rename(folder / str(number))
        sync(folder)
    row = {"pass": number, "divergence": divergence, "seen": lost / weight if weight else 0.0, "steps": len(batches)}
    found.append(row, files=sha256_files(folder / str(number), names))
    for earlier in range(1, number):
        if earlier != found.best:
            shutil.rmtree(folder / str(earlier), ignore_errors=True)


def _write(context: Context, found: _Records) -> None:
    """Put the weights of the best pass in the place of the pruned ones."""
    if not found.best:
        return
    writer, records = context.files.writer, context.files.journal.records
    digests = dict[str, str]()
    for layer in range(context.model.layers):
        tensors, _ = _layer(context, layer, _folder(context) / str(found.best))
        moved = {matrix.tensor for matrix in _learning(context, layer)}
        for name, tensor in tensors.items():
            if name in moved:
                digests[name] = writer.write(name, tensor)
            elif writer.reuse(name, records[1 + layer]["tensors"][name]) is None:
                found.cut(0)
                raise Damaged(f"{writer.folder}: {name} is not as it was written; run this again")
    writer.sync()
    found.append({"wrote": found.best}, tensors=digests)


def _learning(context: Context, layer: int) -> list[Matrix]:
    """The matrices of a layer that learn: those that were pruned."""
    rows = context.files.journal.records[1 + layer]["matrices"]
    pruned = {row["name"] for row in rows if "skipped" not in row}
    return [matrix for matrix in context.model.matrices(layer) if matrix.name in pruned]


def _layer(context: Context, layer: int, source: Path | None) -> tuple[dict[str, Tensor], dict[str, KeptWeights]]:
    """The tensors of a layer as the output has them, with the kept weights of the files in `source` in their places.

    Without a source the kept weights are those of the output.
    """
    tensors = {name: context.files.writer.read(name) for name in context.model.tensor_names(layer)}
    kept = {}
    stored = {} if source is None or not _learning(context, layer) else _load(source / _file(layer))
    for matrix in _learning(context, layer):
        weight = matrix.of(tensors[matrix.tensor])
        if source is None:
            kept[matrix.name] = KeptWeights.of(weight.to(context.device))
            continue
        own = {part.rpartition("|")[2]: value for part, value in stored.items() if part.startswith(f"{matrix.name}|")}
        bits = np.unpackbits(own["mask"].numpy(), count=matrix.rows * matrix.columns)
        own["mask"] = torch.from_numpy(bits.view(bool)).view(matrix.rows, matrix.columns)
        kept[matrix.name] = KeptWeights({part: value.to(context.device) for part, value in own.items()})
        weight.copy_(kept[matrix.name].weight(weight.dtype))
    return tensors, kept


def _file(layer: int) -> str:
    return f"layer-{layer:05d}"


def _save(file: Path, kept: dict[str, KeptWeights]) -> None:
    """Write the kept weights of a layer, masks as bits."""
    if not kept:
        return
    parts = {}
    for name, weights in kept.items():
        for part, value in weights.parts.items():
            value = value.cpu()
            if part == "mask":
                value = torch.from_numpy(np.packbits(value.numpy()))
            parts[f"{name}|{part}"] = value
    data = save(parts)
    with disk_errors(file):
        require_space(file.parent, len(data))
        staged = file.with_suffix(".new")
        staged.write_bytes(data)
        staged.replace(file)


def _load(file: Path) -> dict[str, Tensor]:
    with disk_errors(file):
        return load(file.read_bytes())
