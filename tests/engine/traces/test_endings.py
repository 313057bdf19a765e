"""The tokens that end an answer are all that any file names, and answers that do not end are explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.evaluation.job import evaluate
from rac_engine.recipe.settings import EvalSettings, TraceSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.endings import cut_off_notes, stop_tokens
from rac_engine.traces.generation import generate
from rac_engine.traces.sampling import Completion
from rac_engine.traces.tokenizer import load_tokenizer
from tests import tiny

WITH_AN_END = (
    "{% for message in messages %}<user> {{ message['content'] }} {% if message['role'] == 'assistant' %}</think> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)


def folder(path: Path, template: str | None = None, **said: Any) -> Path:
    """A tokenizer whose end is 0, beside the files `said` by name."""
    tiny.save_tokenizer(path)
    added = json.loads((path / "tokenizer.json").read_text())
    added["added_tokens"] += [
        {"id": 3, "content": "</think>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
    ]
    added["model"]["vocab"] |= {"Four": len(added["model"]["vocab"])}
    (path / "tokenizer.json").write_text(json.dumps(added))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    for name, content in said.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("said", "stops"),
    [
        ({}, {0}),
        ({"generation_config": {"eos_token_id": 5}}, {0, 5}),
        ({"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}}, {0, 5, 6, 7}),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [7, 8]}}, {0, 7, 8}),
        ({"config": {"text_config": {"eos_token_id": 9}, "eos_token_id": True}}, {0, 9}),
        ({"config": {"model_type": "llama", "text_config": 3}}, {0}),
    ],
)
def test_every_file_counts_and_defaults_do_not(tmp_path: Path, said: dict[str, Any], stops: set[int]) -> None:
    path = folder(tmp_path, **({"config": {"model_type": "llama"}} | said))
    assert stop_tokens(path, load_tokenizer(path)) == stops


def test_a_generation_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, config={"model_type": "llama"})
    tokenizer = load_tokenizer(path)
    (path / "generation_config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"generation_config.json: not a JSON object; mend it"):
        stop_tokens(path, tokenizer)


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ({"stop": 5, "length": 5}, None),
        ({"stop": 4, "length": 5, "budget": 9}, "5 of 9 answers were cut off, at 1,000 tokens or before: either they"),
        (
            {"length": 3},
            "all 3 answers were cut off, at 1,000 tokens or before: either they need more (max_new_tokens)",
        ),
        ({"budget": 3}, None),
        ({}, None),
    ],
)
def test_most_answers_have_to_be_cut_off(tmp_path: Path, reasons: dict[str, int], said: str | None) -> None:
    notes = cut_off_notes(load_tokenizer(folder(tmp_path)), frozenset({0}), reasons, 1000)
    assert (notes == []) if said is None else (said in notes[0] and "'<end>' (0)" in notes[0])


def test_a_token_that_the_template_puts_behind_answers_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, WITH_AN_END))
    (note,) = cut_off_notes(tokenizer, frozenset({0}), {"length": 3}, 1000)
    assert "puts '</think>' (3) behind an answer, but what ends one by its files is '<end>' (0)" in note
    (note,) = cut_off_notes(tokenizer, frozenset({0, 3}), {"length": 3}, 1000)
    assert "either they need more" in note
    (note,) = cut_off_notes(tokenizer, frozenset(), {"length": 3}, 1000)
    assert "no file of the model names a token that ends one" in note
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert "either they need more" in cut_off_notes(tokenizer, frozenset({0}), {"length": 3}, 1000)[0]


def test_traces_and_answers_that_do_not_end_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Decoder, requests: Any, *_: Any) -> list[Completion]:
        return [Completion([5, 6], "length") for _ in requests]

    monkeypatch.setattr(Decoder, "decode", cut)
    model = tiny.save_tokenizer(tiny.save(tmp_path / "model", "llama"))
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem": "w5 w6", "answer": "7"}\n')
    report = generate(model, TraceSettings(prompts=problems, tokens=100, max_new_tokens=2), tmp_path / "traces")
    answers = evaluate(model, EvalSettings(problems=problems, max_new_tokens=2), tmp_path / "answers.json")
    for count, notes, file in ((2, report.notes, "traces/traces.json"), (1, answers.notes, "answers.json")):
        assert notes == json.loads((tmp_path / file).read_text())["notes"]
        who = "the only answer was" if count == 1 else f"all {count} answers were"
        assert notes[0].startswith(f"{who} cut off, at 2 tokens or before")
