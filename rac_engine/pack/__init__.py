"""Packed checkpoints: a pruned one written smaller, matrix by matrix, and back.

`pack` writes the packed form of a checkpoint with plain weights, `unpack` the plain form of a packed one. Each is a job
that publishes its folder whole. The form of a matrix is `rac_kernels.pack`'s; reading packed folders is the room
`checkpoint`'s, so that all commands take them.
"""

from __future__ import annotations

from rac_engine.pack.beside import packed_card
from rac_engine.pack.packing import pack, pack_output
from rac_engine.pack.sizes import PackReport, load_report
from rac_engine.pack.unpacking import UnpackReport, unpack

__all__ = ["PackReport", "UnpackReport", "load_report", "pack", "pack_output", "packed_card", "unpack"]
