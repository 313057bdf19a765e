"""A checkpoint's folder: config, index and shards, checked before anything in them is believed."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rac_engine.base.errors import BadInput, Damaged
from rac_engine.base.files import opened, read_small
from rac_engine.checkpoint.formats import find_format
from rac_engine.checkpoint.header import TensorInfo, read_config, read_header
from rac_engine.checkpoint.quantized import presented, without_sections
from rac_engine.checkpoint.tensors import bytes_of, is_finite, pieces_of, read_tensor
from rac_engine.jobs.layout import CARD, RAC

INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"

# What other tools would take for weights: pickles are never opened nor passed on, and an engine loads every
# *.safetensors at the top of a folder.
_WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".onnx"),
    *(".gguf", ".ggml", ".ot", ".tflite", ".index.json"),
)

_QUANTIZED = "hf_quant_config.json"  # by which engines take the weights beside it for quantized ones


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, one file or shards with an index. Made by `open`.

    Quantized weights (see `formats`) are read as bf16, and a copy of the checkpoint has them as bf16; what scales them
    does not appear among `tensors`.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, list[TensorInfo]]
    """Tensors of each weight file in the order of their bytes, by file name."""
    left_out: int = 0
    """Scales of quantized activations and caches, which lie beside quantized weights and are not among `tensors`."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check config, index and headers.

        Raises `BadInput` for a folder that is missing or incomplete, for an index that leads out of it, and for a
        header whose names, dtypes, shapes and offsets do not describe exactly the file's bytes.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
        config = read_config(inside(folder, "config.json"))
        if "transformers_weights" in config:
            raise BadInput(
                f"{folder / 'config.json'}: transformers_weights would let transformers load other weights than are "
                "read here; remove the key"
            )
        for name in other_files(folder):
            if os.path.exists(folder / name) and not os.path.isfile(folder / name):
                raise BadInput(f"{folder / name}: is no regular file; the checkpoint is not to be trusted")
            if os.path.isfile(folder / name):
                with opened(folder / name):  # what may not be read is told now, not when it is copied
                    pass
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
            raise BadInput(f"{folder}: neither {SINGLE} nor {INDEX}{_without_index(folder)}")
        shards = {file: read_header(inside(folder, file)) for file in files}
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
        if (form := find_format(config)) is None:
            return cls(folder, config, tensors, shards)
        shards, left_out = presented(folder, form, shards)
        return cls(folder, config, {info.name: info for infos in shards.values() for info in infos}, shards, left_out)

    def copied_file(self, name: str) -> bytes:
        """Bytes of a file beside the weights as a copy of the checkpoint has it: its weights are not quantized."""
        if name == "config.json" and find_format(self.config) is not None:
            return (json.dumps(without_sections(self.config), indent=2, ensure_ascii=False) + "\n").encode()
        return read_small(inside(self.path, name), 1 << 62)

    def read(
        self, name: str, rows: tuple[int, int] | None = None, pin: bool = False, verify: bool = True
    ) -> torch.Tensor:
        """The tensor (or its rows from `rows[0]` up to `rows[1]`) in its own dtype, on the CPU, pinned with `pin`.

        Once `sha256` has been computed, a whole tensor is compared with what it was then (see `check_unchanged`),
        unless it is not to be verified: one that is read over and over was, the first time.
        """
        tensor = read_tensor(self.tensors[name], rows, pin)
        if rows is None and verify:
            self.check_unchanged(name, bytes_of(tensor))
        return tensor

    def check_unchanged(self, name: str, read: Any) -> None:
        """Raise `Damaged` if a tensor's bytes or their digest (`read`) are not those that `sha256` has seen."""
        if "_content" in self.__dict__:
            digest = read if hasattr(read, "hexdigest") else hashlib.sha256(read)
            if digest.hexdigest() != self._content[name][0]:
                raise Damaged(
                    f"{self.tensors[name].file}: {name!r} was read twice, with other bytes the second time; the file "
                    "was changed meanwhile, or disk or memory fail"
                )

    def sha256(self) -> str:
        """SHA-256 over config.json and the name, dtype, shape and SHA-256 of every tensor.

        Computed once, with all cores; from then on what is read is compared with it.
        """
        config = json.dumps(self.config, sort_keys=True)
        if config != json.dumps(read_config(inside(self.path, "config.json")), sort_keys=True):
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
            for piece in pieces_of(info):
                digest.update(piece)
                finite = finite and is_finite(piece, info.dtype)
            return digest.hexdigest(), finite

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(self.tensors, pool.map(one, self.tensors.values()), strict=True))


def other_files(folder: Path) -> list[str]:
    """The files beside the weights that belong to a checkpoint, relative to `folder`.

    Left out: weights in any format and what says that they are quantized, hidden files, the model card (the pruned
    model has its own), and `rac/`.
    """
    found = []
    for base, folders, files in os.walk(folder):
        relative = Path(base).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (relative / name) != Path(RAC))
        found += [
            str(relative / name)
            for name in sorted(files)
            if not name.startswith(".")
            and not name.lower().endswith(_WEIGHT_FILES)
            and str(relative / name) not in (CARD, _QUANTIZED)
        ]
    return found


def inside(folder: Path, name: str) -> Path:
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
        mend = "the checkpoint is not to be trusted"
        if name.endswith(".safetensors"):
            mend = f"to {real}; put the weights themselves here, or hard links to them (ln -f), if you trust them"
        raise BadInput(f"{folder / name}: is a link out of the folder, {mend}")
    return folder / name


def _without_index(folder: Path) -> str:
    """What to do about a folder that has no weights by a name that is known, by those that it has."""
    names = sorted(entry.name for entry in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return (
            f", though {len(shards)} of its files are safetensors ({shards[0]}, …); fetch the index from where they "
            f"are from, or rename a single file to {SINGLE}"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"; {pickles[0]} is a pickle, which is never loaded; convert it where you trust it, with transformers: "
            "from_pretrained(…).save_pretrained(…)"
        )
    if packed := [name for name in names if name.endswith((".gguf", ".ggml"))]:
        return f"; {packed[0]} is in llama.cpp's format; fetch the checkpoint that it was made from"
    return "; only safetensors checkpoints are read"


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by an index; `BadInput` for files that are not safetensors of its folder."""
    weight_map = read_config(inside(index.parent, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: has no weight_map; fetch the checkpoint again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file:
            raise BadInput(
                f"{index}: weight_map gives {reprlib.repr(name)} to {reprlib.repr(file)}, which is no safetensors file "
                "of this folder"
            )
    return weight_map
