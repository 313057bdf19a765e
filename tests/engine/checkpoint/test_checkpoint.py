"""Checkpoints as files: what is read, what is refused, what is written."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_engine.base import faults, files
from rac_engine.base.errors import BadInput
from rac_engine.base.files import copy_file
from rac_engine.checkpoint.header import read_header
from rac_engine.checkpoint.reader import INDEX, Checkpoint, other_files
from rac_engine.checkpoint.tensors import read_tensor
from rac_engine.checkpoint.writer import CheckpointWriter
from rac_engine.jobs.publish import publish, write_manifest

Make = Callable[..., Path]


@pytest.fixture
def folder(checkpoint: Make, tmp_path: Path) -> Path:
    """A sharded checkpoint that may be damaged."""
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shard_size", ["40KB", "1GB"], ids=["shards", "single"])
def test_reads_what_safetensors_reads(checkpoint: Make, shard_size: str) -> None:
    folder = checkpoint("qwen2", shard_size=shard_size)
    opened, expected = Checkpoint.open(folder), load(folder)
    assert len(opened.shards) == (1 if shard_size == "1GB" else 4)
    assert opened.tensors.keys() == expected.keys()
    assert all(same_bits(opened.read(name), tensor) for name, tensor in expected.items())
    name = "model.embed_tokens.weight"
    assert same_bits(opened.read(name, rows=(3, 11)), expected[name][3:11])


def test_odd_tensors(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        'a "quoted" näme': torch.tensor([True, False]),
        "float8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = Checkpoint.open(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    CheckpointWriter(source, out).finish()
    assert {name: source.read(name).tolist() for name in source.tensors if name != "float8"} == {
        name: tensor.tolist() for name, tensor in tensors.items() if name != "float8"
    }
    written = load_file(out / "model.safetensors")
    assert all(same_bits(written[name].reshape(-1), tensor.reshape(-1)) for name, tensor in tensors.items())


@pytest.mark.parametrize("shard_size", ["40KB", "1GB"], ids=["shards", "single"])
def test_untouched_checkpoint_is_written_back_byte_by_byte(checkpoint: Make, tmp_path: Path, shard_size: str) -> None:
    folder = checkpoint("llama", shard_size=shard_size)
    CheckpointWriter(Checkpoint.open(folder), tmp_path).finish()
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert shards == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    for name in [*shards, "config.json", "generation_config.json"]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    if shard_size != "1GB":
        there, here = (json.loads((path / INDEX).read_text()) for path in (folder, tmp_path))
        assert here["weight_map"] == there["weight_map"]
        assert here["metadata"]["total_size"] == there["metadata"]["total_size"]


def test_writer_puts_tensors_in_their_place_and_tells_their_digest(folder: Path, tmp_path: Path) -> None:
    source, out = Checkpoint.open(folder), tmp_path / "out"
    out.mkdir()
    writer = CheckpointWriter(source, out)
    name = "model.layers.1.mlp.up_proj.weight"
    new = torch.randn(80, 48).bfloat16()
    digest = writer.write(name, new)
    assert digest == hashlib.sha256(new.view(torch.uint8).numpy().tobytes()).hexdigest()
    other = "model.norm.weight"
    assert writer.copy(other) == hashlib.sha256(source.read(other).view(torch.uint8).numpy().tobytes()).hexdigest()
    writer.finish()
    expected = load(folder) | {name: new}
    written = load(out)
    assert written.keys() == expected.keys()
    assert all(same_bits(written[key], tensor) for key, tensor in expected.items())

    # A later writer takes over what is whole, and only that.
    again = CheckpointWriter(source, out)
    kept = again.reuse(name, digest)
    assert kept is not None and same_bits(kept, new)
    assert again.reuse(other, digest) is None


def test_writer_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    writer = CheckpointWriter(Checkpoint.open(folder), out)
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong in (torch.zeros(80, 48), torch.zeros(48, 80).bfloat16(), torch.full((80, 48), torch.nan).bfloat16()):
        with pytest.raises(ValueError, match="up_proj"):
            writer.write(name, wrong)


def test_shards_are_renamed_to_the_usual_names(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    save_file({"b": torch.ones(2)}, model / "zz.safetensors")
    save_file({"a": torch.zeros(3)}, model / "aa.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "aa.safetensors", "b": "zz.safetensors"}}))
    (model / "config.json").write_text("{}")
    CheckpointWriter(Checkpoint.open(model), out).finish()
    assert json.loads((out / INDEX).read_text()) == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    assert sorted(file.name for file in out.iterdir() if file.suffix == ".safetensors") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_other_files_are_copied_and_weights_in_other_formats_are_not(folder: Path, tmp_path: Path) -> None:
    kept = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "extra/readme.txt", "LICENSE"]
    left = ["pytorch_model.bin", "old.pt", "stray.safetensors", "original/consolidated.00.pth", "rac/metrics.jsonl"]
    left += ["README.md", ".git/config", ".hidden", "x.gguf", "pytorch_model.bin.index.json", "model.PKL"]
    for name in kept + left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "stray.safetensors").unlink()
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    assert set(other_files(folder)) == {*kept, "config.json", "generation_config.json"}
    out = tmp_path / "out"
    out.mkdir()
    CheckpointWriter(Checkpoint.open(folder), out).finish()
    for name in kept:
        assert (out / name).read_text() == name
    assert not any((out / name).exists() for name in left)


def raw_file(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


BAD_HEADERS = {
    "hole": {"a": entry(0, 4), "b": entry(5, 8)},
    "overlap": {"a": entry(0, 5), "b": entry(4, 8)},
    "same bytes": {"a": entry(0, 8), "b": entry(0, 8)},
    "past the end": {"a": entry(0, 9)},
    "trailing bytes": {"a": entry(0, 7)},
    "late start": {"a": entry(1, 8)},
    "shape too small": {"a": entry(0, 8, [7])},
    "shape overflows": {"a": entry(0, 8, [1 << 33, 1 << 33])},
    "shape beyond 64 bits": {"a": entry(0, 8, [8, 1 << 70])},
    "negative shape": {"a": entry(0, 8, [-8])},
    "shape of text": {"a": entry(0, 8, ["8"])},
    "shape of booleans": {"a": entry(0, 8, [True, 8])},
    "backward offsets": {"a": {"dtype": "U8", "shape": [0], "data_offsets": [8, 0]}},
    "unknown dtype": {"a": entry(0, 8, dtype="F7")},
    "dtype no text": {"a": {"dtype": [], "shape": [8], "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [8]}},
    "extra field": {"a": {**entry(0, 8), "more": 1}},
    "entry no object": {"a": 3},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_header_must_account_for_every_byte_once(tmp_path: Path, header: dict[str, Any]) -> None:
    file = tmp_path / "x.safetensors"
    raw_file(file, json.dumps({"a": entry(0, 3), "b": entry(3, 8)}).encode(), bytes(8))
    assert [info.name for info in read_header(file)] == ["a", "b"]
    raw_file(file, json.dumps(header).encode(), bytes(8))
    with pytest.raises(BadInput, match=r"x\.safetensors"):
        read_header(file)


TWIN = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BAD_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header past the end": struct.pack("<Q", 3) + b"{}",
    "huge header": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"{]",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "a list": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "duplicate keys": struct.pack("<Q", 3 + 2 * len(TWIN)) + b"{" + TWIN + b"," + TWIN + b"}",
}


def test_shapes_with_no_element_keep_to_64_bits_and_to_64_dimensions(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for shape, said in (
        ([0, 1 << 40, 1 << 40], "beyond 64 bits"),
        ([1 << 61, 1 << 61, 0], "beyond 64 bits"),
        ([0] * 65, "65 dimensions"),
        ([(1 << 62) - 1] * 200_000, "200,000 dimensions"),
    ):
        raw_file(file, json.dumps({"a": entry(0, 0, shape)}).encode())
        began = time.process_time()
        with pytest.raises(BadInput, match=said):
            read_header(file)
        assert time.process_time() - began < 2
    raw_file(file, json.dumps({"a": entry(0, 0, [0] * 64)}).encode())
    assert read_tensor(read_header(file)[0]).shape == (0,) * 64


@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_checkpoint_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    if name == "model.safetensors":
        (folder / INDEX).unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(BadInput, match=r"is no regular file"):
        Checkpoint.open(folder)
    with pytest.raises(BadInput, match=r"is no regular file"):
        copy_file(folder / name, folder / "copy")


def test_weights_by_another_name_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(BadInput, match="transformers_weights would let transformers load other weights"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"x\.safetensors"):
        read_header(file)


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "/tmp/x.safetensors",
        "../x.safetensors",
        "a/b.safetensors",
        "model.bin",
        "",
        3,
        None,
        "a\0.safetensors",
    ],
)
def test_weight_map_may_name_only_safetensors_of_the_folder(folder: Path, file: Any) -> None:
    change_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    with pytest.raises(BadInput):
        Checkpoint.open(folder)


def test_index_and_shards_must_agree(folder: Path) -> None:
    fresh = (folder / INDEX).read_text()
    change_index(folder, lambda index: index["weight_map"].update(ghost="model-00001-of-00004.safetensors"))
    with pytest.raises(BadInput, match="ghost"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(fresh)
    change_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(fresh.replace('"weight_map"', '"weight_map": {}, "weight_map"'))
    with pytest.raises(BadInput, match="twice"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(BadInput, match="weight_map"):
        Checkpoint.open(folder)


def test_stale_single_file_beside_an_index_is_refused(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="stale"):
        Checkpoint.open(folder)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00004"):
        Checkpoint.open(folder)
    (folder / INDEX).unlink()
    with pytest.raises(BadInput, match="neither"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-00001-of-00002.safetensors", "1 of its files are safetensors .*fetch the index"),
        ("pytorch_model.bin", "is a pickle, which is never loaded; convert it"),
        ("q4.gguf", "llama.cpp's format"),
        ("x.txt", "only safetensors checkpoints are read"),
    ],
)
def test_what_a_folder_without_weights_has_instead(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=f"neither .*{said}"):
        Checkpoint.open(tmp_path)


def test_links_may_not_leave_the_folder_except_into_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00004.safetensors"
    hub = tmp_path / "models--x--y"
    snapshot, blobs = hub / "snapshots" / "abc", hub / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert Checkpoint.open(snapshot).tensors.keys() == Checkpoint.open(folder).tensors.keys()

    shutil.move(folder / shard, tmp_path / "elsewhere.safetensors")
    (folder / shard).symlink_to("../elsewhere.safetensors")
    with pytest.raises(
        BadInput, match=r"link out of the folder, to .*elsewhere\.safetensors; put the weights themselves"
    ):
        Checkpoint.open(folder)
    (folder / shard).unlink()
    shutil.move(tmp_path / "elsewhere.safetensors", folder / shard)
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BadInput, match="link out of the folder"):
        CheckpointWriter(Checkpoint.open(folder), out)
    assert not (out / "tokenizer.json").exists()


def test_file_that_shrinks_under_us_is_noticed(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    os.truncate(folder / "model-00001-of-00004.safetensors", 1000)
    with pytest.raises(BadInput, match="cut short"):
        opened.read("model.embed_tokens.weight")


def test_sha256_sees_every_byte(folder: Path) -> None:
    before = Checkpoint.open(folder).sha256()
    assert Checkpoint.open(folder).sha256() == before
    file = folder / "model-00003-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert Checkpoint.open(folder).sha256() != before


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10 kB: what is asked for beyond that fails as on a full disk.

    Not a fixture: its limit would still hold when pytest writes the test's outcome, perhaps into a file that is larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_space_is_taken_before_anything_is_written(checkpoint: Make, tmp_path: Path) -> None:
    CheckpointWriter(Checkpoint.open(checkpoint("qwen2")), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        assert file.stat().st_size == (checkpoint("qwen2") / file.name).stat().st_size
        assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_full_disk_shows_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with full_disk(), pytest.raises(BadInput, match="free some space"):
        CheckpointWriter(Checkpoint.open(folder), out)


@pytest.mark.parametrize("when", ["rename", "fsync"])
def test_an_interruption_once_the_output_is_there_comes_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    partial.mkdir()
    (partial / "file").write_text("all of it")
    done = getattr(faults, when)

    def interrupted(*args: Any) -> None:
        done(*args)
        if when == "rename" or out.exists():
            monkeypatch.setattr(faults, when, done)
            raise KeyboardInterrupt

    monkeypatch.setattr(faults, when, interrupted)
    publish(partial, out)
    assert (out / "file").read_text() == "all of it" and not partial.exists()


def test_an_interruption_before_the_output_is_there_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    partial = tmp_path / "out.partial"
    partial.mkdir()
    monkeypatch.setattr(faults, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(partial, tmp_path / "out")
    assert partial.exists()


def test_manifest_and_publication(folder: Path, tmp_path: Path) -> None:
    (folder / "rac" / "eval").mkdir(parents=True)
    (folder / "rac" / "eval" / "dense.json").write_text("{}")
    (folder / "rac" / "recipe.yaml").write_text("model: x")
    write_manifest(folder)
    files = json.loads((folder / "rac" / "manifest.json").read_text())["files"]
    assert "rac/eval/dense.json" not in files
    assert files["rac/recipe.yaml"] == {"sha256": hashlib.sha256(b"model: x").hexdigest(), "size": 8}
    assert {"config.json", INDEX, "model-00001-of-00004.safetensors"} < files.keys()

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BadInput, match="appeared meanwhile"):
        publish(folder, out)
    out.rmdir()
    publish(folder, out)
    assert not folder.exists()
    assert (out / "rac" / "recipe.yaml").exists()


def test_pinned_pages_are_unlocked_while_they_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows them by their address, which the next mapping may get as soon as they are unmapped."""
    seen: list[bool] = []

    def mapped(address: int) -> bool:
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)

    class Driver:
        def cudaHostRegister(self, address: int, count: int, flags: int) -> int:
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            seen.append(mapped(address))

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    held = torch.frombuffer(files.pages(1 << 26, pin=True), dtype=torch.uint8)
    assert not seen
    del held
    assert seen == [True]
