"""Sampling traces of a model on its own prompts into Parquet files, up to a token budget."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, replace_file, require_space, sha256_files, write_file
from rac_engine.base.hubnames import shown_model
from rac_engine.base.sizes import format_count
from rac_engine.checkpoint import local_folder
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.layout import TRACES_JOURNAL, TRACES_SUMMARY
from rac_engine.recipe import SERVING, TraceSettings
from rac_engine.traces.conversation import instructed
from rac_engine.traces.endings import cut_off_notes
from rac_engine.traces.prompts import Prompt, notes_on, prompts_of
from rac_engine.traces.rendering import stop_rendering
from rac_engine.traces.sampler import Sampler
from rac_engine.traces.sampling import Progress, Request, Sampling, at_a_time, request_key
from rac_engine.traces.served import open_sampler, text_bytes
from rac_engine.traces.snapshot import Snapshots
from rac_engine.traces.template import Dating, dated, has_date, moment_of, template_sha256, tokenizer_sha256

TRACE_TOKEN_BYTES = 16  # on disk, of a trace's token at most: its id and the text it stands for, compressed

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("sampling", pa.string()),
        ("model", pa.string()),
        ("model_sha256", pa.string()),
        ("template_sha256", pa.string()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True)
class TraceReport:
    """The result of `generate`: counts of traces and tokens, of which `prompt_tokens` were given, not sampled."""

    out: Path
    traces: int
    tokens: int
    prompt_tokens: int
    finish_reasons: dict[str, int]
    budget: int
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The counts in a line."""
        ends = ", ".join(f"{count} by {reason}" for reason, count in sorted(self.finish_reasons.items()))
        short = "" if self.tokens == self.budget else f"; the prompts gave fewer than the {self.budget:,} asked for"
        return (
            f"{self.traces:,} traces, {self.tokens:,} tokens ({self.prompt_tokens:,} of prompts), ended {ends}{short}"
        )


def generate(
    model: str | Path,
    settings: TraceSettings,
    out: str | Path,
    *,
    device: str = "cpu",
    restart: bool = False,
    device_memory: int | None = None,
    host_memory: int | None = None,
    progress: Callable[[Any], None] = lambda _: None,
) -> TraceReport:
    """Sample traces of `model` into the folder `out`, as Parquet files and a summary.

    The model is a folder, or `org/name[@revision]` on the hub.

    All work happens in OUT.partial; a sampling found unfinished there goes on behind its last whole batches, to the
    same traces, unless `restart`. It keeps to `device_memory` and `host_memory`, in bytes: where the model does not
    fit, its layers are streamed (see `layers`).

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out = Path(out)
    if (out / TRACES_SUMMARY).exists():
        raise BadInput(f"{out}: holds finished traces; choose another folder, or remove it")
    # The claim comes before anything is read: a second process is refused at once.
    with FolderJob(out, "folder", Path(model)) as job, ExitStack() as opened:
        prompts = prompts_of(settings)
        folder = local_folder(model, progress)
        longest = max((text_bytes(prompt.messages) for prompt in prompts), default=0)
        limits = device_memory, host_memory
        decoder = opened.enter_context(closing(open_sampler(folder, device, settings, *limits, text=longest)))
        identity = _identity(decoder, prompts, settings)
        counts = _Counts(settings.tokens)
        moment = moment_of(job.partial / TRACES_JOURNAL, restart)
        threads = decoder.choose_threads(job.partial / TRACES_JOURNAL, at_a_time(settings.batch_size), restart)
        decoder.snapshots = snapshots = Snapshots(job.under_way, identity)
        job.open_journal(
            TRACES_JOURNAL,
            identity,
            restart=restart,
            beside={**Dating(moment, has_date(decoder.tokenizer)).record(), **threads},
            stopped=lambda: (
                f"stopped with {format_count(counts.tokens)} of {format_count(counts.budget)} tokens"
                f"{snapshots.describe()}"
            ),
        )
        _keep_whole_files(job, counts)
        with disk_errors(job.partial):
            require_space(job.partial, TRACE_TOKEN_BYTES * max(counts.left, 0))
        common = _common_columns(shown_model(folder), settings, identity)
        with dated(moment):
            _sample_all(job, decoder, prompts, settings, common, counts, progress)
        notes = notes_on(prompts)
        notes += cut_off_notes(decoder.tokenizer, decoder.stops, counts.reasons, settings.max_new_tokens)
        notes += _notes(decoder, counts)
        report = TraceReport(
            out,
            counts.traces,
            counts.tokens,
            counts.prompt_tokens,
            counts.reasons,
            counts.budget,
            [*job.notes, *decoder.notes, *notes],
        )
        _summarize(job, report, settings, identity | decoder.record(), [*decoder.planned, *notes])
        job.publish()
    return report


def _identity(decoder: Sampler, prompts: list[Prompt], settings: TraceSettings) -> dict[str, Any]:
    """The identity of a sampling: one that was stopped goes on only with the same."""
    asked = json.dumps([[prompt.id, prompt.messages] for prompt in prompts])
    return {
        "model": decoder.sha256,
        "template": template_sha256(decoder.tokenizer),
        "tokenizer": tokenizer_sha256(decoder.tokenizer),
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        **{f"settings.{name}": value for name, value in settings.model_dump(exclude={"prompts", *SERVING}).items()},
        **decoder.identity(),
    }


def _common_columns(model: str, settings: TraceSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """Columns that are the same in every row."""
    sampling: dict[str, Any] = settings.model_dump(include={"temperature", "top_p", "max_new_tokens", "samples"})
    if "engine" in identity:
        sampling["engine"] = identity["engine"]
    return {
        "seed": settings.seed,
        "sampling": json.dumps(sampling),
        "model": model,
        "model_sha256": identity["model"],
        "template_sha256": identity["template"],
    }


def _keep_whole_files(job: FolderJob, counts: _Counts) -> None:
    """Count what the journal's files hold, up to the first that is not as it was written."""
    for number, record in enumerate(job.journal.records[1:], 1):
        file = job.partial / record["file"]
        if not file.exists() or sha256_files(job.partial, [file.name])[file.name] != record["sha256"]:
            job.journal.cut(number)
            break
        counts.add(record["counts"])


def _sample_all(
    job: FolderJob,
    decoder: Sampler,
    prompts: list[Prompt],
    settings: TraceSettings,
    common: dict[str, Any],
    counts: _Counts,
    progress: Callable[[Any], None],
) -> None:
    """Sample batch by batch, behind those in the journal, until the budget is spent or the prompts have ended."""
    asked = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    while counts.left and counts.asked < len(asked):
        batch = asked[counts.asked : counts.asked + _batch_size(settings, counts)]
        rows = _sample(decoder, batch, settings, counts, progress)
        file = f"part-{job.done:05d}.parquet"
        table = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row | common for row in rows], schema=SCHEMA), table, compression="zstd")
        data = table.getvalue().to_pybytes()
        with disk_errors(job.partial):
            require_space(job.partial, len(data))
            replace_file(job.partial / file, data)
        job.journal.append({"file": file, "sha256": hashlib.sha256(data).hexdigest(), "counts": counts.last})
        decoder.forget_batch()
    decoder.forget_batch()  # of one that was entered in the journal by a process that then was killed


def _batch_size(settings: TraceSettings, counts: _Counts) -> int:
    """Traces to sample together: as many as what is left of the budget is likely to take, by the mean of those kept.

    Before there are any, a trace is taken to be half as long as it may become. What a batch gives beyond the budget is
    sampled for nothing.
    """
    length = counts.tokens / counts.traces if counts.traces else settings.max_new_tokens / 2
    return min(settings.batch_size, math.ceil(counts.left / max(length, 1)))


def _summarize(
    job: FolderJob, report: TraceReport, settings: TraceSettings, identity: dict[str, Any], notes: list[str]
) -> None:
    """Write the summary beside the files of the journal, and remove any others."""
    files = {record["file"]: record["sha256"] for record in job.journal.records[1:]}
    summary: dict[str, Any] = {
        "traces": report.traces,
        "tokens": report.tokens,
        "prompt_tokens": report.prompt_tokens,
        "budget": report.budget,
        "finish_reasons": report.finish_reasons,
        "notes": notes,
        "prompts_file": ", ".join(str(source.file) for source in settings.sources),
        "model_sha256": identity["model"],
        "template_sha256": identity["template"],
        "settings": settings.model_dump(mode="json", exclude={"prompts", *SERVING}),
        "files": files,
    }
    summary |= {name: identity[name] for name in ("engine", "servers") if name in identity}
    with disk_errors(job.partial):
        for stray in job.partial.glob("*.parquet"):
            if stray.name not in files:
                faults.unlink(stray)
        write_file(job.partial / TRACES_SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())


class _Counts:
    """Counts of the traces sampled so far, towards the budget of tokens."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.traces = self.tokens = self.prompt_tokens = self.left_out = 0
        self.reasons: dict[str, int] = {}
        self.last: dict[str, Any] = {}

    @property
    def asked(self) -> int:
        """Samples that were asked for so far."""
        return self.traces + self.left_out

    @property
    def left(self) -> int:
        """Tokens that the budget still has."""
        return self.budget - self.tokens

    def with_batch(self, at: Progress) -> str:
        """Progress towards the budget in words, with a batch that is under way."""
        tokens = min(self.tokens + at.tokens, self.budget)
        done = f"{format_count(tokens)} of {format_count(self.budget)} tokens"
        return f"{done} · {self.traces + at.finished} traces done · {format_count(at.rate)} tokens/s"

    def add(self, counts: dict[str, Any]) -> None:
        """Add the counts of a batch."""
        self.traces += counts["traces"]
        self.tokens += counts["tokens"]
        self.prompt_tokens += counts["prompt_tokens"]
        self.left_out += counts.get("left_out", 0)
        for reason, count in counts["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.last = counts


def _sample(
    decoder: Sampler,
    part: list[tuple[Prompt, int]],
    settings: TraceSettings,
    counts: _Counts,
    progress: Callable[[Any], None],
) -> list[dict[str, Any]]:
    """Rows of the traces of `part`, as many as the budget takes."""
    longest = min(settings.max_new_tokens, counts.left)  # the rest would be cut off
    sampling = Sampling(longest, settings.temperature, settings.top_p)
    asked, requests = _requests(decoder, part, settings)
    rows_at_once = at_a_time(settings.batch_size)
    completions = decoder.decode(requests, sampling, rows_at_once, lambda at: progress(counts.with_batch(at)))
    rows: list[dict[str, Any]] = []
    left, reasons, given = counts.left, dict[str, int](), 0
    spent = 0
    for (prompt, sample), request, completion in zip(asked, requests, completions, strict=True):
        if not left:
            break
        ids = list(request.prompt)[:left]
        said = completion.token_ids[: left - len(ids)]
        whole = len(ids) + len(said) == len(request.prompt) + len(completion.token_ids)
        reason = completion.finish if whole else "budget"
        rows.append(
            {
                "id": f"{prompt.id}-{sample}",
                "prompt_token_ids": ids,
                "completion_token_ids": said,
                "text": decoder.tokenizer.decode(ids + said, skip_special_tokens=False),
                "finish_reason": reason,
                "source": prompt.source,
            }
        )
        reasons[reason] = reasons.get(reason, 0) + 1
        left -= len(ids) + len(said)
        spent += len(ids) + len(said)
        given += len(ids)
    counted = {"traces": len(rows), "tokens": spent, "prompt_tokens": given, "reasons": reasons}
    counts.add({**counted, "left_out": len(part) - len(asked)})
    return rows


def _requests(
    decoder: Sampler, part: list[tuple[Prompt, int]], settings: TraceSettings
) -> tuple[list[tuple[Prompt, int]], list[Request]]:
    """Those of `part` that leave room in the model's context for an answer, and what is asked of the decoder."""
    asked, requests = [], []
    for prompt, sample in part:
        where = f"{prompt.source}: prompt {prompt.name}"
        messages = instructed(prompt.messages, settings.instruction, where)
        ids = decoder.prompt(messages, where, settings.template_arguments, fit=False)
        if decoder.context is None or len(ids) < decoder.context:
            asked.append((prompt, sample))
            requests.append(Request(ids, request_key(settings.seed, prompt.id, sample)))
    stop_rendering(decoder.tokenizer)
    return asked, requests


def _notes(decoder: Sampler, counts: _Counts) -> list[str]:
    """Notes on what the model's context cut off or left out."""
    context, cut = f"the model's context of {decoder.context or 0:,} tokens", counts.reasons.get("context", 0)
    notes = [f"{cut:,} traces ended where {context} was full"] if cut else []
    if counts.left_out:
        notes.append(f"{counts.left_out:,} samples were left out: their prompts alone fill {context}")
    return notes
