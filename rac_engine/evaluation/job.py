"""The evaluation job: a model answers problems, with the same random numbers for every model, and predicts tokens.

How an answer is found (extract) and compared with the expected one (written, compare, judge) stands in docs/answers.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, require_space
from rac_engine.base.hubnames import shown_model
from rac_engine.checkpoint import Checkpoint, local_folder
from rac_engine.evaluation.extract import extract_answer
from rac_engine.evaluation.judge import Judge
from rac_engine.evaluation.perplexity import against, load_sources, measure, require_same
from rac_engine.evaluation.problems import Problem, load_problems, problems_sha256
from rac_engine.evaluation.results import load_evaluation
from rac_engine.evaluation.statistics import compare, summarize
from rac_engine.jobs.job import FileJob
from rac_engine.jobs.journal import Journal
from rac_engine.jobs.surroundings import surroundings
from rac_engine.models import Model
from rac_engine.recipe import SERVING, EvalSettings
from rac_engine.traces import (
    Calibration,
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
    """The result of `evaluate`. `summary`, `rows` and `perplexity` are as in the file of results at `path`.

    `summary` and `rows` are empty where no problems were given.
    """

    path: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    comparison: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    perplexity: list[dict[str, Any]] = field(default_factory=list)


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

    Where files are given for perplexity, it is found behind the answers (see `perplexity.measure`), or alone.

    An evaluation found unfinished in OUT.partial goes on, unless `restart`. `baseline` names the results of another
    model on the same problems, to be compared with problem by problem. It keeps to `device_memory` and `host_memory`,
    in bytes: where the model does not fit, its layers are streamed.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out = Path(out)
    # The claim comes before anything is read: a second process is refused at once.
    with FileJob(out, Path(model)) as job:
        problems = [] if settings.problems is None else load_problems(settings.problems, settings.column)
        problems = problems[: settings.limit]
        digest = problems_sha256(problems)
        earlier = None if baseline is None else load_evaluation(Path(baseline))
        if earlier is not None and problems:
            _require_same_sampling(earlier, Path(baseline or ""), settings, digest)
        folder = local_folder(model, progress)
        opened = Model.open(Checkpoint.open(folder)) if settings.perplexity else None
        sources = [] if opened is None else load_sources(opened, settings)
        if earlier is not None:
            require_same(sources, earlier, str(baseline))
        asked = _Asked(
            job=job,
            folder=folder,
            settings=settings,
            problems=problems,
            digest=digest,
            sources=sources,
            earlier=earlier,
            baseline=baseline,
            device=device,
            restart=restart,
            progress=progress,
        )
        limits = device_memory, host_memory
        result = asked.answer(*limits) if problems else asked.begin_without_answers()
        rows: list[dict[str, Any]] = result.pop("rows", [])
        if opened is not None:
            found, notes = asked.predict(opened, *limits)
            result["perplexity"] = found if earlier is None else against(found, earlier, str(baseline))
            result["notes"] += notes
        result |= {"rows": rows} if problems else {}
        job.publish((json.dumps(result, indent=1) + "\n").encode())
    notes = [*job.notes, *asked.notes, *result["notes"][len(asked.planned) :]]
    return EvalResult(
        out, result.get("summary", {}), rows, result.get("comparison"), notes, result.get("perplexity", [])
    )


@dataclass(frozen=True)
class _Asked:
    """An evaluation that can begin: what was asked for, read and checked."""

    job: FileJob
    folder: Path
    settings: EvalSettings
    problems: list[Problem]
    digest: str
    """SHA-256 of the problems."""
    sources: list[Calibration]
    """The tokens that perplexity is found of, by file."""
    earlier: dict[str, Any] | None
    """The baseline's results."""
    baseline: str | Path | None
    device: str
    restart: bool
    progress: Callable[[Any], None]
    notes: list[str] = field(default_factory=list)
    """Remarks for the user alone, which are not entered in the results."""
    planned: list[str] = field(default_factory=list)
    """The first notes of the results, which the user need not be told again."""

    def answer(self, device_memory: int | None, host_memory: int | None) -> dict[str, Any]:
        """Let the model answer all problems; what is to stand in the results. The model is let go of afterwards."""
        job, settings, problems, earlier = self.job, self.settings, self.problems, self.earlier
        longest = max((text_bytes(problem.messages) for problem in problems), default=0)
        sampler = open_sampler(self.folder, self.device, settings, device_memory, host_memory, text=longest)
        with closing(sampler) as decoder:
            # Where a model is compared, a date in its prompts is that of the answers it is compared with.
            moment = read_moment(earlier or {}) or moment_of(job.partial, self.restart)
            with dated(moment) as dating:
                questions = _questions(problems, settings, decoder)
            prompts = _prompts_sha256(questions)
            if earlier is not None and earlier.get(_PROMPTS, prompts) != prompts:
                raise BadInput(
                    f"{self.baseline}: its model was given other prompts than this one: their chat templates or "
                    "tokenizers differ; evaluate both with the same"
                )
            judge = Judge()
            with disk_errors(job.out):
                require_space(job.out.parent, ANSWER_BYTES * len(questions))
            identity = _identity(decoder, judge, questions, settings) | self._sources_identity()
            together = min(at_a_time(settings.batch_size), len(questions))
            threads = decoder.choose_threads(job.partial, together, self.restart)
            decoder.snapshots = snapshots = Snapshots(job.under_way, identity)
            job.open_journal(
                identity,
                restart=self.restart,
                beside={**dating.record(), **threads},
                stopped=lambda: (
                    f"stopped with {len(_rows(job.journal))} of {len(questions)} answers{snapshots.describe()}"
                ),
            )
            with judge:
                _answer_all(job, decoder, questions, settings, judge, self.progress)
            rows = _rows(job.journal)
            seconds = sum(record.get("seconds", 0) for record in job.journal.records[1:])
            reasons = Counter(str(row["finish_reason"]) for row in rows)
            notes = cut_off_notes(decoder.tokenizer, decoder.stops, reasons, settings.max_new_tokens)
            self.notes.extend(decoder.notes)
            self.planned.extend(decoder.planned)
            return {
                "summary": summarize(rows) | {"seconds": seconds, "answers": judge.how},
                "comparison": None if earlier is None else compare(rows, earlier["rows"], str(self.baseline)),
                "notes": [*decoder.planned, *notes],
                "settings": settings.model_dump(mode="json", exclude=set(SERVING)),
                **decoder.record(),
                "model": shown_model(self.folder),
                "problems_sha256": self.digest,
                _PROMPTS: prompts,
                **dating.record(),
                "rows": rows,
            }

    def begin_without_answers(self) -> dict[str, Any]:
        """Open the journal of a job that has no problems; what is to stand in the results."""
        checkpoint = Checkpoint.open(self.folder)
        identity = {"model": checkpoint.sha256(), **surroundings(self.device), **self._sources_identity()}
        self.job.open_journal(identity, restart=self.restart, stopped=lambda: "stopped before all layers were read")
        return {
            "notes": [],
            "settings": self.settings.model_dump(mode="json", exclude=set(SERVING)),
            "model": shown_model(self.folder),
        }

    def predict(
        self, model: Model, device_memory: int | None, host_memory: int | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Perplexity on every file, and notes on it, as the journal has them if an earlier call found them."""
        journal = self.job.journal
        for record in journal.records[1:]:
            if "perplexity" in record:
                return record["perplexity"], record["notes"]
        folder = self.job.out.parent
        found, notes = measure(model, self.sources, self.device, device_memory, host_memory, folder, self.progress)
        remarks = [remark for source in self.sources for remark in source.remarks]
        journal.append({"perplexity": found, "notes": [*remarks, *notes]})
        return found, [*remarks, *notes]

    def _sources_identity(self) -> dict[str, Any]:
        """What decides perplexity, and nothing where none is asked for."""
        digests = [source.sha256 for source in self.sources]
        return {"perplexity": digests} if digests else {}


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
        **settings.model_dump(mode="json", exclude={"problems", "perplexity", "perplexity_tokens", *SERVING}),
        **decoder.identity(),
    }


def _rows(journal: Journal) -> list[dict[str, Any]]:
    """The rows of all answers that were given so far."""
    return [row for record in journal.records[1:] for row in record.get("rows", [])]


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


def _require_same_sampling(found: dict[str, Any], path: Path, settings: EvalSettings, digest: str) -> None:
    """`BadInput` unless the answers `found` in the results at `path` were sampled as these are going to be.

    The number of answers decoded together may differ: the random numbers do not depend on it.
    """
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
