"""Hugging Face checkpoints as files: read tensor by tensor, written back in the same layout.

Tensors go by their names on disk. Nothing in a header or an index is believed before it is checked; only the bytes of
the tensor asked for are read (no memory map, so that what a process holds is what it asked for); and what is written
appears under its final name by one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import reprlib
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rac_engine import faults
from rac_engine.errors import BadInput, Damaged
from rac_engine.sizes import format_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "rac/manifest.json"
# Written into a finished folder later, by `rac eval` and `rac report`.
NOT_IN_MANIFEST = (MANIFEST, "rac/report.html", "rac/eval/", "rac/traces/", "rac/variants/")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SCALE = "_scale_inv"  # behind a weight's name: the scales of its blocks
_MAX_RANK = 64  # dimensions of a tensor: as many as torch takes
_MAX_HEADER = 100_000_000  # what the safetensors format allows
_MAX_JSON = 64 << 20
_PIECE = 8 << 20
_SPARE = 4 << 20  # bytes that journal, metrics and report may take
# What other tools would take for weights: pickles are never opened nor passed on, and an engine loads every
# *.safetensors at the top of a folder.
_WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".onnx"),
    *(".gguf", ".ggml", ".ot", ".tflite", ".index.json"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` (of the file's start) in `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scaled: Scaled | None = None
    """Of a tensor that is read as `dtype` and takes `nbytes` so, but lies in the file as FP8; `offset` is then that of
    the FP8 bytes."""


@dataclass(frozen=True)
class Scaled:
    """How FP8 becomes bf16: a block of rows and columns is multiplied by one number."""

    dtype: torch.dtype
    scales: TensorInfo
    """`weight_scale_inv` [⌈rows / block⌉, ⌈columns / block⌉]"""
    block: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, one file or shards with an index. Made by `open`.

    Block-scaled FP8 weights (DeepSeek's format: `weight` and `weight_scale_inv`) are read as bf16, and a copy of the
    checkpoint has them as bf16; the scales do not appear among `tensors`.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, list[TensorInfo]]
    """Tensors of each weight file in the order of their bytes, by file name."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check config, index and headers.

        Raises `BadInput` for a folder that is missing or incomplete, for an index that leads out of it, and for a
        header whose names, dtypes, shapes and offsets do not describe exactly the file's bytes.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
        config = read_json(_inside(folder, "config.json"))
        if "transformers_weights" in config:
            raise BadInput(
                f"{folder / 'config.json'}: transformers_weights would let transformers load other weights than are "
                "read here; remove the key"
            )
        for name in other_files(folder):
            if os.path.exists(folder / name) and not os.path.isfile(folder / name):
                raise BadInput(f"{folder / name}: is no regular file; the checkpoint is not to be trusted")
        index, single = folder / INDEX, folder / SINGLE
        weight_map = None
        if index.exists():
            weight_map = _weight_map(index)
            files = sorted(set(weight_map.values()))
            if single.exists() and SINGLE not in files:
                raise BadInput(f"{folder}: {INDEX} and a {SINGLE} that it does not name; remove the one that is stale")
        elif single.exists():
            files = [SINGLE]
        else:
            raise BadInput(f"{folder}: neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
        shards = {file: read_header(_inside(folder, file)) for file in files}
        tensors: dict[str, TensorInfo] = {}
        for file, infos in shards.items():
            for info in infos:
                if info.name in tensors:
                    raise BadInput(f"{folder}: tensor {info.name!r} is in two shards; the checkpoint is damaged")
                if weight_map is not None and weight_map.get(info.name) != file:
                    raise BadInput(f"{index}: does not say that {info.name!r} is in {file}, but it is; fetch it again")
                tensors[info.name] = info
        for name in weight_map or ():
            if name not in tensors:
                raise BadInput(f"{index}: {name!r} is not in {(weight_map or {})[name]}; fetch the checkpoint again")
        if fp8_block(config) is not None:
            tensors, shards = _as_bf16(folder, config, tensors, shards)
        return cls(folder, config, tensors, shards)

    def copied_file(self, name: str) -> bytes:
        """What a copy of the checkpoint has in a file beside the weights: in config.json, no FP8."""
        if name == "config.json" and fp8_block(self.config) is not None:
            config = {key: value for key, value in self.config.items() if key != "quantization_config"}
            return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return read_small(_inside(self.path, name), 1 << 62)

    def read(self, name: str, rows: tuple[int, int] | None = None, pin: bool = False) -> torch.Tensor:
        """The tensor (or its rows from `rows[0]` up to `rows[1]`) in its own dtype, on the CPU, pinned with `pin`.

        Once the checkpoint was gone through (`sha256`), a whole tensor is held against what it was then: `Damaged` if
        it is read as something else.
        """
        tensor = read_tensor(self.tensors[name], rows, pin)
        if rows is None:
            self.hold(name, bytes_of(tensor))
        return tensor

    def hold(self, name: str, read: Any) -> None:
        """Raise `Damaged` if `read` (the bytes of a tensor, or their digest) is not what `sha256` went through."""
        if "_content" in self.__dict__:
            digest = read if hasattr(read, "hexdigest") else hashlib.sha256(read)
            if digest.hexdigest() != self._content[name][0]:
                raise Damaged(
                    f"{self.tensors[name].file}: {name!r} was read twice, with other bytes the second time; the file "
                    "was changed meanwhile, or disk or memory fail"
                )

    def sha256(self) -> str:
        """SHA-256 over config.json and the name, dtype, shape and SHA-256 of every tensor.

        Computed once, with all cores; from then on what is read is held against it.
        """
        config = json.dumps(self.config, sort_keys=True)
        if config != json.dumps(read_json(_inside(self.path, "config.json")), sort_keys=True):
            raise Damaged(f"{self.path / 'config.json'}: was read twice, with other bytes the second time")
        digest = hashlib.sha256(config.encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {self._content[name][0]}\n".encode())
        return digest.hexdigest()

    def nonfinite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf; goes through the checkpoint as `sha256` does, once for both."""
        return [name for name in self.tensors if not self._content[name][1]]

    @cached_property
    def _content(self) -> dict[str, tuple[str, bool]]:
        """SHA-256 of each tensor, and whether all its values are finite."""

        def one(info: TensorInfo) -> tuple[str, bool]:
            digest, finite = hashlib.sha256(), True
            for piece in _pieces_of(info):
                digest.update(piece)
                finite = finite and is_finite(piece, info.dtype)
            return digest.hexdigest(), finite

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(self.tensors, pool.map(one, self.tensors.values()), strict=True))


class CheckpointWriter:
    """Writes a checkpoint that has the names, dtypes, shapes and shards of `source` into `folder`.

    Every shard has its full size on disk before the first tensor is written, so a disk that is too small shows at once.
    Files of an earlier, unfinished writer in the folder are taken over as they are: `digest` tells what they hold.
    `beside` are bytes that the disk has to have free for others while this one writes.
    """

    def __init__(self, source: Checkpoint, folder: Path, beside: int = 0) -> None:
        self.source, self.folder = source, folder
        self._places: dict[str, TensorInfo] = {}
        self._written: set[str] = set()
        self._dirty: set[Path] = set()
        self.total_size = sum(info.nbytes for info in source.tensors.values())
        count, headers = len(source.shards), dict[Path, tuple[bytes, int]]()
        for number, infos in enumerate(source.shards.values(), start=1):
            file = folder / (SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
            header, places = _layout(file, infos)
            headers[file] = header, len(header) + sum(info.nbytes for info in infos)
            self._places.update(places)
        others = {name: _inside(source.path, name) for name in other_files(source.path)}
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
        place = self._places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} given for {place.dtype} {place.shape}")
        data = bytes_of(tensor.detach().cpu().contiguous())
        with disk_errors(place.file), _opened(place.file, os.O_WRONLY) as fd:
            write_at(fd, data, place.offset)
        self._done(place)
        return hashlib.sha256(data).hexdigest()

    def copy(self, name: str) -> str:
        """Put the source's bytes of a tensor (FP8 as bf16) in their place and return their SHA-256."""
        there, place = self.source.tensors[name], self._places[name]
        digest, at = hashlib.sha256(), place.offset
        with disk_errors(place.file), _opened(place.file, os.O_WRONLY) as target:
            for piece in _pieces_of(there):
                write_at(target, piece, at)
                digest.update(piece)
                at += len(piece)
        self.source.hold(name, digest)
        self._done(place)
        return digest.hexdigest()

    def accept(self, name: str, digest: str) -> torch.Tensor | None:
        """Take over and return what an earlier writer left of this tensor, if its SHA-256 is `digest`."""
        tensor = read_tensor(self._places[name])
        if hashlib.sha256(bytes_of(tensor)).hexdigest() != digest:
            return None
        self._written.add(name)
        return tensor

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
        copied = {name: self.copy(name) for name in self._places if name not in self._written}
        self.sync()
        if len(self.source.shards) > 1:
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": {name: self._places[name].file.name for name in sorted(self._places)},
            }
            with disk_errors(self.folder):
                write_file(self.folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        return copied

    def _done(self, place: TensorInfo) -> None:
        self._written.add(place.name)
        self._dirty.add(place.file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB without duplicate keys; anything else is `BadInput`."""
    try:
        raw = read_small(file, _MAX_JSON)
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; give the folder of a whole Hugging Face checkpoint") from None
    return _json_object(raw, str(file))


def read_small(file: Path, limit: int) -> bytes:
    """The bytes of a regular file; `BadInput` for one of more than `limit` bytes, a device or a pipe."""
    with _opened(file) as fd:
        size = _regular(fd, file).st_size
        if size > limit:
            raise BadInput(f"{file}: larger than {format_bytes(limit)}; that is no file of a checkpoint")
        return bytes(_read_at(fd, file, 0, size))


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises `BadInput` unless the header accounts for every byte of the file exactly once.
    """
    with _opened(file) as fd:
        status = _regular(fd, file)
        size = int.from_bytes(_read_at(fd, file, 0, 8), "little") if status.st_size >= 8 else -1
        if not 2 <= size <= min(_MAX_HEADER, status.st_size - 8):
            raise BadInput(f"{file}: not a safetensors file, or cut short; fetch it again")
        header = _json_object(bytes(_read_at(fd, file, 8, size)), f"header of {file}")
    start, data = 8 + size, status.st_size - 8 - size
    infos = [_tensor_info(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = start
    for info in infos:
        if info.offset != end:
            raise BadInput(f"{file}: tensor {info.name!r} overlaps another or leaves a hole; the file is damaged")
        end += info.nbytes
    if end != start + data:
        raise BadInput(
            f"{file}: the header describes {end - start} bytes of tensors, the file has {data}; fetch it again"
        )
    return infos


def read_tensor(info: TensorInfo, rows: tuple[int, int] | None = None, pin: bool = False) -> torch.Tensor:
    """The tensor, or a range of its rows, read from its file into memory of its own (see `pages`)."""
    first, shape = 0, info.shape
    if rows is not None:
        first, shape = rows[0], (rows[1] - rows[0], *info.shape[1:])
    dtype = info.dtype if info.scaled is None else info.scaled.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=info.dtype)
    memory = pages(nbytes, pin and info.scaled is None)
    offset = info.offset + first * math.prod(shape[1:]) * dtype.itemsize
    with _opened(info.file) as fd:
        _read_into(fd, info.file, offset, memoryview(memory))
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    if info.scaled is None:
        return tensor
    made = torch.frombuffer(pages(math.prod(shape) * info.dtype.itemsize, pin), dtype=info.dtype).view(shape)
    return _multiply(tensor, read_tensor(info.scaled.scales), info.scaled.block, first, made)


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if a config.json says that the weights are block-scaled FP8; else None."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    return None


def other_files(folder: Path) -> list[str]:
    """The files beside the weights that belong to a checkpoint, relative to `folder`.

    Left out: weights in any format, hidden files, the model card (the pruned model has its own), and `rac/`.
    """
    found = []
    for base, folders, files in os.walk(folder):
        relative = Path(base).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (relative / name) != Path("rac"))
        found += [
            str(relative / name)
            for name in sorted(files)
            if not name.startswith(".")
            and not name.lower().endswith(_WEIGHT_FILES)
            and (relative / name) != Path("README.md")
        ]
    return found


def write_file(file: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with _opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_at(fd, data, 0)
        faults.fsync(fd)


def replace_file(file: Path, data: bytes) -> None:
    """Let a small file appear, or take the place of an earlier one, whole: by one rename, once it is on the disk."""
    staged = file.with_name(f"{file.name}.tmp")
    try:
        write_file(staged, data)
        faults.rename(staged, file)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync(file.absolute().parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file's bytes; a later `sync` puts them on the disk."""
    with _opened(source) as fd:
        size = _regular(fd, source).st_size
    with _opened(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        at = 0
        for piece in _pieces(source, 0, size):
            write_at(fd, piece, at)
            at += len(piece)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    with _opened(path) as fd:
        faults.fsync(fd)


def require_space(folder: Path, count: int) -> None:
    """`BadInput` unless `count` bytes, and a little for what goes beside the weights, are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < count + _SPARE:
        raise BadInput(
            f"{folder}: {format_bytes(count + _SPARE)} more are needed on this disk and {format_bytes(free)} are free; "
            "free some space or choose another disk"
        )


def sha256_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files in `folder`, with all cores."""

    def one(name: str) -> str:
        file = folder / name
        return _sha256_range(file, 0, file.stat().st_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def write_manifest(folder: Path) -> None:
    """Write rac/manifest.json: SHA-256 and size of every file in `folder` that is final."""
    every = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [name for name in every if not name.startswith(NOT_IN_MANIFEST)]
    files = {
        name: {"sha256": digest, "size": (folder / name).stat().st_size}
        for name, digest in sha256_files(folder, names).items()
    }
    with disk_errors(folder):
        write_file(folder / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())


def publish(partial: Path, out: Path) -> None:
    """Let the finished folder `partial` appear as `out`, by one rename, once all its bytes are on the disk.

    An interruption that comes once it has appeared comes too late: the job is done.
    """
    try:
        _publish(partial, out)
    except KeyboardInterrupt:
        if partial.exists() or not out.exists():
            raise
        sync(out.absolute().parent)


def _publish(partial: Path, out: Path) -> None:
    with disk_errors(out):
        for base, _, files in os.walk(partial, topdown=False):
            for name in files:
                sync(Path(base) / name)
            sync(Path(base))
        if os.path.lexists(out):
            raise BadInput(f"{out}: appeared meanwhile; the finished result is in {partial}")
        faults.rename(partial, out)
        sync(out.absolute().parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full, over quota, read-only or forbidden into one line of `BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BadInput(f"{path}: {error.strerror}; free some space or choose another disk") from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise BadInput(f"{error.filename or path}: {error.strerror}; choose another output folder") from None
        raise


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a checkpoint's folder, refused if it leads out of it (into the hub cache's blobs, it may)."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise BadInput(f"{folder}: file name {name!r} leads out of the folder; the checkpoint is not to be trusted")
    try:
        home, real = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "cannot be resolved"
        raise BadInput(f"{folder / name}: {reason}; the checkpoint is incomplete, fetch it again") from None
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise BadInput(f"{folder / name}: is a link out of the folder; the checkpoint is not to be trusted")
    return folder / name


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(_inside(index.parent, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: has no weight_map; fetch the checkpoint again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file:
            raise BadInput(
                f"{index}: weight_map gives {reprlib.repr(name)} to {reprlib.repr(file)}, which is no safetensors file "
                "of this folder"
            )
    return weight_map


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is given twice")
        return made

    try:
        value = json.loads(raw.decode(), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what}: not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{what}: not a JSON object; fetch the checkpoint again")
    return value


def _as_bf16(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    shards: dict[str, list[TensorInfo]],
) -> tuple[dict[str, TensorInfo], dict[str, list[TensorInfo]]]:
    """The tensors and shards with block-scaled FP8 weights as the bf16 that they stand for, and without the scales."""
    block, made, scales = fp8_block(config), dict(tensors), set[str]()
    assert block is not None
    for name, info in tensors.items():
        scale = tensors.get(name + _SCALE)
        if info.dtype != torch.float8_e4m3fn or scale is None:
            continue
        wanted = tuple(-(-size // part) for size, part in zip(info.shape, block, strict=False))
        if len(info.shape) != 2 or scale.shape != wanted or scale.dtype not in (torch.float32, torch.bfloat16):
            raise BadInput(
                f"{folder}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}, which does not scale {name!r} "
                f"{list(info.shape)} in blocks of {block[0]} × {block[1]}; the checkpoint does not fit its config.json"
            )
        bf16 = torch.bfloat16
        nbytes = math.prod(info.shape) * bf16.itemsize
        made[name] = replace(info, dtype=bf16, nbytes=nbytes, scaled=Scaled(info.dtype, scale, block))
        scales.add(scale.name)
    for name in scales:
        del made[name]
    kept = {file: [made[info.name] for info in infos if info.name in made] for file, infos in shards.items()}
    return made, {file: infos for file, infos in kept.items() if infos}


def _multiply(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first: int, out: torch.Tensor
) -> torch.Tensor:
    """`out` [rows, columns] = FP8 values, row `first` of a tensor and those behind it, times their blocks' scales."""
    rows, columns = min(block[0], first + len(values)), max(min(block[1], values.shape[1]), 1)
    wide = scales.float().repeat_interleave(columns, dim=1)[:, : values.shape[1]]
    at = 0
    while at < len(values):
        to = min((first + at) // rows * rows + rows - first, len(values))
        out[at:to] = values[at:to].float() * wide[(first + at) // rows]
        at = to
    return out


def _tensor_info(file: Path, start: int, name: str, entry: Any) -> TensorInfo:
    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 62 for x in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{file}: tensor {name!r} needs dtype, shape and data_offsets; the file is damaged")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise BadInput(f"{file}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if isinstance(shape, list) and len(shape) > _MAX_RANK:
        raise BadInput(
            f"{file}: tensor {reprlib.repr(name)} has {len(shape):,} dimensions, more than {_MAX_RANK}; "
            "the file is damaged"
        )
    if not counts(shape) or not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"{file}: tensor {name!r} has a shape or offsets that make no sense; the file is damaged")
    nbytes = offsets[1] - offsets[0]
    # Of a shape with a 0 in it, too, all sizes together have to fit: strides are products of them.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise BadInput(f"{file}: tensor {name!r} has a shape {shape} beyond 64 bits; the file is damaged")
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise BadInput(f"{file}: tensor {name!r} has shape {shape} but {nbytes} bytes; the file is damaged")
    return TensorInfo(name, file, dtype, tuple(shape), start + offsets[0], nbytes)


def _layout(file: Path, infos: list[TensorInfo]) -> tuple[bytes, dict[str, TensorInfo]]:
    """Header of an output file and the places of its tensors in it."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in infos:
        offsets = [at, at := at + info.nbytes]
        entries[info.name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": info.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {
        info.name: TensorInfo(
            info.name, file, info.dtype, info.shape, start + entries[info.name]["data_offsets"][0], info.nbytes
        )
        for info in infos
    }
    return len(text).to_bytes(8, "little") + text, places


def _reserve(file: Path, header: bytes, size: int) -> None:
    with _opened(file, os.O_WRONLY | os.O_CREAT) as fd:
        faults.truncate(fd, min(size, os.fstat(fd).st_size))
        faults.reserve(fd, 0, size)
        write_at(fd, header, 0)


@contextmanager
def _opened(file: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    # A pipe that nobody writes to would be waited for, without O_NONBLOCK; to regular files it means nothing.
    fd = os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _regular(fd: int, file: Path) -> os.stat_result:
    """The status of a regular file; `BadInput` for anything else."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{file}: is no regular file; the checkpoint is not to be trusted")
    return status


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_into(fd: int, file: Path, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = faults.preadv(fd, [target[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise BadInput(f"{file}: ends before byte {offset + len(target)}; it was cut short, fetch it again")
        done += count


def _read_at(fd: int, file: Path, offset: int, count: int) -> bytearray:
    data = bytearray(count)
    _read_into(fd, file, offset, memoryview(data))
    return data


def _pieces(file: Path, offset: int, count: int) -> Iterator[memoryview]:
    """Runs of a file's bytes, one after the other in the same memory."""
    memory = memoryview(pages(min(_PIECE, count) or 1))
    with _opened(file) as fd:
        for at in range(0, count, _PIECE):
            piece = memory[: min(_PIECE, count - at)]
            _read_into(fd, file, offset + at, piece)
            yield piece


def _pieces_of(info: TensorInfo) -> Iterator[memoryview]:
    """Runs of a tensor's bytes, of FP8 those of the bf16 that it stands for: never much more of it than a run."""
    if info.scaled is None:
        yield from _pieces(info.file, info.offset, info.nbytes)
        return
    rows = info.shape[0]
    block = info.scaled.block[0]
    # Whole blocks of rows, so that none is multiplied in two parts.
    step = max(_PIECE * rows // max(info.nbytes, 1) // block, 1) * block
    for first in range(0, rows, step):
        yield bytes_of(read_tensor(info, (first, min(first + step, rows))))


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether a run of a tensor's bytes holds no NaN and no Inf."""
    if not len(data):
        return True
    return all_finite(torch.frombuffer(data, dtype=dtype))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf, by its smallest and largest values: nothing of its size is made."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16)
    return bool(torch.stack(wide.aminmax()).isfinite().all())


class _Locked(mmap.mmap):
    """Pages that `unlock` is told of before they are unmapped: a finalizer would come after, when the next mapping may
    have their address already."""

    unlock: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unlock is not None:
            self.unlock()


def pages(count: int, pin: bool = False) -> mmap.mmap:
    """Memory outside of the heap: it goes back to the system when it is let go, in whatever thread that is.

    With `pin` it is page-locked, for copies beside a GPU's work: torch's own pinned memory comes in powers of two and
    is not given back, which no plan of memory can bear.
    """
    memory = _Locked(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pin:
        cudart: Any = torch.cuda.cudart()
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, count, 0)))
        memory.unlock = lambda: cudart.cudaHostUnregister(address)
    return memory


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """All of `data`, in as many writes as it takes."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += faults.pwrite(fd, view[done : done + (1 << 30)], offset + done)


def _sha256_range(file: Path, offset: int, count: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(file, offset, count):
        digest.update(piece)
    return digest.hexdigest()
