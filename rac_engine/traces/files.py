"""Readers of traces and text in every layout that is known: token ids of prompt and completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rac_engine.base.errors import BadInput
from rac_engine.base.files import sha256_files
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.base.sizes import format_bytes
from rac_engine.jobs.layout import TRACES_JOURNAL, TRACES_SUMMARY
from rac_engine.recipe import TEXT_PREFIX
from rac_engine.traces.records import messages_of, read_jsonl
from rac_engine.traces.template import render

_GROUP = 4 << 30  # bytes in a row group of a Parquet file, at most

_SUMMARY = 64 << 20  # bytes of the summary beside the traces, at most

_BATCH = 1 << 30  # bytes that 256 rows of traces take, at most

Trace = tuple[Sequence[int], Sequence[int], Any, str]

"""Ids of prompt and completion, what the column of weights holds, and where it was read."""


def from_text(path: Path, tokenizer: Any, length: int) -> Iterable[Trace]:
    """A text file, tokenized whole and cut into pieces of `length` tokens."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"calibration {TEXT_PREFIX}{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"calibration {TEXT_PREFIX}{path}: not UTF-8 text (byte {error.start})") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [((), ids[at : at + length], None, "") for at in range(0, len(ids), length)]


def from_parquet(path: Path, weights: str | None) -> Iterator[Trace]:
    """Traces of a Parquet file or a folder of them; `weights` names their column of weights, if they have one."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"calibration {path}: holds no .parquet file; is this a folder of `rac trace`?")
    columns = ["prompt_token_ids", "completion_token_ids"]
    known = _known_files(path) if path.is_dir() else {}
    if missing := known.keys() - {file.name for file in files}:
        raise BadInput(
            f"calibration {path}: {min(missing)} is missing, by its {TRACES_SUMMARY}; sample the traces again"
        )
    for file in files:
        try:
            if known and sha256_files(path, [file.name])[file.name] != known.get(file.name):
                raise BadInput(
                    f"calibration {file}: not the file that {TRACES_SUMMARY} tells of; sample the traces again"
                )
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


def _summary(folder: Path) -> dict[str, Any]:
    again = "sample the traces again"
    return read_json_object(folder / TRACES_SUMMARY, _SUMMARY, again, again)


def _known_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a finished `rac trace` has left; nothing for a folder from elsewhere."""
    if (folder / TRACES_JOURNAL).exists() and not (folder / TRACES_SUMMARY).exists():
        raise BadInput(f"calibration {folder}: `rac trace` has not finished here; run it again to go on")
    if not (folder / TRACES_SUMMARY).exists():
        return {}
    files = _summary(folder).get("files")
    if not isinstance(files, dict):
        raise BadInput(f"calibration {folder / TRACES_SUMMARY}: `files` should name files and their SHA-256")
    return files


def from_jsonl(path: Path, tokenizer: Any, weights: str | None) -> Iterator[Trace]:
    """Traces of a JSONL file (see `_from_record`); `weights` names their field of weights, if they have one."""
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
