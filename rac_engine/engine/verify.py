"""Proof, from the files alone, that a pruned checkpoint is whole and is what its recipe says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rac_engine.base.errors import BadInput, one_line
from rac_engine.base.files import sha256_files
from rac_engine.base.jsonfiles import read_json
from rac_engine.base.sizes import percent
from rac_engine.checkpoint import (
    INDEX,
    Checkpoint,
    TensorInfo,
    is_finite,
    is_packed,
    local_folder,
    other_files,
    without_sections,
)
from rac_engine.engine.metrics import TIED, Metrics, load_metrics, rule_text, tensor_of
from rac_engine.jobs.journal import records_of
from rac_engine.jobs.layout import MANIFEST, METRICS, NOT_IN_MANIFEST, PRUNE_JOURNAL, RAC, RECIPE
from rac_engine.models import EMBEDDINGS, Matrix, Model
from rac_engine.recipe import PruneSettings, load_recipe, names_matrix, pruning_pattern
from rac_engine.solve import ReasonCode
from rac_engine.traces import load_tokenizer

# Keys by which vLLM and transformers know a compressed checkpoint; zeros in a dense one need no such key.
_FORBIDDEN_KEYS = ("quantization_config", "sparsity_config", "compression_config")

_SLACK = 0.01  # zeros beyond those asked for, as a share of the weights: what rounds to zero by itself

_PIECE_BYTES = 64 << 20

_SHOWN_PROBLEMS, _SHOWN_STRANGERS = 12, 3

# What transformers and vLLM look for by name at the top of a folder, beside *.safetensors. They take no pickle where
# there are safetensors, so that a trainer's training_args.bin, for one, does no harm.
_LOADED_NAMES = (
    *(INDEX, "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json"),
    *("adapter_config.json", "hf_quant_config.json", "quantize_config.json", "params.json"),
)

_LONGEST_PROBLEM = 500


@dataclass
class Verification:
    """Counts of what was checked, and every problem found, one line each."""

    out: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no problem, yet not as the job left it, one line each."""
    files: int = 0
    tensors: int = 0
    matrices: int = 0
    weights: int = 0
    zeros: int = 0
    rule: str = ""
    untouched: int | None = None
    """Tensors found bit-equal to the source; None if no source was given."""

    def to_json(self) -> str:
        """The result for programs."""
        return json.dumps({**dataclasses.asdict(self), "out": str(self.out)}, indent=1)

    def summary(self) -> str:
        """A few aligned lines for a terminal."""
        share = self.zeros / self.weights if self.weights else 0.0
        lines = [
            f"files      {self.files} in the manifest",
            f"tensors    {self.tensors} read back",
            f"zeros      {percent(share, 2)} of {self.weights:,} weights in {self.matrices} matrices "
            f"(asked for: {self.rule})",
        ]
        if self.untouched is not None:
            lines.append(f"untouched  {self.untouched} tensors bit-equal to the source")
        count = len(self.problems)
        verdict = f"{count} problem{'s' * (count > 1)}" if count else "whole"
        lines += [f"note       {one_line(note)[:_LONGEST_PROBLEM]}" for note in self.notes]
        lines += [f"✗ {one_line(problem)[:_LONGEST_PROBLEM]}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if count > _SHOWN_PROBLEMS:
            lines.append(f"✗ and {count - _SHOWN_PROBLEMS} more; --json has them all")
        return "\n  ".join([f"{self.out}: {verdict}", *lines])


def verify(
    out: str | Path, source: str | Path | Checkpoint | None = None, progress: Callable[[str], None] = lambda _: None
) -> Verification:
    """Read back everything in `out`: manifest and checksums, every tensor, zeros and pattern of every matrix.

    Every tensor must be what the job's journal says it wrote, every matrix of the model must have been pruned or left
    dense as the recipe says, and the tensors must be those that transformers builds from the config.

    With `source`, the checkpoint that it was made from (a folder, or one on the hub), what was not pruned must be
    bit-equal to it. `progress` is told what is being read. Raises `BadInput` where `out` is no output of the engine or
    `source` no checkpoint.
    """
    out = Path(out)
    metrics = load_metrics(out / RAC)
    result = Verification(out)
    _check_manifest(out, result, progress)
    try:
        checkpoint = Checkpoint.open(out)
    except BadInput as error:
        result.problems.append(str(error))
        return result
    _check_layout(checkpoint, result)
    _check_recipe(checkpoint, metrics, result)
    _check_tensors(checkpoint, metrics, result, progress)
    if source is not None:
        given = source if isinstance(source, Checkpoint) else Checkpoint.open(local_folder(source, progress))
        _check_source(checkpoint, given, metrics, result, progress)
    return result


def _check_manifest(out: Path, result: Verification, progress: Callable[[str], None]) -> None:
    path = out / RAC / MANIFEST
    try:
        entries: dict[str, Any] = read_json(path)["files"]
        expected = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in entries.items()}
    except BadInput as error:
        result.problems.append(str(error))
        return
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        result.problems.append(f"{path}: not a manifest")
        return
    result.files = len(expected)
    present = []
    for name, (_, size) in expected.items():
        file = out / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            result.problems.append(f"{name}: the manifest leads out of the folder")
        elif not os.path.isfile(file):  # of a name that no file can have too
            result.problems.append(f"{name[:200]}: missing")
        elif file.stat().st_size != size:
            result.problems.append(f"{name}: {file.stat().st_size} bytes, the manifest says {size}")
        else:
            present.append(name)
    progress(f"reading back: checksums of {len(present)} files")
    for name, digest in sha256_files(out, present).items():
        if digest != expected[name][0]:
            result.problems.append(f"{name}: its SHA-256 is not the manifest's")
    strangers = []
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_file() and name not in expected and not name.startswith(NOT_IN_MANIFEST):
            strangers.append(name)
    loaded = [name for name in strangers if _is_loaded(name)]
    result.problems += [f"{name}: not in the manifest, and engines would load it" for name in loaded]
    if others := [name for name in strangers if name not in loaded]:
        shown = ", ".join(others[:_SHOWN_STRANGERS]) + (" …" if len(others) > _SHOWN_STRANGERS else "")
        result.notes.append(f"{len(others)} {'files' if len(others) > 1 else 'file'} beside what was made: {shown}")


def _is_loaded(name: str) -> bool:
    """Whether a file, by its path in a checkpoint, decides what an engine loads or how it reads it."""
    return name in _LOADED_NAMES or ("/" not in name and name.endswith(".safetensors"))


def _check_layout(checkpoint: Checkpoint, result: Verification) -> None:
    """Nothing beside the shards that an engine would load, the index's sum, and no key that means compression."""
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        if file.name not in checkpoint.shards:
            result.problems.append(f"{file.name}: a stray weight file that the index does not name")
    index = checkpoint.path / INDEX
    if index.exists():
        total = sum(
            sum(part.nbytes for part in info.quantized.parts) if info.quantized is not None else info.nbytes
            for info in checkpoint.tensors.values()
        )
        said = read_json(index).get("metadata", {}).get("total_size")
        if said != total:
            result.problems.append(f"{INDEX}: total_size is {said}, the tensors have {total} bytes")
    for key in _FORBIDDEN_KEYS:
        if checkpoint.config.get(key) is not None and not is_packed(checkpoint.config):
            result.problems.append(f"config.json: {key} is set, so inference engines would refuse these dense weights")


def _check_recipe(checkpoint: Checkpoint, metrics: Metrics, result: Verification) -> None:
    """The model loads by its config, and every matrix in it was pruned as the recipe says, or is said to be dense."""
    try:
        model = Model.open(checkpoint)
    except BadInput as error:
        result.problems.append(f"not loadable: {error}")
        return
    if any((checkpoint.path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            load_tokenizer(checkpoint.path)
        except BadInput as error:
            result.problems.append(f"not loadable: {error}")
    try:
        settings = load_recipe(checkpoint.path / RAC / RECIPE).prune
        said = metrics.run.get("settings", {})
        for name, wanted in settings.model_dump(mode="json").items():
            if wanted != said.get(name):
                result.problems.append(f"{RECIPE}: {name} is {wanted!r}, {METRICS} says {said.get(name)!r}")
        matrices = model.prunable(settings.also)
    except BadInput as error:
        result.problems.append(str(error))
        return
    rows = {row["name"]: row for row in metrics.matrices}
    for matrix in matrices:
        if matrix.name not in rows:
            result.problems.append(f"{matrix.name}: {METRICS} does not say what became of it")
        elif problem := _unasked(matrix, rows[matrix.name], settings, said):
            result.problems.append(f"{matrix.name}: {problem}")
    if model.untied and any(TIED in row["notes"] for row in metrics.pruned):
        result.problems.append(
            f"{model.family.head}: is not the table of embeddings, though {METRICS} says that they are tied; "
            "transformers would load two matrices"
        )


def _unasked(matrix: Matrix, row: dict[str, Any], settings: PruneSettings, said: dict[str, Any]) -> str | None:
    """Words for a row of metrics.jsonl that the recipe's settings do not ask for; None for one that they do.

    `said` are the settings that metrics.jsonl tells of, for rows without a target of their own.
    """
    dense = any(names_matrix(entry, matrix.path, matrix.module) for entry in settings.dense)
    own = settings.of(matrix.path, matrix.module)
    if row.get("skipped"):
        code = row.get("skipped_code")
        if code == ReasonCode.ASKED_DENSE:
            return None if dense else "left dense, though the recipe does not name it"
        if _is_given(code, own, settings.nonfinite):
            return None
        return f"left dense for a reason that the recipe does not give: {row['skipped']}"
    if dense:
        return "pruned, though the recipe leaves it dense"
    if "target" not in row:
        return None
    asked = target_of(row, said)
    reach = 0.0 if settings.overridden(matrix.path, matrix.module) else settings.allocation_reach
    far = abs(asked["sparsity"] - own.sparsity)
    if asked["pattern"] == own.pattern and far <= reach * (1 + 1e-9):
        return None
    wanted = rule_text(own.model_dump(include={"sparsity", "pattern"}))
    return f"pruned to {rule_text(asked)}, the recipe says {wanted}"


def _is_given(code: object, own: PruneSettings, nonfinite: str) -> bool:
    """Whether the recipe gives a reason of that code for leaving a matrix dense, other than naming it."""
    if code == ReasonCode.SPARSITY_ZERO:
        return own.pattern is None and own.sparsity == 0 and own.values == "same"
    if code == ReasonCode.NOT_FINITE:
        return nonfinite == "dense"
    return code in (ReasonCode.NO_TOKEN, ReasonCode.BEYOND_FP32, ReasonCode.FEW_TOKENS)


def _check_tensors(
    checkpoint: Checkpoint, metrics: Metrics, result: Verification, progress: Callable[[str], None]
) -> None:
    """Every tensor is what the job wrote and finite, and every matrix has the zeros that were asked for."""
    settings = metrics.run.get("settings", {})
    result.rule = rule_text(settings)
    pruned: dict[str, list[dict[str, Any]]] = {}
    for matrix in metrics.pruned:
        pruned.setdefault(tensor_of(matrix), []).append(matrix)
    written = {
        name: digest
        for record in records_of(checkpoint.path / PRUNE_JOURNAL)
        for name, digest in record.get("tensors", {}).items()
    }
    for name in pruned.keys() - checkpoint.tensors.keys():
        result.problems.append(f"{name}: pruned by {METRICS}, but not in the checkpoint")
    for name, info in checkpoint.tensors.items():
        result.tensors += 1
        progress(f"reading back: tensor {result.tensors} of {len(checkpoint.tensors)}")
        try:
            _check_tensor(checkpoint, info, pruned.get(name, []), settings, written.get(name), result)
        except BadInput as error:  # a packed matrix that contradicts itself
            result.problems.append(str(error))


def _check_tensor(
    checkpoint: Checkpoint,
    info: TensorInfo,
    matrices: list[dict[str, Any]],
    settings: dict[str, Any],
    written: str | None,
    result: Verification,
) -> None:
    """One tensor, with the rows of metrics.jsonl of the pruned matrices in it and the SHA-256 that the job wrote."""
    name = info.name
    stacked = any("tensor" in matrix for matrix in matrices)
    asked = [target_of(matrix, settings) for matrix in matrices]
    tally, finite, digest = _Tally(asked[0]["pattern"] if asked else None), True, hashlib.sha256()
    for piece in _pieces(checkpoint, info):
        data = _bits(piece).numpy().data
        digest.update(data)
        finite = finite and is_finite(data, info.dtype)
        if matrices and not stacked:
            tally.add(piece)
    if written is not None and digest.hexdigest() != written:
        result.problems.append(f"{name}: its SHA-256 is not the journal's: it is not what the job wrote")
    if not finite and (matrices or settings.get("nonfinite") != "dense"):
        result.problems.append(f"{name}: holds NaN or Inf")
    for matrix, target in zip(matrices, asked, strict=True):
        if stacked:  # in one tensor with those of other experts, in some families the other way about
            expert, tally = int(matrix["expert"]), _Tally(target["pattern"])
            own = checkpoint.read(name, (expert, expert + 1))[0]
            tally.add(own.T if matrix.get("transposed", True) else own)
        block_size = int(settings.get("block_size", matrix["columns"]))
        shape = info.shape[-2:][:: -1 if stacked and matrix.get("transposed", True) else 1]
        _check_matrix(shape, matrix, tally, target, block_size, result)


@dataclass
class _Tally:
    """Counts over a pruned matrix, piece by piece."""

    pattern: str | None
    zeros: int = 0
    negative: bool = False
    fits: bool = True
    live: torch.Tensor | None = None
    """[columns] bool: those that are not all zero."""

    def add(self, piece: torch.Tensor) -> None:
        """Count a run of rows [rows, columns]."""
        zero = piece == 0
        here = ~zero.all(0)
        self.live = here if self.live is None else self.live | here
        self.zeros += int(zero.sum())
        self.negative = self.negative or bool((piece.signbit() & zero).any())
        self.fits = self.fits and (self.pattern is None or _fits(piece, *pruning_pattern(self.pattern)))


def _check_matrix(
    shape: tuple[int, ...],
    matrix: dict[str, Any],
    tally: _Tally,
    target: dict[str, Any],
    block_size: int,
    result: Verification,
) -> None:
    name, rows, columns = matrix["name"], matrix["rows"], matrix["columns"]
    result.matrices += 1
    result.zeros += tally.zeros
    result.weights += rows * columns
    if shape != (rows, columns):
        result.problems.append(f"{name}: {list(shape)}, {METRICS} says {rows} × {columns}")
        return
    if tally.zeros != matrix["zeros"]:
        result.problems.append(f"{name}: {tally.zeros:,} zeros, {METRICS} says {matrix['zeros']:,}")
    if tally.negative:
        result.problems.append(f"{name}: has −0.0 among its zeros")
    if not tally.fits:
        result.problems.append(f"{name}: breaks the pattern {tally.pattern}")
    if tally.zeros < _least_zeros(target, block_size, rows, columns):
        result.problems.append(f"{name}: {percent(tally.zeros / (rows * columns), 2)} zeros, too few")
    dead = 0 if tally.live is None else int((~tally.live).sum())
    known = sum(int(matrix.get(name, 0)) for name in ("zeros_before", "lost", "rounded")) + rows * dead
    if tally.zeros > _most_zeros(target, block_size, rows, columns) + known:
        result.problems.append(
            f"{name}: {percent(tally.zeros / (rows * columns), 2)} zeros, too many: {known:,} were there before or in "
            "inputs that are always zero"
        )


def target_of(matrix: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Sparsity and pattern asked of a matrix, by its row of metrics.jsonl."""
    found = matrix.get("target") or settings
    return {"sparsity": float(found.get("sparsity") or 0), "pattern": found.get("pattern")}


def _least_zeros(target: dict[str, Any], block_size: int, rows: int, columns: int) -> int:
    """Zeros that the target leads to at least: solvers round down, by row or by block of columns."""
    if target["pattern"]:
        n, m = pruning_pattern(target["pattern"])
        return rows * (columns // m) * (m - n)
    return int(target["sparsity"] * rows * columns) - max(rows, -(-columns // block_size))


def _most_zeros(target: dict[str, Any], block_size: int, rows: int, columns: int) -> int:
    """Zeros that the target leads to at most, in a matrix without zeros whose inputs are all alive."""
    slack = max(rows, -(-columns // block_size), int(_SLACK * rows * columns))
    if target["pattern"]:
        n, m = pruning_pattern(target["pattern"])
        return rows * -(-columns // m) * (m - n) + slack
    return int(target["sparsity"] * rows * columns) + slack


def _fits(piece: torch.Tensor, n: int, m: int) -> bool:
    """Whether every m consecutive columns of every row have at most n nonzeros."""
    columns = piece.shape[1]
    padded = torch.nn.functional.pad(piece != 0, (0, -columns % m))
    return bool((padded.unflatten(1, (-1, m)).sum(-1) <= n).all())


def _pieces(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor by runs of rows of 64 MiB or so."""
    if len(info.shape) < 2 or info.nbytes <= _PIECE_BYTES:
        yield checkpoint.read(info.name)
        return
    step = max(1, _PIECE_BYTES * info.shape[0] // info.nbytes)
    for first in range(0, info.shape[0], step):
        yield checkpoint.read(info.name, (first, min(first + step, info.shape[0])))


def _check_source(
    made: Checkpoint, source: Checkpoint, metrics: Metrics, result: Verification, progress: Callable[[str], None]
) -> None:
    result.untouched = 0
    sha256 = metrics.run.get("model", {}).get("sha256")
    progress(f"checksum of {source.path}")
    if sha256 and source.sha256() != sha256:
        result.problems.append(f"{source.path}: not the checkpoint that this one was made from (its SHA-256 differs)")
    pruned = set(map(tensor_of, metrics.pruned))
    if any(matrix["layer"] == EMBEDDINGS for matrix in metrics.pruned):
        copies = Model.open(source).tied_copies
        pruned.update(copies)
        for name in set(copies) - set(Model.open(made).tied_copies):
            result.problems.append(f"{name}: is a copy of the embeddings in the source, but not here")
    for number, matrix in enumerate(metrics.pruned, 1):
        name, said = matrix["name"], matrix.get("zeros_before", 0)
        if "tensor" not in matrix and name in source.tensors:
            progress(f"zeros of the source: matrix {number} of {len(metrics.pruned)}")
            found = sum(int((piece == 0).sum()) for piece in _pieces(source, source.tensors[name]))
            if found != said:
                result.problems.append(f"{name}: {found:,} zeros in the source, {METRICS} says {said:,}")
    for name in sorted(made.tensors.keys() ^ source.tensors.keys()):
        result.problems.append(f"{name}: in only one of output and source")
    shared = sorted(made.tensors.keys() & source.tensors.keys())
    for number, name in enumerate(shared, 1):
        here, there = made.tensors[name], source.tensors[name]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            result.problems.append(
                f"{name}: {here.dtype} {list(here.shape)}, the source has {there.dtype} {list(there.shape)}"
            )
        elif name not in pruned:
            progress(f"comparing with the source: tensor {number} of {len(shared)}")
            pairs = zip(_pieces(made, here), _pieces(source, there), strict=True)
            if all(torch.equal(_bits(a), _bits(b)) for a, b in pairs):
                result.untouched += 1
            else:
                result.problems.append(f"{name}: differs from the source, though it was not pruned")
    for name in other_files(source.path):
        copy = made.path / name
        packed = name == "config.json" and is_packed(made.config)
        if packed and without_sections(made.config) == json.loads(source.copied_file(name)):
            continue
        if not copy.is_file() or copy.read_bytes() != source.copied_file(name):
            result.problems.append(f"{name}: differs from the source's")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
