"""Answers found in text, right and wrong ones told apart, intervals, and an evaluation that goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.evaluation import judge as answers
from rac_engine.evaluation.compare import same_answer
from rac_engine.evaluation.extract import extract_answer
from rac_engine.evaluation.job import evaluate
from rac_engine.evaluation.judge import Judge
from rac_engine.evaluation.mathematics import SECONDS
from rac_engine.evaluation.problems import load_problems
from rac_engine.evaluation.statistics import mcnemar, summarize, wilson
from rac_engine.recipe.settings import EvalSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.sampling import Completion

ABACUS = Path(__file__).parents[3] / "examples/abacus"
PAIRS = Path(__file__).parent / "pairs.jsonl"
PROBLEMS = ABACUS.parent / "problems/evaluation.jsonl"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{unfinished", "7"),
        ("so\n#### 42\n", "42"),
        ("The answer is: 12.", "12"),
        ("Answer: x\nanswer: y", "y"),
        (r"<think>\boxed{1}</think>no idea", None),
        ("", None),
        ("**Answer:** 12", "12"),
        ("**Answer**: **12**", "12"),
        ("The answer is:\n12.\n", "12"),
        (r"\boxed{a \boxed{b} {c}} }", "b"),
        (r"} \boxed{{1} {2}", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        ("12", "12", True),
        ("12", "012", True),
        ("1200", "1,200", True),
        ("1200", "1,20,0", False),
        ("0.5", "1/2", True),
        ("0.5", ".50", True),
        ("x + 1", "x+1", True),
        ("abc", "abd", False),
        ("3", "1/0", False),
        ("3", None, False),
        ("1011", "1011.0", True),
        ("3 1 2", "1 2 3", False),
        ("3, 1, 2", "1, 2, 3", True),
        ("3, 1, 2", "1, 2, 4", False),
        ("(3, 1, 2)", "(1, 2, 3)", False),
    ],
)
def test_figures_are_compared_without_mathematics(
    monkeypatch: pytest.MonkeyPatch, expected: str, given: str | None, same: bool
) -> None:
    """It would take rows of them for products."""
    if expected != "abc":
        monkeypatch.setattr(Judge, "_ask", None)
    with Judge() as judge:
        assert judge.same(expected, given) is same


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as made:
        assert "math-verify" in made.how
        yield made


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac{3}{4}", r"\frac34", True),
        ("x^2 + 1", "1+x^2", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
        ("(3, 5)", "(5, 3)", False),
        ("p - q", "q - p", False),
        ("x", "}{\x00\n\ud800", False),
        ("x" * 3000, "y", False),
    ],
)
def test_mathematics_is_compared_as_such(judge: Judge, expected: str, given: str, same: bool) -> None:
    assert judge.same(expected, given) is same


def test_answers_as_models_write_them(judge: Judge) -> None:
    """Each kind with answers that are right and near misses that are wrong."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    found = [(pair, extract_answer(pair["completion"])) for pair in pairs]
    wrong = [(pair, answer) for pair, answer in found if judge.same(pair["gold"], answer) is not pair["right"]]
    assert len(pairs) > 400 and not wrong, "\n".join(f"{pair}: {answer!r}" for pair, answer in wrong)


@pytest.mark.parametrize(
    "text", ["(" * 900 + "5" + ")" * 900, "1," * 990, r"\frac{" * 300, "9^9999+" * 280 + "1", "$" * 1999]
)
def test_answers_made_to_be_hard_are_compared_in_no_time(text: str) -> None:
    began = time.process_time()
    for other in ("5", text[::-1], text[:-1], "(1, 2)"):
        same_answer(other, text, lambda *_: False)
    assert time.process_time() - began < 5


def test_no_more_time_is_taken_for_a_list_than_for_one_answer(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slowly(expected: str, given: str, seconds: float) -> bool:
        asked.append(seconds)
        monkeypatch.setattr(time, "monotonic", lambda: began + 4 * SECONDS + 1)
        return False

    began = time.monotonic()
    monkeypatch.setattr(judge, "_ask", slowly)
    assert not judge.same("x+1, x+2, x+3", "y+1, y+2, y+3")
    assert len(asked) == 1 and 0 < asked[0] <= 4 * SECONDS


def test_what_nobody_can_evaluate_is_another_answer_and_the_next_one_is_compared(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge.same("x+1", "1+x")
    worker = judge._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr(answers, "SECONDS", 0.05)
    assert not judge.same("x+1", "1+x")
    monkeypatch.undo()
    assert worker.poll() is not None
    assert judge.same("x+1", "1+x")


def test_boxes_that_are_never_closed_take_one_pass() -> None:
    began = time.process_time()
    assert extract_answer("\\boxed{" * 50_000) is None
    assert extract_answer("\\boxed{3}" + "\\boxed{{" * 50_000) == "3"
    assert extract_answer("\\boxed{}" * 50_000 + "answer" + " " * 100_000) is None
    assert time.process_time() - began < 5


def test_the_token_that_stops_an_answer_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(decoder: Decoder, requests: Sequence[Any], *_: Any) -> list[Completion]:
        ids = decoder.tokenizer("<think>1</think>#### 42", add_special_tokens=False)["input_ids"]
        return [Completion([*ids, min(decoder.stops)], "stop") for _ in requests]

    monkeypatch.setattr(Decoder, "decode", said)
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "a", "answer": "42"}\n')
    result = evaluate(ABACUS, settings(tmp_path, problems=file), tmp_path / "r.json")
    assert result.rows[0]["predicted"] == "42" and result.rows[0]["correct"]


def test_intervals_and_paired_test() -> None:
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1 and wilson(0, 0) == (0, 1)
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_summary_counts_what_was_cut_off() -> None:
    rows = [{"tokens": n, "correct": n < 19, "finish_reason": "stop" if n < 20 else "length", "kind": None}
            for n in range(1, 21)]  # fmt: skip
    found = summarize(rows)
    assert (found["accuracy"], found["cut_off_share"], found["p95_tokens"]) == (0.9, 0.05, 19)
    assert found["mean_tokens"] == 10.5 and found["kinds"] == {}


def settings(tmp_path: Path, **changes: Any) -> EvalSettings:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(PROBLEMS.read_text().splitlines(keepends=True)[:8]))
    return EvalSettings(**{"problems": file, "max_new_tokens": 260, "batch_size": 8, **changes})


def test_the_example_model_solves_its_problems(tmp_path: Path) -> None:
    result = evaluate(ABACUS, settings(tmp_path), tmp_path / "r.json")
    assert result.summary["correct"] >= 7
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == result.rows
    again = evaluate(ABACUS, settings(tmp_path), tmp_path / "again.json", baseline=tmp_path / "r.json")
    assert again.rows == result.rows
    assert again.comparison is not None and (again.comparison["lost"], again.comparison["length_ratio"]) == (0, 1)
    short = evaluate(ABACUS, settings(tmp_path, max_new_tokens=20), tmp_path / "short.json")
    assert short.summary["cut_off_share"] == 1 and short.summary["accuracy"] == 0


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    wanted = settings(tmp_path, max_new_tokens=8, batch_size=1)
    whole = evaluate(ABACUS, wanted, tmp_path / "whole.json")
    steps = 0

    def interrupt(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 40:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="4 of 8"):
        evaluate(ABACUS, wanted, tmp_path / "r.json", progress=interrupt)
    assert not (tmp_path / "r.json").exists()
    with pytest.raises(BadInput, match="another seed"):
        evaluate(ABACUS, settings(tmp_path, max_new_tokens=8, batch_size=1, seed=5), tmp_path / "r.json")
    counted = 0

    def count(_: Any) -> None:
        nonlocal counted
        counted += 1

    assert evaluate(ABACUS, wanted, tmp_path / "r.json", progress=count).rows == whole.rows
    assert counted == 32  # only the four answers that were missing
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "a"}', r":1: needs `answer`"),
        ('{"problem": "a", "Antwort": 1}', r":1: needs `answer`.*has `problem`, `Antwort`: name .*--column answer="),
        ('{"answer": "a"}', r":1: needs `problem`"),
        ('{"problem": "a", "answer": true}', r":1: needs `answer`"),
        ("", "holds no problem"),
    ],
)
def test_broken_problems(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(BadInput, match=message):
        load_problems(tmp_path / "p.jsonl")


def test_folders_made_for_results_go_if_there_are_none(tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    (tmp_path / "kept").mkdir()
    with pytest.raises(BadInput, match="no such folder"):
        evaluate(tmp_path / "none", wanted, tmp_path / "kept" / "a" / "b" / "r.json")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_baseline_must_have_answered_the_same_problems(tmp_path: Path) -> None:
    wanted, number = settings(tmp_path, max_new_tokens=2, limit=2), itertools.count()
    evaluate(ABACUS, wanted, tmp_path / "b.json")

    def against_it(**changes: Any) -> None:
        asked, out = wanted.model_copy(update=changes), tmp_path / f"{next(number)}.json"
        try:
            evaluate(ABACUS, asked, out, baseline=tmp_path / "b.json")
        finally:
            assert not changes or not list(tmp_path.glob(f"{out.name}*"))

    against_it()
    for changes in (
        *({"seed": 1}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_new_tokens": 3}, {"samples": 2}),
        {"template_arguments": {"message": True}},
        {"instruction": "Answer in a box."},
    ):
        with pytest.raises(BadInput, match=f"another {next(iter(changes))}"):
            against_it(**changes)
    with pytest.raises(BadInput, match="other problems"):
        against_it(limit=1)
    assert wanted.problems is not None
    same_answers = wanted.problems.read_text().replace('"problem": "', '"problem": "Please: ')
    (tmp_path / "q.jsonl").write_text(same_answers)
    with pytest.raises(BadInput, match="other problems"):
        against_it(problems=tmp_path / "q.jsonl")


@pytest.mark.parametrize("text", ["{}", "[]", '{"rows": "x"}', '{"rows": [], "rows": []}', '{"rows": [{"id": "x"}]}'])
def test_a_baseline_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(BadInput, match=r"b\.json"):
        evaluate(ABACUS, settings(tmp_path), tmp_path / "r2.json", baseline=tmp_path / "b.json")
    assert not list(tmp_path.glob("r2*"))
