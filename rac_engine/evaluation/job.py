"""The evaluation job: a model answers problems, with the same random numbers for every model.

How an answer is found (extract) and compared with the expected one (written, compare, judge) stands in docs/answers.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, require_space
from rac_engine.base.hubnames import shown_model
from rac_engine.checkpoint import local_folder
from rac_engine.evaluation.extract import extract_answer
from rac_engine.evaluation.judge import Judge
from rac_engine.evaluation.problems import Problem, load_problems, problems_sha256
from rac_engine.evaluation.results import load_evaluation
from rac_engine.evaluation.statistics import compare, summarize
from rac_engine.jobs.job import FileJob
from rac_engine.jobs.journal import Journal
from rac_engine.recipe import SERVING, EvalSettings
from rac_engine.traces import (
    Request,
    Sampler,
    Sampling,
    Snapshots,
    at_a_time,
    cut_off_notes,
    dated,
    instructed,
    moment_of,
    open_sampler,
    read_moment,
    request_key,
    stop_rendering,
    text_bytes,
)

_PROMPTS = "prompts_sha256"

ANSWER_BYTES = 2048  # on disk, of an answer at most, in the journal and in the results


@dataclass(frozen=True)
class EvalResult:
    """The result of `evaluate`. `summary` and `rows` are as in the file of results at `path`."""

    path: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    comparison: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)


def evaluate(
    model: str | Path,
    settings: EvalSettings,
    out: str | Path,
    *,
    baseline: str | Path | None = None,
    device: str = "cpu",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[Any], None] = lambda _: None,
) -> EvalResult:
    """Let `model`, a folder or `org/name[@revision]` on the hub, answer the problems into the JSON file `out`.

    An evaluation found unfinished in OUT.partial goes on, unless `restart`. `baseline` names the results of another
    model on the same problems, to be compared with problem by problem. It keeps to `device_memory` and `host_memory`,
    in bytes: where the model does not fit, its layers are streamed.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out = Path(out)
    # The claim comes before anything is read: a second process is refused at once.
    with FileJob(out, Path(model)) as job, ExitStack() as opened:
        problems = load_problems(settings.problems, settings.column)[: settings.limit]
        digest = problems_sha256(problems)
        earlier = None if baseline is None else _baseline(Path(baseline), settings, digest)
        folder = local_folder(model, progress)
        longest = max((text_bytes(problem.messages) for problem in problems), default=0)
        limits = device_memory, host_memory
        decoder = opened.enter_context(closing(open_sampler(folder, device, settings, *limits, text=longest)))
        # Where a model is compared, a date in its prompts is that of the answers it is compared with.
        moment = read_moment(earlier or {}) or moment_of(job.partial, restart)
        with dated(moment) as dating:
            questions = _questions(problems, settings, decoder)
        prompts = _prompts_sha256(questions)
        if earlier is not None and earlier.get(_PROMPTS, prompts) != prompts:
            raise BadInput(
                f"{baseline}: its model was given other prompts than this one: their chat templates or tokenizers "
                "differ; evaluate both with the same"
            )
        judge = Judge()
        with disk_errors(out):
            require_space(out.parent, ANSWER_BYTES * len(questions))
        identity = _identity(decoder, judge, questions, settings)
        together = min(at_a_time(settings.batch_size), len(questions))
        threads = decoder.choose_threads(job.partial, together, restart)
        decoder.snapshots = snapshots = Snapshots(job.under_way, identity)
        job.open_journal(
            identity,
            restart=restart,
            beside={**dating.record(), **threads},
            stopped=lambda: f"stopped with {len(_rows(job.journal))} of {len(questions)} answers{snapshots.describe()}",
        )
        with judge:
            _answer_all(job, decoder, questions, settings, judge, progress)
        rows = _rows(job.journal)
        seconds = sum(record["seconds"] for record in job.journal.records[1:])
        summary = summarize(rows) | {"seconds": seconds, "answers": judge.how}
        comparison = None if earlier is None else compare(rows, earlier["rows"], str(baseline))
        reasons = Counter(str(row["finish_reason"]) for row in rows)
        notes = cut_off_notes(decoder.tokenizer, decoder.stops, reasons, settings.max_new_tokens)
        result: dict[str, Any] = {
            "summary": summary,
            "comparison": comparison,
            "notes": [*decoder.planned, *notes],
            "settings": settings.model_dump(mode="json", exclude=set(SERVING)),
            **decoder.record(),
        }
        result |= {"model": shown_model(folder), "problems_sha256": digest, _PROMPTS: prompts}
        result |= {**dating.record(), "rows": rows}
        job.publish((json.dumps(result, indent=1) + "\n").encode())
    return EvalResult(out, summary, rows, comparison, [*job.notes, *decoder.notes, *notes])


@dataclass(frozen=True)
class _Question:
    """A problem, and what the model is asked: one of the samples."""

    problem: Problem
    request: Request


def _questions(problems: list[Problem], settings: EvalSettings, decoder: Sampler) -> list[_Question]:
    """Every problem as often as there are samples, rendered by the model's chat template."""
    questions = []
    for problem in problems:
        where = f"{settings.problems}: problem {problem.id}"
        asked = instructed(problem.messages, settings.instruction, where)
        prompt = decoder.prompt(asked, where, settings.template_arguments)
        questions += [
            _Question(problem, Request(prompt, request_key(settings.seed, problem.id, sample)))
            for sample in range(settings.samples)
        ]
    stop_rendering(decoder.tokenizer)
    return questions


def _prompts_sha256(questions: list[_Question]) -> str:
    """SHA-256 of the token ids of all prompts."""
    return hashlib.sha256(json.dumps([list(each.request.prompt) for each in questions]).encode()).hexdigest()


def _identity(decoder: Sampler, judge: Judge, questions: list[_Question], settings: EvalSettings) -> dict[str, Any]:
    """The identity of an evaluation: one that was stopped goes on only with the same."""
    given = [(each.problem.id, each.problem.answer, list(each.request.prompt)) for each in questions]
    return {
        "model": decoder.sha256,
        "answers": judge.how,
        "problems": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
        **settings.model_dump(mode="json", exclude={"problems", *SERVING}),
        **decoder.identity(),
    }


def _rows(journal: Journal) -> list[dict[str, Any]]:
    """The rows of all answers that were given so far."""
    return [row for record in journal.records[1:] for row in record["rows"]]


def _answer_all(
    job: FileJob,
    decoder: Sampler,
    questions: list[_Question],
    settings: EvalSettings,
    judge: Judge,
    progress: Callable[[Any], None],
) -> None:
    """Sample the answers that the journal has not yet, batch by batch, and enter each batch's rows and seconds."""
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    for first in range(len(_rows(job.journal)), len(questions), settings.batch_size):
        began = time.monotonic()
        batch = questions[first : first + settings.batch_size]
        requests = [each.request for each in batch]
        rows = []
        done = list(decoder.decode(requests, sampling, at_a_time(settings.batch_size), progress))
        for question, completion in zip(batch, done, strict=True):
            # The token that stopped it is no part of what was said; the other special ones, such as </think>, are.
            said = completion.token_ids[:-1] if completion.finish == "stop" else completion.token_ids
            text = decoder.tokenizer.decode(said, skip_special_tokens=False)
            rows.append(_row(question.problem, text, len(completion.token_ids), completion.finish, judge))
        seconds = time.monotonic() - began + (decoder.snapshots.seconds if decoder.snapshots else 0)
        with disk_errors(job.partial):
            require_space(job.partial.parent, 0)
        job.journal.append({"rows": rows, "seconds": seconds})
        decoder.forget_batch()


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


def _baseline(path: Path, settings: EvalSettings, digest: str) -> dict[str, Any]:
    """The results in a file, to compare with. Raises `BadInput` unless they were sampled as these are going to be.

    The number of answers decoded together may differ: the random numbers do not depend on it.
    """
    found = load_evaluation(path)
    if found.get("problems_sha256") != digest:
        raise BadInput(f"{path}: answers other problems than these; evaluate both models on the same problems")
    then, now = found.get("settings", {}), settings.model_dump(mode="json")
    earlier_versions = {"template_arguments": {}, "instruction": ""}
    for name in ("samples", "max_new_tokens", "temperature", "top_p", "seed", *earlier_versions):
        if then.get(name, earlier_versions.get(name)) != now[name]:
            raise BadInput(
                f"{path}: was sampled with another {name}: {then.get(name)!r}, now {now[name]!r}; evaluate both models "
                "with the same settings"
            )
    return found
