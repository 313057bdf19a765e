"""Chat templates in a process of their own: bounded, dated, and as transformers renders them."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.traces import rendering
from rac_engine.traces.rendering import renderer_of, stop_rendering
from rac_engine.traces.template import dated, moment_of, render
from rac_engine.traces.tokenizer import load_tokenizer

ABACUS = Path(__file__).parents[3] / "examples/abacus"
ASKED = [{"role": "user", "content": "1 + 1"}]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(ABACUS)


def templated(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def test_one_process_renders_all_as_transformers_does(tokenizer: Any) -> None:
    first = renderer_of(tokenizer)
    for text in ("1 + 1", "two\nlines", "½ é"):
        asked = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert first.render(asked, {}, datetime.now()) == expected
    assert renderer_of(tokenizer) is first
    assert renderer_of(templated(tokenizer, "{{ 1 }}")) is not first and first.stopped
    stop_rendering(tokenizer)
    assert not renderer_of(tokenizer).stopped


def test_the_process_ends_with_the_tokenizer() -> None:
    tokenizer = load_tokenizer(ABACUS)
    process = renderer_of(tokenizer)._process
    os.kill(process, 0)
    del tokenizer
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_template_that_never_ends_is_ended(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    loop = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"p:1: the chat template takes more than 0\.2 s"):
        render(templated(tokenizer, loop), ASKED, "p:1")
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    assert render(templated(tokenizer, "{{ 1 }}"), ASKED, "p:2")  # by another process


def test_a_template_that_writes_books_is_refused(tokenizer: Any) -> None:
    """Its memory is bounded, and it fits into it: to tokenize it would take gigabytes."""
    with pytest.raises(BadInput, match=r"makes 15,000,000 characters of it"):
        render(templated(tokenizer, "{{ '0' * 15000000 }}"), ASKED, "p:1")


def test_lots_that_a_template_draws_fall_the_same_way_again(tokenizer: Any) -> None:
    drawn = templated(tokenizer, "{{ lipsum(n=1, html=false) | lower }}{{ range(9999) | random }}")
    texts = {renderer_of(drawn).render(ASKED, {}, datetime.now()) for _ in range(3)}
    assert len(texts) == 1


def test_a_date_is_that_of_the_job(tokenizer: Any, tmp_path: Path) -> None:
    dates = templated(tokenizer, "{{ strftime_now('%d %H:%M') }}")
    with dated(datetime(2024, 2, 29, 12, 30)):
        assert tokenizer.decode(render(dates, ASKED, "p:1")) == "29 12:30"
    assert moment_of(tmp_path / "journal").date() == datetime.now().date()


def test_the_process_holds_no_file_of_this_one_open(tokenizer: Any, tmp_path: Path) -> None:
    """A lock would outlast the job, and a pipe would never end."""
    with (tmp_path / "lock").open("w") as file:
        process = renderer_of(tokenizer)._process
        renderer_of(tokenizer).render(ASKED, {}, datetime.now())
        held = {os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()}
        assert file.name not in held
        assert {name for name in held if not name.startswith("socket:")} == {os.devnull}


def test_half_a_character_goes_there_and_back(tokenizer: Any) -> None:
    text = json.loads('"\\ud800"')
    asked = [{"role": "user", "content": text}]
    assert text in renderer_of(tokenizer).render(asked, {}, datetime.now())
