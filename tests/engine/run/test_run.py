"""`rac run`: the whole job in one folder, by steps that are never done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_engine.base import faults
from rac_engine.base.console import Console
from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.checkpoint.packed import is_packed
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.engine.metrics import load_metrics
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.evaluation.job import evaluate
from rac_engine.jobs.steps import step_times
from rac_engine.pack.sizes import load_report
from rac_engine.recipe.files import dump, load_recipe
from rac_engine.recipe.settings import Recipe
from rac_engine.run import steps as module
from rac_engine.run.job import RunResult, run
from tests import tiny

ABACUS = Path(__file__).parents[3] / "examples/abacus"
STEPS = [
    "traces",
    "answers of the dense model",
    "prune main",
    "answers of main",
    "prune text",
    "answers of text",
    "prune light",
    "answers of light",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model that has the example's tokenizer, prompts, problems and text."""
    home = tmp_path_factory.mktemp("home")
    tokens = len(AutoTokenizer.from_pretrained(ABACUS))
    ends = AutoTokenizer.from_pretrained(ABACUS).eos_token_id
    tiny.save(home / "model", vocab_size=tokens, eos_token_id=ends, initializer_range=0.02)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ABACUS / name, home / "model" / name)
    for name, first in (("prompts", 0), ("problems", 100)):
        lines = [json.dumps({"problem": f"Add {n} and {n}.", "answer": str(2 * n)}) for n in range(first, first + 6)]
        (home / f"{name}.jsonl").write_text("\n".join(lines))
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return home


def recipe(home: Path, **changes: Any) -> Recipe:
    sections = {
        "model": "model",
        "name": "main",
        "trace": {"prompts": "prompts.jsonl", "tokens": 200, "samples": 1, "max_new_tokens": 12},
        "evaluate": {"problems": "problems.jsonl", "limit": 3, "max_new_tokens": 8},
        "compare": [
            {"name": "text", "calibration": {"source": "text:text.txt", "tokens": 100, "sequence_length": 50}},
            {"name": "light", "prune": {"method": "magnitude", "sparsity": 0.25}},
        ],
        **changes,
    }
    return Recipe.model_validate(sections, context={"base": home})


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: with another number of threads, other bytes
    made = run(recipe(home), tmp_path_factory.mktemp("runs") / "out")
    torch.set_num_threads(threads)
    return made


def test_a_run_leaves_a_whole_checkpoint_with_everything_about_it(finished, home):
    out = finished.out
    assert verify(out, home / "model").problems == []
    assert load_recipe(out / "rac" / "recipe.yaml") == recipe(home)
    assert sorted(file.name for file in (out / "rac").iterdir()) == [
        "eval",
        "journal.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "steps.jsonl",
        "traces",
        "variants",
    ]
    assert list(step_times(out)) == STEPS
    assert not out.with_name("out.partial").exists()
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_table_has_the_dense_model_the_main_one_and_the_variants(finished):
    assert [row.name for row in finished.rows] == ["dense", "main", "text", "light"]
    assert [row.sparsity for row in finished.rows] == pytest.approx([0, 0.5, 0.5, 0.25], abs=0.01)
    assert [row.main for row in finished.rows] == [False, True, False, False]
    assert all(row.problems == 3 for row in finished.rows)
    page = finished.report.read_text()
    assert all(row.name in page for row in finished.rows) and "What it was calibrated on" in page
    made = json.loads((finished.out / "rac" / "traces" / "traces.json").read_text())
    short = f"the prompts gave {made['tokens']} tokens of traces, fewer than the 200 asked for"
    assert (short in page) is (made["tokens"] < 200)
    text = load_metrics(finished.out / "rac" / "variants" / "text")
    assert text.end["notes"] == [
        "no calibration sequence is held out: there are 2, and 40 are needed",
        "damping 0.01 throughout: no tokens are held out to choose it by",
    ]
    card = (finished.out / "README.md").read_text()
    assert "| light | – | magnitude | 25% |" in card and "Accuracy over 3 problems" in card


def test_every_model_is_calibrated_on_what_its_recipe_says(finished):
    rac = finished.out / "rac"
    main, text, light = (load_metrics(rac / where).run for where in ("", "variants/text", "variants/light"))
    assert main["calibration"]["source"] == "rac/traces" and "traces" in main["calibration"]["description"]
    assert text["calibration"]["tokens"] == 100 and light["calibration"] is None
    assert main["calibration"]["tokens"] == json.loads((rac / "traces" / "traces.json").read_text())["tokens"]


def test_own_traces_are_a_source_beside_others(home, tmp_path):
    mixed = {"source": [{"share": 0.5}, {"source": "text:text.txt", "share": 0.5, "weight": 0.5}], "tokens": 60}
    prune = {"method": "sparsegpt"}
    made = run(recipe(home, calibration=mixed, prune=prune, evaluate=None, compare=[]), tmp_path / "out")
    found = load_metrics(made.out / "rac").run["calibration"]
    assert [(each["source"], each["tokens"]) for each in found["sources"]] == [
        ("rac/traces", 30),
        (f"text:{home}/text.txt", 30),
    ]
    assert found["weighting"] == "weighted traces × 1, text × 0.5"
    with pytest.raises(BadInput, match="give the recipe a `trace` section"):
        run(recipe(home, trace=None, calibration=mixed, evaluate=None, compare=[]), tmp_path / "other")


def test_a_run_stopped_before_every_step_ends_with_the_same_bytes(finished, home, tmp_path, monkeypatch):
    done: list[str] = []
    for name in ("generate", "evaluate", "prune"):
        real = getattr(module, name)

        def once(*args: Any, real: Callable[..., Any] = real, name: str = name, **options: Any) -> Any:
            done.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, once)

    class Stopper(Console):
        at = 2

        def step(self, number: int, count: int, name: str) -> None:
            if number == self.at:
                raise KeyboardInterrupt

    stopper = Stopper(quiet=True)
    for stopper.at in range(2, len(STEPS) + 1):
        with pytest.raises(Interrupted):
            run(recipe(home), tmp_path / "out", console=stopper)
        assert not (tmp_path / "out").exists()
    stopper.at = 0
    result = run(recipe(home), tmp_path / "out", console=stopper)
    assert done == ["generate", "evaluate", *["prune", "evaluate"] * 3]
    assert weights(result.out) == weights(finished.out)
    assert result.rows == finished.rows
    assert verify(result.out).problems == []


DAMAGED = {
    "config.json": "prune main",
    "model.safetensors": "prune main",
    "rac/metrics.jsonl": "prune main",
    "rac/traces/part-00000.parquet": "traces",
    "rac/eval/dense.json": "answers of the dense model",
    "rac/eval/pruned.json": "answers of main",
    "rac/eval/text.json": "prune text",
    "rac/work/light/config.json": "prune light",
    "rac/variants/text/metrics.jsonl": "prune text",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_finished_step_whose_files_changed_is_done_again(finished, home, tmp_path, monkeypatch, file):
    class Stopper(Console):
        at = len(STEPS)
        redone = ""

        def step(self, number: int, count: int, name: str) -> None:
            if number == self.at:
                raise KeyboardInterrupt
            if "was done" not in name and not self.redone:
                self.redone = name

    partial = tmp_path / "out.partial"
    with pytest.raises(Interrupted):
        run(recipe(home), tmp_path / "out", console=Stopper(quiet=True))
    damaged = next(partial.glob("*.safetensors")) if file == "model.safetensors" else partial / file
    raw = bytearray(damaged.read_bytes())
    raw[-2] ^= 1
    damaged.write_bytes(raw)
    again = Stopper(quiet=True)
    again.at = 0
    result = run(recipe(home), tmp_path / "out", console=again)
    assert again.redone == DAMAGED[file]
    assert weights(result.out) == weights(finished.out) and result.rows == finished.rows
    assert verify(result.out, home / "model").problems == []


@pytest.mark.parametrize("crash_at", [1, 4, 7])
def test_a_crash_while_the_checkpoint_moves_into_place_is_mended(finished, home, tmp_path, monkeypatch, crash_at):
    real, calls = faults.rename, []

    def crash(source: Any, target: Any) -> None:
        if "/work/pruned/" in str(source):
            calls.append(source)
            if len(calls) == crash_at:
                raise RuntimeError("the machine is gone")
        real(source, target)

    plain = recipe(home, compare=[], evaluate=None)
    monkeypatch.setattr(faults, "rename", crash)
    with pytest.raises(RuntimeError):
        run(plain, tmp_path / "out")
    result = run(plain, tmp_path / "out")
    assert weights(result.out) == weights(finished.out)
    assert result.rows == [] and verify(result.out).problems == []


def test_what_is_evaluated_is_what_is_shipped(home, tmp_path, monkeypatch):
    """With `pack` the packed folder answers, and a run whose packed folder was damaged does it again."""
    asked = []

    def seen(model, *args, **kwargs):
        asked.append(is_packed(Checkpoint.open(model).config))
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(module, "evaluate", seen)
    changes: dict[str, Any] = {
        "trace": None,
        "compare": [],
        "prune": {"method": "magnitude", "sparsity": 0.8, "pack": True},
    }
    out = tmp_path / "out"
    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        stopped.setattr(module, "comparison", interrupted)
        run(recipe(home, **changes), out)
    shard = max((tmp_path / "out.partial").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    run(recipe(home, **changes), out)
    assert asked == [False, True, True]
    report = load_report(out)
    assert report is not None and report.packed < report.dense
    assert "## Packed" in (out / "README.md").read_text()
    assert "bits a weight" in (out / "rac/report.html").read_text()
    assert verify(out, home / "model").problems == []


def interrupted(_: Path) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_run_of_another_recipe_is_left_alone_unless_restarted(home, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped")

    plain = recipe(home, compare=[], evaluate=None)
    with monkeypatch.context() as patch:
        patch.setattr(module, "prune", stop)
        with pytest.raises(Interrupted):
            run(plain, tmp_path / "out")
    before = sorted((tmp_path / "out.partial").rglob("*"))
    other = recipe(home, compare=[], evaluate=None, prune={"sparsity": 0.7})
    with pytest.raises(BadInput, match=r"another recipe\.prune\.sparsity: 0\.5, now 0\.7"):
        run(other, tmp_path / "out")
    assert sorted((tmp_path / "out.partial").rglob("*")) == before
    assert load_metrics(run(other, tmp_path / "out", restart=True).out / "rac").sparsity == pytest.approx(0.7, abs=0.01)


def test_memory_limits_hold_for_every_model_and_change_nothing_of_a_run(home, finished, tmp_path, monkeypatch):
    """Small ones are refused before anything is sampled; those that suffice give the same bytes, changed midway too."""
    with pytest.raises(BadInput, match="main: --device-memory is for a GPU"):
        run(recipe(home), tmp_path / "out", device_memory=1 << 30)
    with pytest.raises(BadInput, match="main: --host-memory 256 MiB: at least"):
        run(recipe(home), tmp_path / "out", host_memory=1 << 28)
    assert [*tmp_path.iterdir()] == []
    given: list[int] = []
    real = prune

    def stopped(*args: Any, **options: Any) -> Any:
        given.append(options["host_memory"])
        if len(given) == 2:
            raise Interrupted("stopped")
        return real(*args, **options)

    monkeypatch.setattr(module, "prune", stopped)
    (tmp_path / "recipe.yaml").write_text(dump(recipe(home)))
    words = ["run", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "-q", "--device", "cpu", "--host-memory"]
    assert main([*words, "16GiB"]) == 75
    assert main([*words, "32GiB"]) == 0
    assert given == [16 << 30, 16 << 30, 32 << 30, 32 << 30]
    assert weights(tmp_path / "out") == weights(finished.out)
    plans = [load_metrics(tmp_path / "out/rac" / at).end["plan"]["host_limit"] for at in (".", "variants/text")]
    assert plans == [16 << 30, 32 << 30]


def test_a_folder_that_is_none_of_ours_is_not_touched(home, tmp_path):
    for name, said in (("out", "exists"), ("out.partial", "no unfinished job")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("")
        with pytest.raises(BadInput, match=said):
            run(recipe(home), tmp_path / "out")
        assert (tmp_path / name / "precious").exists()
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "nowhere"}, "no such folder"),
        ({"trace": None}, "main: give the recipe a `trace` section"),
        ({"trace": {"prompts": "broken.jsonl"}}, r"broken\.jsonl:2:1: not valid JSON"),
        ({"trace": {"prompts": "none.jsonl"}}, r"none\.jsonl"),
        ({"evaluate": {"problems": "broken.jsonl"}}, r"broken\.jsonl:1: needs `answer`"),
        ({"compare": [{"name": "x", "calibration": {"source": "broken.jsonl"}}]}, r"broken\.jsonl:2"),
        ({"compare": [{"name": "x", "calibration": {"source": "text:none"}}]}, "none"),
        ({"compare": [{"name": "x", "prune": {"pattern": "3:7"}}]}, "x: .*pattern 3:7"),
        ({"prune": {"dense": ["nothing"]}}, "main: dense: 'nothing' names no matrix"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_what_cannot_work_is_known_before_anything_is_sampled(home, tmp_path, monkeypatch, changes, said):
    (home / "broken.jsonl").write_text('{"problem": "Add 1 and 1."}\nnonsense\n')
    monkeypatch.setattr(module, "generate", None)
    with pytest.raises(BadInput, match=said):
        run(recipe(home, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_its_steps_and_ends_with_the_table_and_the_report(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = recipe(home, compare=[])
    (tmp_path / "r.yaml").write_text(dump(short))
    assert main(["run", "r.yaml", "out"]) == 0
    said = capsys.readouterr()
    headings = [line for line in said.err.splitlines() if line.startswith("[")]
    assert [heading.split("  ")[0] for heading in headings] == [
        f"[{n}/4] {step}" for n, step in enumerate(STEPS[:4], 1)
    ]
    assert "6 traces, " in said.err and "of 3 right" in said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("name") and lines[2].startswith("dense") and lines[3].startswith("main")
    assert lines[-1] == "report  out/rac/report.html" and Path(lines[-1].split()[1]).is_file()
    assert main(["run", "r.yaml", "out"]) == 2
    assert capsys.readouterr().err == "rac: error: out: exists; choose another output folder, or remove it\n"
