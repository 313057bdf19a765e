"""Sampling by a server: the fields of three engines, servers that misbehave or die, and a job that goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.cli import main
from rac_engine.evaluation.job import evaluate
from rac_engine.jobs.layout import TRACES_SUMMARY
from rac_engine.recipe import load_recipe
from rac_engine.recipe.settings import EvalSettings, TraceSettings
from rac_engine.traces import servers, snapshot
from rac_engine.traces.generation import generate
from rac_engine.traces.sampling import request_key
from rac_engine.traces.tokenizer import load_tokenizer
from tests.engine.traces.engines import CONTEXT, END, Engine, running, sampled

ABACUS = Path(__file__).parents[3] / "examples/abacus"
PROMPTS = ABACUS.parent / "problems/calibration.jsonl"
PROBLEMS = ABACUS.parent / "problems/evaluation.jsonl"
KINDS = ("vllm", "sglang", "llama.cpp")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ABACUS)


@pytest.fixture
def serve(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Start a server of a kind, with faults."""
    monkeypatch.setattr(servers, "LONGEST_WAIT", 0.02)
    monkeypatch.delenv(servers.API_KEY, raising=False)
    with ExitStack() as stack:
        yield lambda kind="vllm", **faults: stack.enter_context(running(Engine(kind, tokenizer, **faults)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:10]))
    return file


def settings(prompts: Path, *engines: Engine, **changes: Any) -> TraceSettings:
    given = {"prompts": prompts, "tokens": 100_000, "samples": 2, "max_new_tokens": 8, "batch_size": 8, "in_flight": 4}
    return TraceSettings(**{**given, "server": [engine.url for engine in engines], **changes})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_engine_become_traces(
    kind: str, serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    engine = serve(kind)
    report = generate(ABACUS, settings(prompts, engine), tmp_path / "t")
    found = rows(tmp_path / "t")
    assert report.traces == len(found) == 20 == len(engine.bodies) and 1 < engine.most <= 4
    for row in found:
        name, _, sample = row["id"].rpartition("-")
        seed = request_key(0, name, int(sample)) >> 1
        if kind == "llama.cpp":
            seed %= 1 << 32
        assert row["completion_token_ids"] == sampled(seed, row["prompt_token_ids"], 8, 0.6)
        assert row["finish_reason"] == ("stop" if row["completion_token_ids"][-1] == END else "length")
    assert len({json.dumps(row["completion_token_ids"]) for row in found}) > 10  # each has a seed of its own
    assert {row["finish_reason"] for row in found} == {"stop", "length"}
    summary = json.loads((tmp_path / "t" / TRACES_SUMMARY).read_text())
    assert summary["servers"][0]["url"] == engine.url and summary["engine"].lower().startswith(kind)
    assert "server" not in summary["settings"] and json.loads(found[0]["sampling"])["engine"] == summary["engine"]


def test_every_field_that_decides_the_tokens_is_sent(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    engine = serve()
    generate(ABACUS, settings(prompts, engine, samples=1, temperature=0.0, top_p=0.9), tmp_path / "t")
    body = engine.bodies[0]
    assert body["max_tokens"] == 8 and body["return_token_ids"] is True and body["skip_special_tokens"] is False
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.0, 0.9, 0, 0.0)
    assert body["repetition_penalty"] == 1.0 and body["stop_token_ids"] == [END] and body["add_special_tokens"] is False


def test_a_context_that_is_shorter_than_the_models_ends_answers(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    engine = serve()
    generate(ABACUS, settings(prompts, engine, samples=1, max_new_tokens=10_000), tmp_path / "t")
    for body in engine.bodies:
        assert len(body["prompt"]) + body["max_tokens"] == CONTEXT


def test_two_servers_share_the_work_and_give_what_one_gives(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    quick, slow = serve(), serve(delay=0.05)
    generate(ABACUS, settings(prompts, quick, slow, in_flight=1), tmp_path / "two")
    generate(ABACUS, settings(prompts, quick), tmp_path / "one")
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    assert len(quick.bodies) - 20 > len(slow.bodies) > 0


def test_a_busy_server_is_asked_again(serve: Callable[..., Engine], prompts: Path, tmp_path: Path) -> None:
    engine = serve(fails=7)
    report = generate(ABACUS, settings(prompts, engine), tmp_path / "t")
    assert report.traces == 20 and len(engine.bodies) == 27


FAULTS = {
    "text only": "answers with text only; a vLLM that knows return_token_ids",
    "other prompt": "changed the token ids of a prompt",
    "foreign token": "a token that the model has none of",
    "too many": "gave 13 tokens where 8 were asked for",
    "no numbers": "token ids are no list of numbers",
    "redirect": "points to another place",
    "endless": "its reply is longer than",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_misbehaves_is_left_out(
    fault: str, serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    bad, good = serve(fault=fault), serve(delay=0.02)
    report = generate(ABACUS, settings(prompts, bad, good), tmp_path / "t")
    assert report.traces == 20 and any(bad.url in note and FAULTS[fault] in note for note in report.notes)
    with pytest.raises(BadInput, match=FAULTS[fault]):
        generate(ABACUS, settings(prompts, bad), tmp_path / "alone")
    assert not (tmp_path / "alone").exists() and not (tmp_path / "alone.partial").exists()


@pytest.mark.parametrize("fault", ["cut off", "no json", "aborted", "slow"])
def test_a_server_that_fails_for_long_ends_the_job_resumably(
    fault: str, serve: Callable[..., Engine], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "TRIES", 2)
    engine = serve(fault=fault)
    with pytest.raises(Interrupted, match="no server is left"):
        generate(ABACUS, settings(prompts, engine, samples=1, request_seconds=0.2), tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("kind", "said"), [("sglang", "output_ids is needed"), ("llama.cpp", "return_tokens is needed")]
)
def test_other_engines_that_give_text_only_are_told_what_they_need(
    kind: str, said: str, serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        generate(ABACUS, settings(prompts, serve(kind, fault="text only")), tmp_path / "t")


def test_a_wrong_request_is_no_servers_fault(serve: Callable[..., Engine], prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"HTTP 400: .*top_p must be"):
        generate(ABACUS, settings(prompts, serve(fault="bad request"), serve()), tmp_path / "t")


def test_what_cannot_be_used_is_said_before_anything_is_asked(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (serve(fault="tokenizer"), "splits text into other tokens"),
        (serve("other"), "is none of vLLM, SGLang, llama.cpp"),
        (serve(key="secret"), "put it into RAC_API_KEY"),
        (Engine("vllm", None, url="http://127.0.0.1:9"), "cannot be reached"),
    ]
    for engine, said in cases:
        with pytest.raises(BadInput, match=said):
            generate(ABACUS, settings(prompts, engine), tmp_path / "t")
        assert not engine.bodies
    monkeypatch.setenv(servers.API_KEY, "secret")
    generate(ABACUS, settings(prompts, cases[2][0]), tmp_path / "t")
    kept = b"".join(file.read_bytes() for file in (tmp_path / "t").iterdir())
    assert b"secret" not in kept


def test_another_models_name_is_noted(serve: Callable[..., Engine], prompts: Path, tmp_path: Path) -> None:
    report = generate(ABACUS, settings(prompts, serve(model="abacus-awq")), tmp_path / "t")
    assert any("'/models/abacus-awq', which is taken to be this model" in note for note in report.notes)
    report = generate(ABACUS, settings(prompts, serve()), tmp_path / "u")
    assert not any("taken to be" in note for note in report.notes)


def test_a_dead_server_costs_nothing_that_was_answered(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job goes on with another server, to the same traces, and asks for no answer twice."""
    monkeypatch.setattr(servers, "TRIES", 1)
    monkeypatch.setattr(snapshot, "EVERY", 1e9)
    good = serve()
    generate(ABACUS, settings(prompts, good), tmp_path / "whole")
    dying = serve()
    left = [13]

    class Dying(list[dict[str, Any]]):
        def append(self, body: dict[str, Any]) -> None:
            super().append(body)
            left[0] -= 1
            dying.fault = "cut off" if left[0] < 0 else ""

    dying.bodies = Dying()
    with pytest.raises(Interrupted, match="no server is left"):
        generate(ABACUS, settings(prompts, dying, in_flight=1), tmp_path / "t")
    other = serve()
    generate(ABACUS, settings(prompts, other), tmp_path / "t")
    assert rows(tmp_path / "t") == rows(tmp_path / "whole")
    assert len(other.bodies) == 20 - 13


def test_an_interrupt_does_not_wait_for_slow_requests(
    serve: Callable[..., Engine], prompts: Path, tmp_path: Path
) -> None:
    engine = serve(delay=20)

    def interrupt() -> None:
        while not engine.bodies:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            generate(ABACUS, settings(prompts, engine), tmp_path / "t")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 18


def test_problems_are_answered_by_a_server(
    serve: Callable[..., Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = serve()
    asked = EvalSettings(problems=PROBLEMS, limit=5, max_new_tokens=8, server=[engine.url + "/v1/"])
    result = evaluate(ABACUS, asked, tmp_path / "r.json")
    kept = json.loads((tmp_path / "r.json").read_text())
    assert len(result.rows) == 5 == len(engine.bodies) and kept["servers"][0]["url"] == engine.url
    words = ["eval", str(ABACUS), "--problems", str(PROBLEMS), "--limit", "5", "--max-new-tokens", "8"]
    again = [*words, "--out", str(tmp_path / "s.json"), "--baseline", str(tmp_path / "r.json"), "--server", engine.url]
    assert main(again) == 0 and "0 lost, 0 gained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "is no server's URL"),
        ("ftp://host", "is no server's URL"),
        ("http://user:key@host", "holds no key"),
        ("http://host:99999", "is no server's URL"),
        ("http://host/?key=1", "more than a host and a path"),
    ],
)
def test_urls_are_checked(url: str, said: str, prompts: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(prompts, server=[url])


def test_a_recipe_that_compares_models_has_no_server_for_answers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {ABACUS}\nevaluate:\n  problems: {PROBLEMS}\n  server: [http://host]\n")
    with pytest.raises(BadInput, match="one server runs one model"):
        load_recipe(file)
