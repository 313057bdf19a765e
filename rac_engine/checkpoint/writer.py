"""A checkpoint written in the layout of its source, in preallocated shards."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from rac_engine.base import faults
from rac_engine.base.files import copy_file, disk_errors, opened, require_space, reserve, sync, write_at, write_file
from rac_engine.checkpoint.header import TensorInfo, file_layout
from rac_engine.checkpoint.reader import INDEX, SINGLE, Checkpoint, inside, other_files
from rac_engine.checkpoint.tensors import bytes_of, pieces_of, read_tensor
from rac_kernels import all_finite


class CheckpointWriter:
    """Writes a checkpoint that has the names, dtypes, shapes and shards of `source` into `folder`.

    Every shard has its full size on disk before the first tensor is written, so a disk that is too small shows at once.
    Files of an earlier, unfinished writer in the folder stay as they are: `reuse` takes tensors over from them.
    `beside` is how many bytes more the disk has to have free, for others that write meanwhile.
    """

    def __init__(self, source: Checkpoint, folder: Path, beside: int = 0) -> None:
        self.source, self.folder = source, folder
        self._infos: dict[str, TensorInfo] = {}
        self._written: set[str] = set()
        self._dirty: set[Path] = set()
        self.total_size = sum(info.nbytes for info in source.tensors.values())
        count, headers = len(source.shards), dict[Path, tuple[bytes, int]]()
        for number, infos in enumerate(source.shards.values(), start=1):
            file = folder / (SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
            header, places = file_layout(file, infos)
            headers[file] = header, len(header) + sum(info.nbytes for info in infos)
            self._infos.update(places)
        others = {name: inside(source.path, name) for name in other_files(source.path)}
        with disk_errors(folder):
            taken = sum(file.stat().st_blocks * 512 for file in headers if file.exists())
            wanted = sum(size for _, size in headers.values()) + sum(file.stat().st_size for file in others.values())
            require_space(folder, max(wanted - taken, 0) + beside)
            for file, (header, size) in headers.items():
                _reserve(file, header, size)
            for name, file in others.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name == "config.json":
                    write_file(folder / name, source.copied_file(name))
                else:
                    copy_file(file, folder / name)

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Put `tensor` (dtype and shape as in the source) in its place and return the SHA-256 of its bytes.

        Raises `ValueError` for another dtype or shape, and for values that are not finite.
        """
        if not all_finite(tensor):
            raise ValueError(f"{name}: NaN or Inf in the tensor to be written")
        return self._put(name, tensor)

    def _put(self, name: str, tensor: torch.Tensor) -> str:
        """`write` without a look at the values."""
        place = self._infos[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} given for {place.dtype} {place.shape}")
        data = bytes_of(tensor.detach().cpu().contiguous())
        with disk_errors(place.file), opened(place.file, os.O_WRONLY) as fd:
            write_at(fd, data, place.offset)
        self._done(place)
        return hashlib.sha256(data).hexdigest()

    def copy(self, name: str) -> str:
        """Put the source's bytes of a tensor, as `source` presents it, in their place and return their SHA-256."""
        there, place = self.source.tensors[name], self._infos[name]
        digest, at = hashlib.sha256(), place.offset
        with disk_errors(place.file), opened(place.file, os.O_WRONLY) as target:
            for piece in pieces_of(there):
                write_at(target, piece, at)
                digest.update(piece)
                at += len(piece)
        self.source.check_unchanged(name, digest)
        self._done(place)
        return digest.hexdigest()

    def reuse(self, name: str, digest: str) -> torch.Tensor | None:
        """Take over and return the tensor as an earlier writer left it, if its SHA-256 is `digest`; else None."""
        tensor = read_tensor(self._infos[name])
        if hashlib.sha256(bytes_of(tensor)).hexdigest() != digest:
            return None
        self._written.add(name)
        return tensor

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it has been written so far."""
        return read_tensor(self._infos[name])

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with disk_errors(self.folder):
            for file in sorted(self._dirty):
                sync(file)
        self._dirty.clear()

    def finish(self) -> dict[str, str]:
        """Copy every tensor that was not written, then write the index, if the checkpoint has shards.

        Returns the SHA-256 of each tensor that was copied.
        """
        copied = {name: self.copy(name) for name in self._infos if name not in self._written}
        self.sync()
        if len(self.source.shards) > 1:
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": {name: self._infos[name].file.name for name in sorted(self._infos)},
            }
            with disk_errors(self.folder):
                write_file(self.folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        return copied

    def _done(self, place: TensorInfo) -> None:
        self._written.add(place.name)
        self._dirty.add(place.file)


def _reserve(file: Path, header: bytes, size: int) -> None:
    """Give a shard its full size on disk and its header."""
    with opened(file, os.O_WRONLY | os.O_CREAT) as fd:
        faults.truncate(fd, min(size, os.fstat(fd).st_size))
        reserve(fd, size)
        write_at(fd, header, 0)
