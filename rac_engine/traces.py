"""Traces: what the model writes on its own prompts, sampled, stored, and read back as calibration tokens.

A trace is a prompt and the completion that the model sampled for it, as token ids: those are the truth. Text is kept
for people, and is never tokenized again (templates drop earlier reasoning, and text that is tokenized again drifts).

The token budget is met exactly, by this rule: traces are taken in the order of the file, all samples of a prompt
before the next prompt; prompt and completion tokens count, and the trace that passes the budget is cut at its end,
which its finish_reason "budget" says. If the prompts run out first there are fewer tokens, and the summary says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rac_engine import faults
from rac_engine.checkpoint import (
    disk_errors,
    publish,
    read_json,
    replace_file,
    require_space,
    sha256_files,
    write_file,
)
from rac_engine.decode import Decoder, Request, Sampling, at_a_time, request_key
from rac_engine.doctor import surroundings
from rac_engine.errors import BadInput, Interrupted
from rac_engine.journal import Journal, claimed, open_journal
from rac_engine.prompts import (
    Messages,
    messages_of,
    question_of,
    read_jsonl,
    render,
    template_sha256,
    tokenizer_sha256,
)
from rac_engine.recipe import TEXT_PREFIX, TraceSettings
from rac_engine.sizes import format_bytes, format_count

Part = Literal["all", "prompt", "completion"]

SUMMARY = "traces.json"
_JOURNAL = "journal.jsonl"
TOKEN_BYTES = 16  # on disk, of a trace's token at most: its id and the text it stands for, compressed
_GROUP = 4 << 30  # bytes in a row group of a Parquet file, at most
_BATCH = 1 << 30  # bytes that 256 rows of traces take, at most

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


@dataclass(frozen=True)
class Sequence:
    """Tokens that the model sees in one go; `weights` [tokens] fp32 say how much each counts in H (None: 1 each)."""

    token_ids: np.ndarray
    prompt_length: int
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Weighting:
    """How much tokens count in H: by what they belong to, by place in the completion, by the traces' own weights.

    `positions` are (share of the completion, weight), linear in between and constant beyond; the three are multiplied.
    """

    completion: float = 1.0
    positions: ListLike[tuple[float, float]] = ()
    column: str | None = None

    def describe(self) -> str:
        parts = [] if self.completion == 1 else [f"completions × {self.completion:g}"]
        parts += ["by position " + ", ".join(f"{s:g}:{w:g}" for s, w in self.positions)] if self.positions else []
        parts += [f"by the column {self.column}"] if self.column else []
        return "weighted " + " and ".join(parts) if parts else ""

    def of(self, prompt: int, completion: int, own: Any, where: str) -> np.ndarray | None:
        """Weights [tokens] fp32 of a trace with so many tokens; None if all are 1. `own` is what its column holds."""
        weights = np.ones(prompt + completion)
        weights[prompt:] *= self.completion
        if self.positions and completion:
            places = np.arange(completion) / max(completion - 1, 1)
            weights[prompt:] *= np.interp(
                places, [share for share, _ in self.positions], [weight for _, weight in self.positions]
            )
        if self.column is not None:
            listed = own if isinstance(own, list) else [own]
            if not all(type(item) in (int, float) and 0 <= item <= 1e6 for item in listed):
                raise BadInput(f"{where}: `{self.column}` should be a number from 0 to 1e6, or a list of such")
            if isinstance(own, list) and len(own) != len(weights):
                raise BadInput(f"{where}: `{self.column}` has {len(own)} weights for {len(weights)} tokens")
            weights *= np.asarray(listed, np.float64)
        return None if (weights == 1).all() else weights.astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """The sequences that calibrate a job. `tokens` is how many count, `sha256` that of ids and weights."""

    source: str
    kind: str
    part: Part
    sequences: list[Sequence]
    weighting: str = ""
    """In words: how much tokens count, where not 1 each."""

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) if s.weights is None else int((s.weights > 0).sum()) for s in self.sequences)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(np.asarray([len(sequence.token_ids), sequence.weights is not None], "<i8").tobytes())
            digest.update(sequence.token_ids.astype("<i8").tobytes())
            if sequence.weights is not None:
                digest.update(sequence.weights.astype("<f4").tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        what = {"all": "", "prompt": ", prompts alone", "completion": ", completions alone"}[self.part]
        weighted = f", {self.weighting}" if self.weighting else ""
        return f"{self.tokens:,} tokens in {len(self.sequences):,} {self.kind}{what}{weighted}"


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
    if (out / SUMMARY).exists():
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
    journal = open_journal(partial, _JOURNAL, identity, restart)
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
        write_file(partial / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
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


def load_calibration(
    source: str,
    *,
    part: Part = "all",
    tokens: int | None = None,
    tokenizer: Any,
    sequence_length: int = 2048,
    weighting: Weighting = Weighting(),
) -> Calibration:
    """Calibration sequences from traces, JSONL or text.

    `source` is a folder of `rac trace` or one of its Parquet files, a JSONL file (see `_from_record` for the layouts
    known; records with a prompt alone are prompt-only calibration), or "text:FILE", which is tokenized whole and cut
    into sequences of `sequence_length`. Of part "prompt" the completion is left away; of "completion" the whole
    sequence is run, but only the completion's tokens count. Sequences are taken in order until `tokens` count, the last
    one cut so that just as many do, whatever the `weighting` says that they count for.

    Raises `BadInput` for a source that is missing, broken (by its line) or empty, and for tokens the model lacks.
    """
    if source.startswith(TEXT_PREFIX):
        pairs, kind = _from_text(Path(source.removeprefix(TEXT_PREFIX)), tokenizer, sequence_length), "pieces of text"
        if part != "all":
            raise BadInput(f"calibration {source}: text has no {part}; leave the part at all")
        if weighting.describe():
            raise BadInput(f"calibration {source}: text has no completions to weight; leave the weights at 1")
    else:
        path = Path(source)
        if not path.exists():
            raise BadInput(f"calibration {source}: not found; give a traces folder or file, a .jsonl or text:FILE")
        if path.is_dir() or path.suffix == ".parquet":
            pairs, kind = _from_parquet(path, weighting.column), "traces"
        else:
            pairs, kind = _from_jsonl(path, tokenizer, weighting.column), "sequences"
    size = len(tokenizer)
    sequences: list[Sequence] = []
    left, completions = tokens, 0
    for number, (prompt, completion, own, where) in enumerate(pairs, 1):
        if left == 0:
            break
        sequence = _sequence(prompt, completion, part, left)
        if sequence is None:
            continue
        ids = sequence.token_ids
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise BadInput(
                f"{where or f'calibration {source}: piece {number}'}: token ids from {ids.min()} to {ids.max()}, but "
                f"the model has {size}; was it made by another model?"
            )
        counted = len(ids) if sequence.weights is None else int((sequence.weights > 0).sum())
        weights = weighting.of(len(prompt), len(completion), own, where)
        if weights is not None:
            weights = weights[: len(ids)] * (1 if sequence.weights is None else sequence.weights)
            sequence = replace(sequence, weights=weights)
        sequences.append(sequence)
        completions += len(ids) > sequence.prompt_length
        if left is not None:
            left -= counted
    if sequences and not any(sequence.weights is None or sequence.weights.any() for sequence in sequences):
        raise BadInput(f"calibration {source}: every token has weight 0")
    if not sequences:
        missing = "completions" if part == "completion" else "tokens"
        raise BadInput(f"calibration {source}: holds no {missing}")
    if kind == "sequences" and not completions:
        kind = "prompts"
    return Calibration(source, kind, part, sequences, weighting.describe())


def _sequence(prompt: ListLike[int], completion: ListLike[int], part: Part, left: int | None) -> Sequence | None:
    """A sequence of which at most `left` tokens count; None if none would."""
    if part == "completion":
        said = np.asarray(completion[:left], np.int64)
        weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(said), np.float32)])
        ids = np.concatenate([np.asarray(prompt, np.int64), said])
        return Sequence(ids, len(prompt), weights) if len(said) else None
    ids = np.asarray([*prompt, *(completion if part == "all" else ())][:left], np.int64)
    return Sequence(ids, min(len(prompt), len(ids))) if len(ids) else None


_Trace = tuple[ListLike[int], ListLike[int], Any, str]
"""Ids of prompt and completion, what the column of weights holds, and where it was read."""


def _from_text(path: Path, tokenizer: Any, length: int) -> Iterable[_Trace]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"calibration {TEXT_PREFIX}{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"calibration {TEXT_PREFIX}{path}: not UTF-8 text (byte {error.start})") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [((), ids[at : at + length], None, "") for at in range(0, len(ids), length)]


def _from_parquet(path: Path, weights: str | None) -> Iterator[_Trace]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"calibration {path}: holds no .parquet file; is this a folder of `rac trace`?")
    columns = ["prompt_token_ids", "completion_token_ids"]
    known = _known_files(path) if path.is_dir() else {}
    if missing := known.keys() - {file.name for file in files}:
        raise BadInput(f"calibration {path}: {min(missing)} is missing, by its {SUMMARY}; sample the traces again")
    for file in files:
        try:
            if known and sha256_files(path, [file.name])[file.name] != known.get(file.name):
                raise BadInput(f"calibration {file}: not the file that {SUMMARY} tells of; sample the traces again")
            with pq.ParquetFile(file) as reader:
                _refuse_bombs(reader.metadata)
                if weights is not None and weights not in reader.schema_arrow.names:
                    raise BadInput(f"calibration {file}: has no column {weights!r} of weights")
                read = columns if weights is None else [*columns, weights]
                row = 0
                for batch in reader.iter_batches(256, columns=read):
                    if batch.nbytes > _BATCH:  # repeated values take next to nothing in the file
                        raise ValueError(f"rows of more than {format_bytes(_BATCH)}")
                    for pair in zip(*(batch.column(name).to_pylist() for name in read), strict=True):
                        row += 1
                        prompt, completion = (
                            _ids(ids, f"calibration {file}: row {row}: {name}")
                            for ids, name in zip(pair[:2], columns, strict=True)
                        )
                        own = pair[2] if len(pair) > 2 else None
                        yield prompt, completion, own, f"calibration {file}: row {row}"
        except BadInput:
            raise
        except Exception as error:  # whatever Arrow finds wrong with a file
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"calibration {file}: not a file of traces ({reason})") from None


def _refuse_bombs(metadata: Any) -> None:
    """A small file can claim to hold any amount: refuse what no row group of traces has.

    Its columns are not asked: pyarrow 26 ends the process where a column's metadata contradict themselves.
    """
    if any(metadata.row_group(index).total_byte_size > _GROUP for index in range(metadata.num_row_groups)):
        raise ValueError(f"a row group larger than {format_bytes(_GROUP)}")


def _known_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a finished `rac trace` has left; nothing for a folder from elsewhere."""
    if (folder / _JOURNAL).exists() and not (folder / SUMMARY).exists():
        raise BadInput(f"calibration {folder}: `rac trace` has not finished here; run it again to go on")
    if not (folder / SUMMARY).exists():
        return {}
    files = read_json(folder / SUMMARY).get("files")
    if not isinstance(files, dict):
        raise BadInput(f"calibration {folder / SUMMARY}: `files` should name files and their SHA-256")
    return files


def _from_jsonl(path: Path, tokenizer: Any, weights: str | None) -> Iterator[_Trace]:
    for where, record in read_jsonl(path):
        if weights is not None and weights not in record:
            raise BadInput(f"{where}: has no field {weights!r} of weights")
        yield *_from_record(record, tokenizer, where), record.get(weights) if weights else None, where


def _from_record(record: dict[str, Any], tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Prompt and completion token ids of a record in any of the layouts known.

    Token ids are taken as they are: `prompt_token_ids` and `completion_token_ids`, or SGLang's `input_ids` with
    `num_prompt_tokens`. Text is tokenized as it stands where it was rendered before (DeepSpeed's `prompt` and
    `completion`, `text`), and by the chat template where it is a conversation (`messages`, `problem`, or `prompt`
    alone).
    """

    def encode(text: Any, name: str) -> list[int]:
        if not isinstance(text, str):
            raise BadInput(f"{where}: `{name}` should be text")
        try:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except TypeError:
            raise BadInput(f"{where}: `{name}` is no text that can be tokenized (a lone surrogate?)") from None

    if "prompt_token_ids" in record or "completion_token_ids" in record:
        return _ids(record.get("prompt_token_ids") or [], where), _ids(record.get("completion_token_ids") or [], where)
    if "input_ids" in record:
        ids, count = _ids(record["input_ids"], where), record.get("num_prompt_tokens", 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(ids):
            raise BadInput(
                f"{where}: `num_prompt_tokens` should lie between 0 and the {len(ids)} tokens of `input_ids`"
            )
        return ids[:count], ids[count:]
    if isinstance(record.get("prompt"), str) and "completion" in record:
        return encode(record["prompt"], "prompt"), encode(record["completion"], "completion")
    if "text" in record:
        return [], encode(record["text"], "text")
    messages = messages_of(record, where)
    if isinstance(record.get("completion"), list):
        messages = messages + messages_of({"messages": record["completion"]}, where)
    if messages[-1]["role"] != "assistant":
        return render(tokenizer, messages, where), []
    prompt, said = render(tokenizer, messages[:-1], where), messages[-1]["content"]
    if tokenizer.decode(prompt).rstrip().endswith("<think>"):  # opened by the template: not twice
        said = said.removeprefix("<think>").removeprefix("\n")
    return prompt, encode(said, "content")


def _ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 1 << 31 for item in value):
        raise BadInput(f"{where}: token ids should be a list of integers")
    return value
