"""Sampling traces of a model on its own prompts into Parquet files, up to a token budget."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rac_engine.base import faults
from rac_engine.base.errors import BadInput, Interrupted
from rac_engine.base.files import disk_errors, replace_file, require_space, sha256_files, write_file
from rac_engine.base.sizes import format_count
from rac_engine.jobs.claim import claimed
from rac_engine.jobs.journal import Journal, open_journal
from rac_engine.jobs.layout import TRACES_JOURNAL, TRACES_SUMMARY
from rac_engine.jobs.publish import publish
from rac_engine.jobs.surroundings import surroundings
from rac_engine.recipe import TraceSettings
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.records import Messages, question_of, read_jsonl
from rac_engine.traces.sampling import Request, Sampling, at_a_time, request_key
from rac_engine.traces.template import render, template_sha256, tokenizer_sha256

TOKEN_BYTES = 16  # on disk, of a trace's token at most: its id and the text it stands for, compressed

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
    ]
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a JSONL file. `id` decides the random numbers of its samples."""

    id: str
    messages: Messages


@dataclass(frozen=True)
class TraceReport:
    """What `generate` made: traces and tokens, of which `prompt_tokens` were given and the others sampled."""

    out: Path
    traces: int
    tokens: int
    prompt_tokens: int
    finish_reasons: dict[str, int]
    budget: int

    def describe(self) -> str:
        ends = ", ".join(f"{count} by {reason}" for reason, count in sorted(self.finish_reasons.items()))
        short = "" if self.tokens == self.budget else f"; the prompts gave fewer than the {self.budget:,} asked for"
        return (
            f"{self.traces:,} traces, {self.tokens:,} tokens ({self.prompt_tokens:,} of prompts), ended {ends}{short}"
        )


def load_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with `problem`, `prompt` or `messages`, and an `id` if they like.

    Raises `BadInput` that names the first broken line, and for ids that repeat.
    """
    prompts, ids = list[Prompt](), set[str]()
    for where, record in read_jsonl(path):
        name = str(record.get("id", len(prompts)))
        if name in ids:
            raise BadInput(f"{where}: id {name!r} is there twice")
        ids.add(name)
        prompts.append(Prompt(name, question_of(record, where)))
    if not prompts:
        raise BadInput(f"{path}: holds no prompt")
    return prompts


def generate(
    model: str | Path,
    settings: TraceSettings,
    out: str | Path,
    *,
    device: str = "cpu",
    restart: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
) -> TraceReport:
    """Sample traces of the model in the folder `model` into the folder `out`, as Parquet files and a summary.

    All work happens in OUT.partial; a sampling found unfinished there goes on behind its last whole batches, to the
    same traces, unless `restart`.

    Raises `BadInput` for what cannot work, and `Interrupted` on SIGINT, after which the same call goes on.
    """
    out = Path(out)
    if (out / TRACES_SUMMARY).exists():
        raise BadInput(f"{out}: holds finished traces; choose another folder, or remove it")
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; choose another folder, or remove it")
    with claimed(out) as partial:  # before anything is read: a second process is refused at once
        return _generate_in(partial, str(model), settings, out, device, restart, progress)


def _generate_in(
    partial: Path,
    model: str,
    settings: TraceSettings,
    out: Path,
    device: str,
    restart: bool,
    progress: Callable[[Any], None],
) -> TraceReport:
    """`generate`, in the folder `partial`, which is this process's alone."""
    prompts = load_prompts(settings.prompts)
    decoder = Decoder(model, device)
    identity = {
        "model": decoder.sha256,
        "template": template_sha256(decoder.tokenizer),
        "tokenizer": tokenizer_sha256(decoder.tokenizer),
        "prompts": hashlib.sha256(
            json.dumps([[prompt.id, prompt.messages] for prompt in prompts]).encode()
        ).hexdigest(),
        **{f"settings.{name}": value for name, value in settings.model_dump(exclude={"prompts"}).items()},
        **surroundings(device),
    }
    journal = open_journal(partial, TRACES_JOURNAL, identity, restart)
    try:
        report = _generate(decoder, model, prompts, settings, identity, out, partial, journal, progress)
        publish(partial, out)
    finally:
        if len(journal.records) < 2 and partial.exists():  # nothing worth going on with
            shutil.rmtree(partial)
    return report


def _generate(
    decoder: Decoder,
    model: str,
    prompts: list[Prompt],
    settings: TraceSettings,
    identity: dict[str, Any],
    out: Path,
    partial: Path,
    journal: Journal,
    progress: Callable[[Any], None],
) -> TraceReport:
    """Sample into `partial`, of which `journal` says what is there."""
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    common = {
        "seed": settings.seed,
        "sampling": json.dumps(settings.model_dump(include={"temperature", "top_p", "max_new_tokens", "samples"})),
        "model": model,
        "model_sha256": identity["model"],
        "template_sha256": identity["template"],
    }
    counts = _Counts(settings.tokens)
    for number, record in enumerate(journal.records[1:], 1):
        file = partial / record["file"]
        if not file.exists() or sha256_files(partial, [file.name])[file.name] != record["sha256"]:
            journal.cut(number)
            break
        counts.add(record["counts"])
    with disk_errors(partial):
        require_space(partial, TOKEN_BYTES * max(settings.tokens - counts.tokens, 0))
    asked = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    try:
        for number, first in enumerate(range(0, len(asked), settings.batch_size)):
            if number < len(journal.records) - 1:
                continue
            if counts.tokens >= settings.tokens:
                break
            part = asked[first : first + settings.batch_size]
            rows = _sample(decoder, part, settings, sampling, counts, progress)
            file = f"part-{number:05d}.parquet"
            table = pa.BufferOutputStream()
            pq.write_table(
                pa.Table.from_pylist([row | common for row in rows], schema=SCHEMA), table, compression="zstd"
            )
            data = table.getvalue().to_pybytes()
            with disk_errors(partial):
                require_space(partial, len(data))
                replace_file(partial / file, data)
            journal.append({"file": file, "sha256": hashlib.sha256(data).hexdigest(), "counts": counts.last})
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped with {format_count(counts.tokens)} of {format_count(counts.budget)} tokens"
        ) from None
    report = TraceReport(out, counts.traces, counts.tokens, counts.prompt_tokens, counts.reasons, counts.budget)
    files = {record["file"]: record["sha256"] for record in journal.records[1:]}
    with disk_errors(partial):
        for stray in partial.glob("*.parquet"):
            if stray.name not in files:
                faults.unlink(stray)
        summary = {
            "traces": report.traces,
            "tokens": report.tokens,
            "prompt_tokens": report.prompt_tokens,
            "budget": report.budget,
            "finish_reasons": report.finish_reasons,
            "prompts_file": str(settings.prompts),
            "model_sha256": identity["model"],
            "template_sha256": identity["template"],
            "settings": settings.model_dump(mode="json", exclude={"prompts"}),
            "files": files,
        }
        write_file(partial / TRACES_SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return report


class _Counts:
    """What was sampled so far, towards the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.traces = self.tokens = self.prompt_tokens = 0
        self.reasons: dict[str, int] = {}
        self.last: dict[str, Any] = {}

    def add(self, counts: dict[str, Any]) -> None:
        self.traces += counts["traces"]
        self.tokens += counts["tokens"]
        self.prompt_tokens += counts["prompt_tokens"]
        for reason, count in counts["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.last = counts


def _sample(
    decoder: Decoder,
    part: list[tuple[Prompt, int]],
    settings: TraceSettings,
    sampling: Sampling,
    counts: _Counts,
    progress: Callable[[Any], None],
) -> list[dict[str, Any]]:
    """Rows of the traces of `part`, as many as the budget takes."""
    requests = [
        Request(
            render(decoder.tokenizer, prompt.messages, f"{settings.prompts}: prompt {prompt.id}"),
            request_key(settings.seed, prompt.id, sample),
        )
        for prompt, sample in part
    ]
    before = f"{format_count(counts.tokens)} of {format_count(counts.budget)} tokens kept"
    rows_at_once = at_a_time(settings.batch_size)
    completions = decoder.decode(requests, sampling, rows_at_once, lambda at: progress(f"{before} · {at}"))
    rows: list[dict[str, Any]] = []
    left, reasons, given = counts.budget - counts.tokens, dict[str, int](), 0
    spent = 0
    for (prompt, sample), request, completion in zip(part, requests, completions, strict=True):
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
            }
        )
        reasons[reason] = reasons.get(reason, 0) + 1
        left -= len(ids) + len(said)
        spent += len(ids) + len(said)
        given += len(ids)
    counts.add({"traces": len(rows), "tokens": spent, "prompt_tokens": given, "reasons": reasons})
    return rows
