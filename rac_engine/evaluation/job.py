"""How good and how long a model's answers are: the same problems and the same random numbers for every model.

An answer is what stands in the last `\boxed{…}` behind the last `</think>`, or behind `####` or `answer:` where
there is no box. It is right if it equals the expected one as text, up to space, as a number or as an expression (see
answers).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_engine.base import faults
from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.base.files import disk_errors, replace_file, require_space
from rac_engine.evaluation.extract import extract_answer
from rac_engine.evaluation.judge import Judge
from rac_engine.evaluation.problems import Problem, load_problems, problems_sha256
from rac_engine.evaluation.results import load_evaluation
from rac_engine.evaluation.statistics import compare, summarize
from rac_engine.jobs.claim import held
from rac_engine.jobs.journal import Journal, records_of, refuse_unknown, remove_empty
from rac_engine.jobs.surroundings import surroundings
from rac_engine.recipe import EvalSettings
from rac_engine.traces import Decoder, Request, Sampling, at_a_time, render, request_key

ANSWER_BYTES = 2048  # on disk, of an answer at most, in the journal and in the results


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found. `summary` and `rows` are as in the file of results at `path`."""

    path: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    comparison: dict[str, Any] | None


def evaluate(
    model: str | Path,
    settings: EvalSettings,
    out: str | Path,
    *,
    baseline: str | Path | None = None,
    device: str = "cpu",
    restart: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
) -> EvalResult:
    """Let the model in the folder `model` answer the problems, and write the results to the JSON file `out`.

    An evaluation found unfinished in OUT.partial goes on, unless `restart`. `baseline` names the results of another
    model on the same problems, to be compared with problem by problem.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out = Path(out)
    if out.exists():
        raise BadInput(f"{out}: exists; choose another file, or remove it")
    partial = out.with_name(out.name + ".partial")
    new = [folder for folder in out.parents if not folder.exists()]
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    with held(partial, out):  # before anything is read: a second process is refused at once
        try:
            return _evaluate_in(partial, str(model), settings, out, baseline, device, restart, progress)
        except KeyboardInterrupt:
            raise Interrupted("stopped between two answers") from None
        finally:
            with suppress(OSError):
                if not partial.stat().st_size:
                    partial.unlink()
                    for folder in new:
                        folder.rmdir()  # if nothing came of it


def _evaluate_in(
    partial: Path,
    model: str,
    settings: EvalSettings,
    out: Path,
    baseline: str | Path | None,
    device: str,
    restart: bool,
    progress: Callable[[Any], None],
) -> EvalResult:
    """`evaluate`, with the journal `partial`, which is this process's alone."""
    problems = load_problems(settings.problems)[: settings.limit]
    digest = problems_sha256(problems)
    earlier = None if baseline is None else _baseline(Path(baseline), settings, digest)
    decoder = Decoder(model, device)
    asked = [(problem, sample) for problem in problems for sample in range(settings.samples)]
    requests = [
        Request(
            render(decoder.tokenizer, problem.messages, f"{settings.problems}: problem {problem.id}"),
            request_key(settings.seed, problem.id, sample),
        )
        for problem, sample in asked
    ]
    given = [(each.id, each.answer, list(request.prompt)) for (each, _), request in zip(asked, requests, strict=True)]
    judge = Judge()
    identity = {
        "model": decoder.sha256,
        "answers": judge.how,
        "problems": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
        **settings.model_dump(mode="json", exclude={"problems"}),
        **surroundings(device),
    }
    if out.exists():
        raise BadInput(f"{out}: another process has just finished it")
    if not restart:
        refuse_unknown(partial)
    with disk_errors(out):
        require_space(out.parent, ANSWER_BYTES * len(requests))
    try:
        journal = Journal(partial)
        if restart:
            journal.cut(0)
        journal.identify(identity)
    except BaseException:
        if not records_of(partial):  # a disk may be full at the first record
            remove_empty(partial, partial)
        raise
    try:
        with judge:
            rows, seconds = _answers(decoder, asked, requests, settings, journal, judge, progress)
    except BaseException:
        if len(journal.records) < 2:  # nothing worth going on with
            remove_empty(partial, partial)
        raise
    summary = summarize(rows) | {"seconds": seconds, "answers": judge.how}
    comparison = None if earlier is None else compare(rows, earlier, str(baseline))
    result = {"summary": summary, "comparison": comparison, "settings": settings.model_dump(mode="json")}
    text = json.dumps({**result, "model": str(model), "problems_sha256": digest, "rows": rows}, indent=1) + "\n"
    try:
        with disk_errors(out):
            replace_file(out, text.encode())
            faults.unlink(partial)
    except KeyboardInterrupt:  # too late, once the results are there
        if not out.exists():
            raise
        partial.unlink(missing_ok=True)
    return EvalResult(out, summary, rows, comparison)


def _answers(
    decoder: Decoder,
    asked: list[tuple[Problem, int]],
    requests: list[Request],
    settings: EvalSettings,
    journal: Journal,
    judge: Judge,
    progress: Callable[[Any], None],
) -> tuple[list[dict[str, Any]], float]:
    """The rows of all answers, those that the journal has not yet being sampled, and the seconds that took."""
    rows: list[dict[str, Any]] = [row for record in journal.records[1:] for row in record["rows"]]
    seconds = sum(record["seconds"] for record in journal.records[1:])
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    try:
        while len(rows) < len(requests):
            began, first = time.monotonic(), len(rows)
            part = requests[first : first + settings.batch_size]
            done = list(decoder.decode(part, sampling, at_a_time(settings.batch_size), progress))
            for (problem, _), completion in zip(asked[first : first + settings.batch_size], done, strict=True):
                # The token that stopped it is no part of what was said; the other special ones, such as </think>, are.
                said = completion.token_ids[:-1] if completion.finish == "stop" else completion.token_ids
                text = decoder.tokenizer.decode(said, skip_special_tokens=False)
                rows.append(_row(problem, text, len(completion.token_ids), completion.finish, judge))
            spent = time.monotonic() - began
            seconds += spent
            with disk_errors(journal.path):
                require_space(journal.path.parent, 0)
            journal.append({"rows": rows[first:], "seconds": spent})
    except KeyboardInterrupt:
        raise Interrupted(f"stopped with {len(rows)} of {len(requests)} answers") from None
    return rows, seconds


def _row(problem: Problem, text: str, tokens: int, finish: str | None, judge: Judge) -> dict[str, Any]:
    predicted = extract_answer(text)
    return {
        "id": problem.id,
        "kind": problem.kind,
        "answer": problem.answer,
        "predicted": predicted,
        # An answer that was cut off has not been given, whatever stands in a box on the way.
        "correct": finish == "stop" and judge.same(problem.answer, predicted),
        "tokens": tokens,
        "finish_reason": finish,
    }


def _baseline(path: Path, settings: EvalSettings, digest: str) -> list[dict[str, Any]]:
    """The answers in a file of results. Raises `BadInput` unless they were sampled as these are going to be.

    The number of answers decoded together may differ: the random numbers do not depend on it.
    """
    found = load_evaluation(path)
    if found.get("problems_sha256") != digest:
        raise BadInput(f"{path}: answers other problems than these; evaluate both models on the same problems")
    then, now = found.get("settings", {}), settings.model_dump(mode="json")
    for name in ("samples", "max_new_tokens", "temperature", "top_p", "seed"):
        if then.get(name) != now[name]:
            raise BadInput(
                f"{path}: was sampled with another {name}: {then.get(name)!r}, now {now[name]!r}; evaluate both models "
                "with the same settings"
            )
    rows: list[dict[str, Any]] = found["rows"]
    return rows
