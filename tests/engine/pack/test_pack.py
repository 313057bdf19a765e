"""Packed folders: what `rac pack` writes, what reads it, what `rac unpack` gives back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from rac_engine.checkpoint.header import TensorInfo, read_header
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.engine.verify import verify
from rac_engine.pack.beside import packed_card, plain_card
from rac_engine.pack.packing import pack
from rac_engine.pack.sizes import load_report
from rac_engine.pack.unpacking import unpack
from tests import tiny
from tests.engine.pruned import pruned


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of `rac prune`, with a matrix that is left dense."""
    folder = tmp_path_factory.mktemp("pack")
    model = tiny.save(folder / "model", "qwen2")
    words = ["prune", str(model), str(folder / "out"), "--method", "magnitude", "--sparsity", "0.6"]
    assert main([*words, "--dense", "model.layers.0.mlp.down_proj"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    pack(source, source.parent / "packed")
    return source.parent / "packed"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    out = Path(words[2])
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return told[0]


def test_a_job_s_output_comes_back_byte_for_byte(source: Path, packed: Path, tmp_path: Path) -> None:
    report = load_report(packed)
    assert report is not None and report.exact and report.values == "same"
    assert unpack(packed, tmp_path / "plain").tensors == report.matrices
    assert contents(tmp_path / "plain") == contents(source)


def test_a_packed_folder_is_smaller_and_says_what_it_is(source: Path, packed: Path) -> None:
    report = load_report(packed)
    assert report is not None
    names = {info.name: info for file in packed.glob("*.safetensors") for info in read_header(file)}
    dense = Checkpoint.open(source)
    assert names.keys() == dense.tensors.keys()
    small = {name for name, info in names.items() if info.dtype == torch.uint8}
    assert len(small) == report.matrices and all(len(names[name].shape) == 1 for name in small)
    assert all(names[name].nbytes < dense.tensors[name].nbytes for name in small)
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.packed == sum(info.nbytes for info in names.values())
    assert report.packed < report.dense and report.dense > report.deflated
    assert sorted(index["weight_map"]) == list(index["weight_map"])
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "rac", "version": 1, "values": "same"}
    assert "## Packed" in (packed / "README.md").read_text()
    assert "stay" not in report.summary() and "W4 alone" in report.summary() and "zip" in report.summary()


def test_all_that_reads_checkpoints_reads_packed_ones(source: Path, packed: Path) -> None:
    here, there = Checkpoint.open(packed), Checkpoint.open(source)
    for name, info in there.tensors.items():
        assert (here.tensors[name].dtype, here.tensors[name].shape) == (info.dtype, info.shape)
        assert torch.equal(here.read(name), there.read(name))
        if len(info.shape) == 2:
            assert torch.equal(here.read(name, (1, 3)), there.read(name, (1, 3)))
    assert verify(packed).problems == []
    assert verify(packed, source.parent / "model").problems == []


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_packed_as_they_are_stored(tmp_path: Path, family: str) -> None:
    """Each one by itself, or all in one tensor."""
    folder = pruned(tmp_path / "model", family)
    report = pack(folder, tmp_path / "packed")
    assert report.exact and report.matrices
    unpack(tmp_path / "packed", tmp_path / "plain")
    made = Checkpoint.open(tmp_path / "packed")
    for name, info in Checkpoint.open(folder).tensors.items():
        assert torch.equal(made.read(name), Checkpoint.open(folder).read(name))
        if len(info.shape) == 3:
            assert torch.equal(made.read(name, (1, 2)), made.read(name)[1:2])


def test_int4_on_a_grid_is_lossless_and_off_it_verified(source: Path, tmp_path: Path) -> None:
    report = pack(pruned(tmp_path / "grid", grid=True), tmp_path / "packed", "int4")
    assert report.exact and report.error == 0
    unpack(tmp_path / "packed", tmp_path / "plain")
    there, again = Checkpoint.open(tmp_path / "grid"), Checkpoint.open(tmp_path / "plain")
    for name in there.tensors:
        assert again.tensors[name].quantized is None
        assert torch.equal(again.read(name), there.read(name))


def test_rounded_matrices_are_what_journal_and_metrics_say(tmp_path: Path) -> None:
    words = ["prune", str(tiny.save(tmp_path / "model")), str(tmp_path / "out"), "--method", "magnitude"]
    assert main([*words, "--sparsity", "0.6"]) == 0
    report = pack(tmp_path / "out", tmp_path / "packed", "int4")
    assert not report.exact and 0.001 < report.error < 0.2 and "rounded" in report.summary()
    assert verify(tmp_path / "packed").problems == []
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert verify(tmp_path / "plain").problems == []


def test_what_is_not_to_be_packed(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert "is packed already" in refused(["pack", str(packed), out], capsys)
    assert "was left dense" in refused(["pack", str(source), out, "--values", "int4"], capsys)
    assert "no matrix has zeros enough" in refused(["pack", str(source.parent / "model"), out], capsys)
    assert "is not packed" in refused(["unpack", str(source), out], capsys)
    assert "config.json" in refused(["pack", str(source.parent), out], capsys)
    assert "no such folder" in refused(["unpack", str(tmp_path / "none"), out], capsys)
    quantized = tmp_path / "fp8"
    shutil.copytree(source, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "quantized (FP8" in refused(["pack", str(quantized), out], capsys)


def test_damaged_folders_are_refused(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")

    def damaged(name: str, at: int, value: int) -> str:
        shutil.copytree(packed, tmp_path / name)
        file = next(file for file in sorted(packed.glob("*.safetensors")) if any(_small(file)))
        info = _small(file)[0]
        with (tmp_path / name / file.name).open("r+b") as stream:
            stream.seek(info.offset + at)
            stream.write(bytes([value]))
        return refused(["unpack", str(tmp_path / name), out], capsys)

    assert "version 9; this release knows version 1" in damaged("version", 8, 9)
    assert "contradicts its mask" in damaged("index", 64 + 4, 200)
    assert "values, and its header says" in damaged("mask", 64 + 384, 255)  # behind the index of 80 rows
    assert "bits beyond column 48" in damaged("beyond", 64 + 384 + 6, 1)
    assert "bytes, and header and row index ask for" in damaged("rows", 17, 200)
    assert "does not begin as a packed matrix" in damaged("magic", 0, 0)
    assert any("contradicts its mask" in problem for problem in verify(tmp_path / "index").problems)
    newer = tmp_path / "newer"
    shutil.copytree(packed, newer)
    text = (newer / "config.json").read_text()
    (newer / "config.json").write_text(text.replace('"version": 1', '"version": 2'))
    assert "version '2'" in refused(["unpack", str(newer), out], capsys)


def _small(file: Path) -> list[TensorInfo]:
    return [info for info in read_header(file) if info.dtype == torch.uint8]


def test_a_card_of_someone_else_s_keeps_its_words(packed: Path) -> None:
    report = load_report(packed)
    assert report is not None
    for card in ("# Mine\n\n## Use\n\nso\n", "# Mine"):
        made = packed_card(card, report)
        assert "## Packed" in made
        assert plain_card(made).split() == card.split()
