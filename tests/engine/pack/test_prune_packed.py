"""`rac prune --pack`: the output is packed, without loss, read by every command, and the same after any kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.evaluation.job import evaluate
from rac_engine.jobs.layout import PACKED, PACKING, PRUNE_JOURNAL
from rac_engine.pack.packing import pack_output
from rac_engine.pack.sizes import load_report
from rac_engine.pack.unpacking import unpack
from rac_engine.plan.plan import make_plan
from rac_engine.recipe.settings import EvalSettings, PruneSettings, TraceSettings
from rac_engine.traces.generation import generate
from tests import tiny

ABACUS = Path(__file__).parents[3] / "examples/abacus"
INT4 = ["--values", "int4", "--sparsity", "0.7", "--chunk-tokens", "64"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers, problems, and two outputs: `plain` and `packed` by the job itself."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = AutoTokenizer.from_pretrained(ABACUS)
    tiny.save(home / "model", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ABACUS / name, home / "model" / name)
    lines = [json.dumps({"problem": f"Add {n} and {n}.", "answer": str(2 * n)}) for n in range(3)]
    (home / "problems.jsonl").write_text("\n".join(lines))
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return home


def pruned(home: Path, name: str, *more: str) -> Path:
    source = ["--calibration", f"text:{home / 'text.txt'}", "--sequence-length", "40"]
    assert main(["prune", str(home / "model"), str(home / name), *source, *INT4, *more]) == 0
    return home / name


@pytest.fixture(scope="module")
def plain(home: Path) -> Path:
    torch.set_num_threads(1)
    return pruned(home, "plain")


@pytest.fixture(scope="module")
def packed(home: Path) -> Path:
    torch.set_num_threads(1)
    return pruned(home, "packed", "--pack")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors*")}


def test_what_the_solver_put_on_a_grid_is_packed_and_comes_back_bit_for_bit(
    home: Path, plain: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `rac pack` behind the job and by the job itself, to the same weights."""
    assert main(["pack", str(plain), str(home / "later"), "--values", "int4"]) == 0
    assert "bits a weight (bit for bit)" in capsys.readouterr().out
    later, report = load_report(home / "later"), load_report(packed)
    assert later is not None and report is not None
    assert later.exact and later.error == 0 and report.exact and not report.off_grid
    assert weights(home / "later") == weights(packed) != weights(plain)
    for folder in (home / "later", packed):
        plainly = home / f"{folder.name} unpacked"
        assert unpack(folder, plainly).tensors == report.matrices
        assert weights(plainly) == weights(plain)
        assert main(["verify", str(folder), "--source", str(home / "model")]) == 0
    page = (packed / "rac/report.html").read_text()
    assert f"packed, {report.bits:.2f} bits a weight" in page and "W4 alone" in page
    assert "## Packed" in (packed / "README.md").read_text()
    assert not (packed / PACKED).exists() and not (packed / PACKING).exists()


def test_a_packed_output_answers_and_samples_as_the_plain_one(plain: Path, packed: Path, tmp_path: Path) -> None:
    problems = plain.parent / "problems.jsonl"
    rows, texts = [], []
    for folder in (plain, packed):
        out = tmp_path / folder.name
        evaluate(folder, EvalSettings(problems=problems, max_new_tokens=6), out.with_suffix(".json"))
        rows.append(json.loads(out.with_suffix(".json").read_text())["rows"])
        generate(folder, TraceSettings(prompts=problems, tokens=60, samples=1, max_new_tokens=6), out)
        columns = ["id", "text", "completion_token_ids"]
        texts.append([parquet.read_table(file, columns=columns).to_pylist() for file in sorted(out.glob("*.parquet"))])
    for row in [*rows[0], *rows[1]]:
        row.pop("seconds", None)
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert texts[0] == texts[1] and texts[0]


def test_the_command_says_the_sizes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "told"
    words = ["prune", str(home / "model"), str(out), "--method", "magnitude", "--sparsity", "0.8"]
    assert main([*words, "--pack", "--dry-run"]) == 0
    assert "output, packed" in capsys.readouterr().out and not out.exists()
    assert main([*words, "--pack"]) == 0
    report, told = load_report(out), capsys.readouterr().out
    assert report is not None and told.rstrip().endswith(report.summary())
    estimate = make_plan(home / "model", PruneSettings(sparsity=0.8, pack=True)).packed
    whole = sum(file.stat().st_size for file in out.glob("*.safetensors")) + (out / "tokenizer.json").stat().st_size
    assert estimate is not None and abs(estimate / whole - 1) < 0.05


# Without the command


class Killed(Exception):
    """Stands for whatever ends a job in the middle."""


def job(source: Path, out: Path, **changes: Any) -> None:
    settings = {"method": "magnitude", "sparsity": 0.8, "values": "int4", "pack": True, **changes}
    prune(source, out, PruneSettings(**settings), packer=pack_output)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times or the folder's name."""
    timed = {"rac/metrics.jsonl", "rac/manifest.json", "rac/pack.json", PRUNE_JOURNAL}
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if name in timed else path.read_bytes() for name, path in files.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    job(source, source.parent / "whole")
    return contents(source.parent / "whole")


def renames(monkeypatch: pytest.MonkeyPatch, stop_at: int, before: bool) -> list[Path]:
    """Count renames by where they lead, and stop the job at one of them."""
    seen, real = list[Path](), faults.rename

    def rename(old: Path, new: Path) -> None:
        seen.append(Path(new))
        stop = len(seen) - 1 == stop_at
        if stop and before:
            raise Killed
        real(old, new)
        if stop:
            raise Killed

    monkeypatch.setattr(faults, "rename", rename)
    return seen


def test_a_job_that_is_killed_while_it_packs_goes_on_to_the_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it says that the packed form is whole, in the midst of the moving, and before publication."""
    last = len(expected) + 1  # the packed form gets its name, then each file is moved, then OUT appears
    points = [(0, False), (3, False), (last, True)]
    for number, (at, before) in enumerate(points):
        out = tmp_path / str(number)
        renames(monkeypatch, at, before)
        with pytest.raises(Killed):
            job(source, out)
        monkeypatch.undo()
        assert not out.exists()
        job(source, out)
        assert contents(out) == expected
        assert verify(out, source).problems == []


def stop_at(word: str) -> Callable[[str], None]:
    def progress(line: str) -> None:
        if word in line:
            raise Killed

    return progress


def test_a_packing_half_done_is_done_again(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    settings, out = PruneSettings(method="magnitude", sparsity=0.8, values="int4", pack=True), tmp_path / "out"
    with pytest.raises(Killed):
        prune(source, out, settings, progress=stop_at("packing model.layers.0.mlp.up"), packer=pack_output)
    assert list((tmp_path / "out.partial" / PACKING).iterdir())
    job(source, out)
    assert contents(out) == expected


def test_a_packed_form_that_was_damaged_meanwhile_is_made_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renames(monkeypatch, len(expected) // 2, False)
    with pytest.raises(Killed):
        job(source, tmp_path / "out")
    monkeypatch.undo()
    partial = tmp_path / "out.partial"
    for file in partial.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    job(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_nothing_is_rounded_that_is_on_no_grid(source: Path, tmp_path: Path) -> None:
    """A matrix that was left dense, and those of a job whose values are integers with zeros beside."""
    job(source, tmp_path / "plain", pack=False, dense=["down_proj"])
    job(source, tmp_path / "out", dense=["down_proj"])
    report = load_report(tmp_path / "out")
    assert report is not None and report.exact and len(report.as_they_are) == 1
    assert pack_output(tmp_path / "plain", _empty(tmp_path / "int8"), tmp_path / "x", "int8", lambda _: None)
    here, there = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "out")
    again = Checkpoint.open(tmp_path / "int8")
    for name in here.tensors:
        assert torch.equal(here.read(name), there.read(name))
        assert torch.equal(here.read(name), again.read(name))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_where_nothing_becomes_smaller_the_output_is_plain(source: Path, tmp_path: Path) -> None:
    noted: list[str] = []
    settings = PruneSettings(method="magnitude", sparsity=0.0, pack=True)
    prune(source, tmp_path / "out", settings, note=noted.append, packer=pack_output)
    assert any("plain weights" in note for note in noted)
    assert load_report(tmp_path / "out") is None and verify(tmp_path / "out", source).problems == []
    assert not (tmp_path / "out" / PACKING).exists()
    with pytest.raises(ValueError, match="packer"):
        prune(source, tmp_path / "none", settings)


def test_room_for_both_forms_is_asked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("rac_engine.checkpoint.writer.require_space", lambda _, wanted: asked.append(wanted))
    for pack in (False, True):
        job(source, tmp_path / str(pack), pack=pack)
    report = load_report(tmp_path / "True")
    assert report is not None and 0.9 < (asked[1] - asked[0]) / report.packed < 1.1


def test_another_form_is_another_job(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renames(monkeypatch, 0, True)
    with pytest.raises(Killed):
        job(source, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(BadInput, match=r"settings\.pack"):
        job(source, tmp_path / "out", pack=False)
