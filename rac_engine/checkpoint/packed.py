"""Pruned matrices packed by `rac pack`: each one is a tensor of bytes under its own name (see `rac_kernels.pack`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.base.files import opened, read_at
from rac_engine.checkpoint.header import Quantized, TensorInfo
from rac_engine.checkpoint.quantized import Format, sections
from rac_engine.checkpoint.tensors import read_tensor
from rac_kernels import Packed, PackedLayout, take_rows, unpack

METHOD = "rac"
"""What `quant_method` in the config.json of a packed folder says."""

VERSION = 1
"""What `version` beside it says; the matrices have it in their headers too."""

_HEADER = 64

_MEND = "fetch the checkpoint again, or pack it again"


@dataclass(frozen=True)
class PackedMatrix(Quantized):
    """A packed matrix, or a packed batch of them."""

    packed: TensorInfo
    layout: PackedLayout

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.packed,)

    @property
    def unit(self) -> int:
        return 1

    def read(self, first: int, last: int, out: Tensor) -> None:
        layout = self.layout
        try:
            if (first, last) == (0, layout.shape[0]):
                part = read_tensor(self.packed)
            else:
                each = layout.rows // layout.shape[0]
                shape = (last - first, *layout.shape[1:])
                part = take_rows(layout, self._bytes, each * first, each * last, shape).data
            unpack(Packed.from_tensor(part), out)
        except ValueError as error:
            raise BadInput(f"{self.packed.file}: tensor {self.packed.name!r}: {error}; {_MEND}") from None

    def _bytes(self, at: int, count: int) -> Tensor:
        return read_tensor(replace(self.packed, shape=(count,), nbytes=count, offset=self.packed.offset + at))


def packed_format(quantization: Mapping[str, Any]) -> Format | None:
    """What `rac pack` has written; None for anything else."""
    if quantization.get("quant_method") != METHOD:
        return None
    version = quantization.get("version")
    if type(version) is not int or version != VERSION:
        raise BadInput(
            f"config.json: packed matrices of version {str(version)[:40]!r} under quantization_config; this release "
            f"reads version {VERSION}; install a newer one, or unpack it with the one that packed it"
        )
    return Format("RAC's packed form", _find)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that matrices are packed by `rac pack`, in whatever version."""
    return any(isinstance(said, Mapping) and said.get("quant_method") == METHOD for said in sections(config))


def _find(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """Each row of bytes as the matrix that its header describes."""
    for info in tensors.values():
        if info.dtype == torch.uint8 and len(info.shape) == 1:
            try:
                layout = _layout(info.file, info)
            except ValueError as error:
                raise BadInput(f"{info.file}: tensor {info.name!r}: {error}; {_MEND}") from None
            yield replace(
                info,
                dtype=layout.dtype,
                shape=layout.shape,
                nbytes=layout.dense_size,
                quantized=PackedMatrix(info, layout),
            )


def _layout(file: Path, info: TensorInfo) -> PackedLayout:
    """The layout of a packed matrix, by its header and the end of its row index; ValueError if it does not fit."""
    with opened(file) as fd:
        layout = PackedLayout.from_header(bytes(read_at(fd, file, info.offset, min(_HEADER, info.nbytes))))
        if layout.size <= info.nbytes:
            at = info.offset + layout.index_at + 4 * layout.rows
            layout = replace(layout, value_bytes=4 * int.from_bytes(read_at(fd, file, at, 4), "little"))
    if layout.size != info.nbytes:
        raise ValueError(f"it has {info.nbytes} bytes, and header and row index ask for {layout.size} or more")
    return layout
