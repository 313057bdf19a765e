"""Outputs and inputs in places where nothing can come of them: one line and exit code 2, before any work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.cli.app import main
from rac_engine.evaluation.job import evaluate
from rac_engine.jobs.claim import refuse_place
from rac_engine.recipe.settings import EvalSettings
from tests.permissions import forbidden

ABACUS = Path(__file__).parents[3] / "examples" / "abacus"
COMMANDS = ("prune", "trace", "eval", "run")

Refused = Callable[..., str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ABACUS, tmp_path / "model"))


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refused(
    tmp_path: Path, model: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs the command for an output, which is refused in one line with nothing left behind; gives the line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    (tmp_path / "r.yaml").write_text("model: model\nprune: {method: magnitude}\n")

    def run(out: str) -> str:
        words = {
            "prune": ["prune", "model", out, "--method", "magnitude"],
            "trace": ["trace", "model", "--out", out, "--prompts", "p.jsonl", "--max-new-tokens", "4"],
            "eval": ["eval", "model", "--out", out, "--problems", "p.jsonl", "--max-new-tokens", "4"],
            "run": ["run", "r.yaml", out],
        }[command]
        before = sorted(tmp_path.rglob("*"))
        code = main(["-q", *words])
        captured = capsys.readouterr()
        assert code == 2 and captured.out == "", captured.err
        assert captured.err.startswith("rac: error: ") and captured.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return run


@pytest.mark.parametrize("out", ["model", "model/out", "link/out", "model/../link/tokenizers/out", "link"])
def test_an_output_in_the_folder_of_the_model(refused: Refused, tmp_path: Path, out: str) -> None:
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "model/tokenizers").mkdir()
    said = refused(out)
    assert ("is the model's own folder" if out in ("model", "link") else "lies in the model's folder ") in said


@pytest.mark.parametrize("out", ["/proc/out", "p.jsonl/out"])
def test_an_output_where_nothing_can_be_made(refused: Refused, out: str) -> None:
    assert out.partition("/")[0] in refused(out)


def test_something_else_where_the_job_would_work(refused: Refused, tmp_path: Path, command: str) -> None:
    if command == "eval":
        (tmp_path / "out.partial").mkdir()
    else:
        (tmp_path / "out.partial").touch()
    assert "out.partial: is in the way, and no f" in refused("out")


def test_a_name_that_is_no_text(refused: Refused, model: Path) -> None:
    assert "not UTF-8" in refused(os.fsdecode(b"out\xff"))


def test_a_folder_whose_name_is_no_text(
    refused: Refused, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / os.fsdecode(b"here\xff")
    here.mkdir()
    for name in ("model", "p.jsonl", "r.yaml"):
        (here / name).symlink_to(tmp_path / name)
    monkeypatch.chdir(here)
    assert "not UTF-8" in refused("out")


@pytest.mark.parametrize("name", ["*.safetensors", "config.json", "chat_template.jinja"])
def test_a_file_of_the_model_that_may_not_be_read(refused: Refused, model: Path, name: str) -> None:
    file = next(model.glob(name))
    with forbidden(file):
        assert f"{file.name}: Permission denied" in refused("out")


@pytest.mark.parametrize("command", ["trace", "eval", "run"], indirect=True)
def test_an_input_that_may_not_be_read(refused: Refused, tmp_path: Path, command: str) -> None:
    file = "r.yaml" if command == "run" else "p.jsonl"
    with forbidden(tmp_path / file):
        assert f"{file}: Permission denied" in refused("out")


def test_answers_have_a_place_beside_a_model_that_was_pruned(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"problem": "Add 2 and 2.", "answer": "4"}\n')
    settings = EvalSettings(problems=tmp_path / "p.jsonl", max_new_tokens=2)
    assert evaluate(model, settings, model / "rac/eval/mine.json").path.is_file()


def test_a_model_where_the_job_would_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    moved = model.rename(tmp_path / "a.partial" / "model")
    with pytest.raises(BadInput, match="where this job would work"):
        refuse_place(tmp_path / "a", moved)
    refuse_place(tmp_path / "b", moved)
