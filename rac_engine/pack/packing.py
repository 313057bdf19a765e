"""A checkpoint with plain weights, written in packed form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.errors import BadInput, Damaged
from rac_engine.base.files import copy_file, disk_errors, write_file
from rac_engine.checkpoint import (
    Checkpoint,
    TensorInfo,
    bytes_of,
    find_format,
    inside,
    is_packed,
    other_files,
    unread_format,
)
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.layout import PACK, PACK_JOURNAL, RAC
from rac_engine.jobs.publish import write_manifest
from rac_engine.models import Matrix, Model
from rac_engine.pack.beside import CONFIG, copy_records, packed_card, packed_config, rewrite_records, write_card
from rac_engine.pack.sizes import W4_BYTES, PackReport, deflated_size
from rac_engine.pack.writer import Written, same_bits, write_shards
from rac_kernels import Packed, Values, count_zeros, packed_size
from rac_kernels import pack as pack_matrix
from rac_kernels import unpack as unpack_matrix

_FEW = 0.01  # share of zeros that a matrix may have by itself

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack(
    source: str | Path,
    out: str | Path,
    values: Values = "same",
    *,
    restart: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> PackReport:
    """Write the checkpoint `source` to the new folder `out` with the matrices of its decoder layers packed.

    With "same" `unpack` gives back every bit, and so it does with int8 and int4 where the pruning has put the matrices
    on a grid; others are rounded. A matrix that would not become smaller is written as it is. One tensor after the
    other is in memory, up to three times. `out` appears by one rename; a stopped call leaves nothing.

    Raises `BadInput` for no checkpoint, one that is packed or whose weights are quantized, one of which no matrix would
    become smaller, and with int8 and int4 for a matrix that was left dense and would be rounded.
    """
    source, out = Path(source), Path(out)
    with FolderJob(out, model=source) as job:
        checkpoint = _opened(source)
        matrices = _matrices(checkpoint)
        job.open_journal(
            PACK_JOURNAL,
            {"model": str(source), "values": values},
            restart=restart,
            stopped=lambda: "stopped",
            worthwhile=lambda: False,
        )
        report = _write(job.partial, out, _Packing(checkpoint, matrices, values, progress))
        (job.partial / PACK_JOURNAL).unlink()
        write_manifest(job.partial)
        job.publish()
    return report


def pack_output(source: Path, folder: Path, out: Path, values: Values, progress: Callable[[str], None]) -> bool:
    """Write the output `source` of a pruning, which will be `out`, to the empty folder `folder` in packed form.

    Nothing is rounded: a matrix that is not on a grid of `values`, as one that was left dense, is packed bit for bit.
    Returns False where no matrix becomes smaller; what is in `folder` then is of no use.
    """
    checkpoint = _opened(source)
    try:
        _write(folder, out, _Packing(checkpoint, _matrices(checkpoint), values, progress, rounds=False))
    except _NotSmallerError:
        return False
    write_manifest(folder)
    return True


class _NotSmallerError(BadInput):
    """No matrix of a checkpoint becomes smaller by packing."""


def _write(folder: Path, out: Path, packing: _Packing) -> PackReport:
    """Write everything of a packed folder but its manifest."""
    written = write_shards(packing.checkpoint, folder, packing.make)
    if not packing.packed:
        source = packing.checkpoint.path
        raise _NotSmallerError(f"{source}: no matrix has zeros enough to become smaller; prune it first, then pack it")
    report = packing.report(out, written)
    _write_beside(folder, packing.checkpoint, report, packing)
    return report


def _opened(source: Path) -> Checkpoint:
    """The checkpoint, refused if its weights are not plain."""
    checkpoint = Checkpoint.open(source)
    if is_packed(checkpoint.config):
        raise BadInput(f"{source}: is packed already; `rac unpack` writes its plain form")
    form = find_format(checkpoint.config)
    if (said := form.words if form is not None else unread_format(checkpoint.config)) is not None:
        raise BadInput(f"{source}: its weights are quantized ({said}); prune it first, that writes plain weights")
    return checkpoint


def _matrices(checkpoint: Checkpoint) -> dict[str, list[Matrix]]:
    """The matrices of the decoder layers, by the tensor that they are in."""
    found: dict[str, list[Matrix]] = {}
    for matrix in Model.open(checkpoint).prunable():
        info = checkpoint.tensors[matrix.tensor]
        if info.dtype in _DTYPES and len(info.shape) in (2, 3):
            found.setdefault(matrix.tensor, []).append(matrix)
    return found


@dataclass
class _Packing:
    """The work on the tensors, and what it came to."""

    checkpoint: Checkpoint
    matrices: dict[str, list[Matrix]]
    values: Values
    progress: Callable[[str], None]
    rounds: bool = True
    """Whether what is not on a grid of `values` is rounded to one, rather than packed bit for bit."""
    packed: list[str] = field(default_factory=list)
    """Names of what was packed."""
    kept: int = 0
    rounded: dict[str, str] = field(default_factory=dict)
    """Tensors that do not come back bit for bit: SHA-256 of the numbers that come back."""
    zeros: dict[str, int] = field(default_factory=dict)
    """Zeros of matrices in such tensors, by the matrix's name."""
    as_they_are: list[str] = field(default_factory=list)
    off_grid: list[str] = field(default_factory=list)
    """Names of what was packed bit for bit, though `values` are integers."""
    squares: float = 0.0
    gaps: float = 0.0

    def make(self, info: TensorInfo) -> Tensor:
        """The tensor as it is written."""
        self.progress(f"packing {info.name}")
        dense = self.checkpoint.read(info.name)
        made = self._packed(info, dense) if info.name in self.matrices else None
        return dense if made is None else made.data

    def _packed(self, info: TensorInfo, dense: Tensor) -> Packed | None:
        zeros = count_zeros(dense)
        least = packed_size(info.shape, 0 if zeros else dense.numel(), dense.dtype, self.values)
        if least >= info.nbytes:
            self.as_they_are.append(info.name)
            return None
        made = self._form(info, dense) if self.rounds else _exact_form(dense, self.values)
        if made.layout.size >= info.nbytes:
            self.as_they_are.append(info.name)
            return None
        back = unpack_matrix(made)
        if not same_bits(back, dense):
            self._note_rounded(info, dense, back, zeros)
        if made.layout.values != self.values:
            self.off_grid.append(info.name)
        self.packed.append(info.name)
        self.kept += made.layout.kept
        self.squares += float(dense.float().square().sum(dtype=torch.float64))
        return made

    def _form(self, info: TensorInfo, dense: Tensor) -> Packed:
        try:
            return pack_matrix(dense, self.values)
        except ValueError as error:
            raise BadInput(f"{info.file}: tensor {info.name!r}: {error}; pack it with --values same") from None

    def _note_rounded(self, info: TensorInfo, dense: Tensor, back: Tensor, zeros: int) -> None:
        if self.values == "same" or not self.rounds:
            raise Damaged(f"{info.file}: {info.name!r} did not come back from its packed form; memory fails")
        if zeros <= _FEW * dense.numel():
            raise BadInput(
                f"{info.file}: {info.name!r} was left dense, and {self.values} would round it; pack with --values "
                "same, or prune it"
            )
        self.gaps += float((back.float() - dense.float()).square_().sum(dtype=torch.float64))
        self.rounded[info.name] = hashlib.sha256(bytes_of(back)).hexdigest()
        for matrix in self.matrices[info.name]:
            self.zeros[matrix.name] = count_zeros(matrix.of(back))

    def recounted(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics.jsonl, with the zeros that rounding has added."""
        if row["name"] not in self.zeros or row.get("skipped"):
            return row
        zeros = self.zeros[row["name"]]
        return row | {
            "zeros": zeros,
            "sparsity": zeros / (row["rows"] * row["columns"]),
            "rounded": zeros - row.get("zeros", zeros),
        }

    def report(self, out: Path, written: Written) -> PackReport:
        """What was made, in figures."""
        tensors = self.checkpoint.tensors
        dense = sum(info.nbytes for info in tensors.values())
        here = sum(tensors[name].nbytes for name in self.packed)
        weights = sum(math.prod(tensors[name].shape) for name in self.packed)
        deflated, sampled = deflated_size(self.checkpoint, self.progress)
        return PackReport(
            out=str(out),
            values=self.values,
            exact=not self.rounded,
            error=math.sqrt(self.gaps / self.squares) if self.squares else 0.0,
            matrices=len(self.packed),
            weights=weights,
            kept=self.kept,
            packed_matrices=sum(written.sizes[name] for name in self.packed),
            dense=dense,
            packed=written.total,
            deflated=deflated,
            deflate_sampled=sampled,
            w4=dense - here + round(W4_BYTES * weights),
            as_they_are=self.as_they_are,
            off_grid=self.off_grid,
        )


def _exact_form(dense: Tensor, values: Values) -> Packed:
    """The packed form of a matrix: with integers for its kept values if they are on a grid, else with themselves."""
    if values != "same":
        with suppress(ValueError):  # numbers that no scale reaches
            made = pack_matrix(dense, values)
            if same_bits(unpack_matrix(made), dense):
                return made
    return pack_matrix(dense)


def _write_beside(folder: Path, checkpoint: Checkpoint, report: PackReport, packing: _Packing) -> None:
    """Everything but the weights."""
    source = checkpoint.path
    with disk_errors(folder):
        for name in other_files(source):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CONFIG:
                text = packed_config(inside(source, name).read_text(), packing.values)
                write_file(folder / name, text.encode())
            else:
                copy_file(inside(source, name), folder / name)
        copy_records(source, folder)
        if packing.rounded:
            rewrite_records(folder, packing.rounded, packing.recounted)
        (folder / RAC).mkdir(exist_ok=True)
        write_file(folder / RAC / PACK, report.to_json().encode())
    write_card(source, folder, lambda card: packed_card(card, report))
