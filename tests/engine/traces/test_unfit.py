"""Models whose files do not fit each other, prompts that do not fit the model, and dates in prompts."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.engine.pruning import prune
from rac_engine.evaluation.job import evaluate
from rac_engine.recipe.settings import CalibrationSettings, EvalSettings, Recipe, TraceSettings
from rac_engine.traces import template
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.generation import generate
from rac_engine.traces.sampler import context_of

ABACUS = Path(__file__).parents[3] / "examples/abacus"
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def changed(folder: Path, file: str, **changes: Any) -> Path:
    """A copy of the example model with other entries in one of its JSON files."""
    shutil.copytree(ABACUS, folder)
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**found, **changes}))
    return folder


def prompts(folder: Path, *texts: str) -> Path:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
    return file


def settings(file: Path, **more: Any) -> TraceSettings:
    return TraceSettings(**{"prompts": file, "tokens": 10_000, "samples": 1, "max_new_tokens": 40, **more})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_full_context_ends_a_trace_and_a_prompt_that_fills_it_is_left_out(tmp_path: Path) -> None:
    model = changed(tmp_path / "m", "config.json", max_position_embeddings=24)
    file = prompts(tmp_path, "1 + 2", "1" * 30, "3 + 4")
    found = generate(model, settings(file, temperature=2.0), tmp_path / "t")
    lengths = [len(row["prompt_token_ids"]) + len(row["completion_token_ids"]) for row in rows(tmp_path / "t")]
    assert found.finish_reasons == {"context": 2} and lengths == [24, 24]
    assert [row["id"] for row in rows(tmp_path / "t")] == ["0-0", "2-0"]
    assert found.notes[-2:] == [
        "2 traces ended where the model's context of 24 tokens was full",
        "1 samples were left out: their prompts alone fill the model's context of 24 tokens",
    ]


def test_problems_that_fill_the_context_are_refused_and_cut_answers_counted(tmp_path: Path) -> None:
    model = changed(tmp_path / "m", "config.json", max_position_embeddings=24)
    asked = EvalSettings(problems=prompts(tmp_path, "1 + 2"), max_new_tokens=40, temperature=2.0)
    found = evaluate(model, asked, tmp_path / "e.json")
    assert found.rows[0]["finish_reason"] == "context" and found.summary["cut_off_share"] == 1
    long = EvalSettings(problems=prompts(tmp_path, "1" * 30))
    with pytest.raises(BadInput, match=r"problem 0: has 3\d tokens, and the model's context 24"):
        evaluate(model, long, tmp_path / "f.json")
    assert not list(tmp_path.glob("f.json*"))


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, None),
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}}, 100),
        # Qwen2.5's own advice leaves max_position_embeddings as it was; DeepSeek's configs have it stretched already.
        ({"max_position_embeddings": 100, "rope_parameters": ("yarn", 4.0, 100)}, 400),
        ({"max_position_embeddings": 4000, "rope_parameters": ("yarn", 40.0, 100)}, 4000),
        ({"max_position_embeddings": 800, "rope_parameters": ("llama3", 8.0, 100)}, 800),
        ({"max_position_embeddings": 100, "rope_parameters": ("linear", 2.0, None)}, 200),
    ],
)
def test_the_context_that_a_config_allows(config: dict[str, Any], context: int | None) -> None:
    rope = config.get("rope_parameters")
    if isinstance(rope, tuple):
        names = ("rope_type", "factor", "original_max_position_embeddings")
        config = {**config, "rope_parameters": {name: value for name, value in zip(names, rope, strict=True) if value}}
    assert context_of(SimpleNamespace(**config)) == context


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": 1, "eos_token_id": 2}'])
def test_a_broken_generation_config_is_one_line(tmp_path: Path, text: str) -> None:
    model = shutil.copytree(ABACUS, tmp_path / "m")
    (model / "generation_config.json").write_text(text)
    with pytest.raises(BadInput, match=r"generation_config\.json: .*; mend it, or remove it"):
        generate(model, settings(prompts(tmp_path, "1")), tmp_path / "t")
    assert not list(tmp_path.glob("t*"))


def test_a_token_beyond_the_embeddings_is_one_line(tmp_path: Path) -> None:
    tokens = json.loads((ABACUS / "tokenizer.json").read_text())["added_tokens"]
    more = [*tokens, {"id": 103, "content": "Multiply", **TOKEN}]
    model = changed(tmp_path / "m", "tokenizer.json", added_tokens=more)
    file = prompts(tmp_path, "1 + 2", "Multiply 1")
    with pytest.raises(BadInput, match=r"prompt 1: has token 103, but the model has embeddings of 103 alone"):
        generate(model, settings(file), tmp_path / "t")
    assert Decoder(model).prompt([{"role": "user", "content": "1"}], "p") != []
    (tmp_path / "text").write_text("Multiply 1 " * 20)
    calibration = CalibrationSettings(source=f"text:{tmp_path / 'text'}")
    with pytest.raises(BadInput, match=r"text: has token 103, but the model has embeddings of 103 alone"):
        prune(model, tmp_path / "o", Recipe(model=model, calibration=calibration))
    assert not list(tmp_path.glob("[to].partial"))


def on_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    """Let it be that day of January 2024 from now on."""
    clock = type("Clock", (datetime,), {"now": lambda: datetime(2024, 1, day)})
    monkeypatch.setattr(template, "datetime", clock)


def dating(folder: Path) -> Path:
    model = shutil.copytree(ABACUS, folder)
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + text)
    return model


def test_a_job_that_goes_on_renders_as_on_the_day_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = dating(tmp_path / "m"), prompts(tmp_path, "1 + 2", "3 + 4")
    wanted = settings(file, batch_size=1, max_new_tokens=3)

    def stop(at: object) -> None:
        if "2 traces done" in str(at):
            raise KeyboardInterrupt

    on_day(monkeypatch, 5)
    with pytest.raises(Interrupted):
        generate(model, wanted, tmp_path / "t", progress=stop)
    on_day(monkeypatch, 6)
    generate(model, wanted, tmp_path / "t")
    assert [row["text"][:2] for row in rows(tmp_path / "t")] == ["05", "05"]


def test_answers_are_compared_to_the_same_prompts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = dating(tmp_path / "m"), prompts(tmp_path, "1 + 2")
    asked = EvalSettings(problems=file, max_new_tokens=2)
    on_day(monkeypatch, 5)
    evaluate(model, asked, tmp_path / "a.json")
    on_day(monkeypatch, 6)
    again = evaluate(model, asked, tmp_path / "b.json", baseline=tmp_path / "a.json")  # as on the day before
    assert again.comparison is not None and again.comparison["length_ratio"] == 1
    with pytest.raises(BadInput, match=r"a\.json: its model was given other prompts"):
        evaluate(ABACUS, asked, tmp_path / "c.json", baseline=tmp_path / "a.json")
    assert not list(tmp_path.glob("c.json*"))
