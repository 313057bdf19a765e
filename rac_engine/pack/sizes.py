"""The size of a packed checkpoint, beside the sizes that it would have in other forms."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rac_engine.base.jsonfiles import read_json
from rac_engine.base.sizes import format_bytes, percent
from rac_engine.checkpoint import Checkpoint, TensorInfo, bytes_of
from rac_engine.jobs.layout import PACK, RAC

W4_BYTES = 0.53
"""Bytes a weight of four-bit weights without sparsity, with a scale in bf16 and a zero point for 128 of them or so."""

_SAMPLE = 16 << 20  # bytes of all tensors that are compressed, to know what compression does
_LEAST = 4096  # of each tensor


@dataclass(frozen=True)
class PackReport:
    """What `pack` made. All sizes are bytes of tensors, without the files beside them."""

    out: str
    values: str
    """How kept values are stored: "same", "int8" or "int4"."""
    exact: bool
    """Whether unpacking gives back every bit."""
    error: float
    """‖packed − dense‖ / ‖dense‖ over all packed matrices."""
    matrices: int
    """Tensors that were packed."""
    weights: int
    """Their weights."""
    kept: int
    """Those of them that are stored."""
    packed_matrices: int
    """Bytes of the packed tensors."""
    dense: int
    """Bytes of the checkpoint as it was."""
    packed: int
    """Bytes of the packed checkpoint."""
    deflated: int
    """Bytes of the checkpoint as it was in a zip file (deflate at level 6)."""
    deflate_sampled: float
    """The share of the tensors' bytes that was compressed to find that."""
    w4: int
    """Bytes with the packed matrices in four bits a weight and without zeros instead."""
    as_they_are: list[str] = field(default_factory=list)
    """Matrices that would not have become smaller."""
    off_grid: list[str] = field(default_factory=list)
    """Matrices that are packed bit for bit, though `values` are integers: those on no grid of them."""

    @property
    def bits(self) -> float:
        """Bits a weight of the packed matrices."""
        return 8 * self.packed_matrices / self.weights

    def summary(self) -> str:
        """A few aligned lines for a terminal."""
        how = "bit for bit" if self.exact else f"rounded, a relative error of {self.error:.2g}"
        about = "" if self.deflate_sampled >= 1 else f", measured on {percent(self.deflate_sampled, 1)} of it"
        near = "; on disk deflate comes near a bit mask, in memory it does not help"
        lines = [
            f"{self.matrices} matrices at {self.bits:.2f} bits a weight ({how}), "
            f"{percent(self.kept / self.weights, 1)} of their weights kept",
            f"dense      {format_bytes(self.dense)}",
            f"packed     {format_bytes(self.packed)}, {percent(self.packed / self.dense, 1)} of it",
            f"zip        {format_bytes(self.deflated)} (deflate of the dense file{about}{near})",
            f"W4 alone   {format_bytes(self.w4)} (4 bits a weight, no zeros, {W4_BYTES} bytes each; the rest as it is)",
        ]
        if count := len(self.as_they_are):
            lines.append(f"note       {count} matrices would not become smaller and are as they were")
        if count := len(self.off_grid):
            lines.append(f"note       {count} matrices are on no grid of {self.values} and are packed bit for bit")
        return "\n  ".join([f"{self.out}: {self.values}", *lines])

    def to_json(self) -> str:
        """The same for programs."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load_report(folder: Path) -> PackReport | None:
    """What `pack` wrote of a packed folder; None where there is none, or none of this form."""
    file = folder / RAC / PACK
    if not file.is_file():
        return None
    try:
        return PackReport(**read_json(file))
    except TypeError:
        return None


def deflated_size(checkpoint: Checkpoint, progress: Callable[[str], None]) -> tuple[int, float]:
    """Bytes that the tensors would take in a zip file, and the share of them that was compressed to know."""
    infos = list(checkpoint.tensors.values())
    total = max(sum(info.nbytes for info in infos), 1)
    progress("compressing a sample")
    size, looked = 0.0, 0
    for info in infos:
        data = _middle(checkpoint, info, max(int(_SAMPLE * info.nbytes / total), _LEAST))
        if len(data):
            size += len(zlib.compress(data, 6)) / len(data) * info.nbytes
            looked += len(data)
    return round(size), looked / total


def _middle(checkpoint: Checkpoint, info: TensorInfo, count: int) -> memoryview:
    """About `count` bytes of a tensor, whole rows from its middle."""
    rows = info.shape[0] if info.shape else 1
    if info.nbytes <= count or rows < 2:
        return bytes_of(checkpoint.read(info.name))[:count]
    wanted = min(max(count * rows // info.nbytes, 1), rows)
    first = (rows - wanted) // 2
    return bytes_of(checkpoint.read(info.name, (first, first + wanted)))
