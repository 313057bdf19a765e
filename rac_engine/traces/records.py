"""The one reader of records: prompts, problems and calibration come from the same files in the same layouts.

A source is a file (see formats), or a folder: of a finished `rac trace`, of a data set that `datasets` saved to disk,
or with files of one kind in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.files import sha256_files
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.jobs.layout import TRACES_JOURNAL, TRACES_SUMMARY
from rac_engine.traces.formats import PACKED, SUFFIXES, records_in
from rac_engine.traces.questions import COLUMNS, plain
from rac_engine.traces.tables import Records

_SUMMARY = 64 << 20  # bytes of the summary beside the traces, or of what `datasets` says of a folder, at most

_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.\w+")
"""How data sets call a file of a split on the hub."""

_ALIKE: dict[str, frozenset[str]] = {
    "problem": frozenset(("problem", "prompt", "question", "messages", "conversations", "conversation", "query")),
    "completion": frozenset(("completion", "generations", "generation", "responses", "response", "output", "text")),
}
"""Fields that a column takes the place of which was named for this role."""


def read_records(source: Path, columns: Mapping[str, str] | None = None, also: Collection[str] = ()) -> Records:
    """(where, record) of every record of a file or folder, with null and NaN left out.

    `columns` says which column plays a role: {"problem": "Frage"}. Of a wide table only known columns are read, those,
    and those in `also`. Raises `BadInput` for what cannot be read, with what it is and what to do.
    """
    columns = columns or {}
    wanted = COLUMNS | set(columns.values()) | set(also)
    known = _known_files(source) if source.is_dir() else {}
    files = files_of(source)
    if missing := known.keys() - {file.name for file in files}:
        raise BadInput(f"{source}: {min(missing)} is missing, by its {TRACES_SUMMARY}; sample the traces again")
    requests = _requests(files, wanted) if len(files) > 1 else {}
    for file in files:
        if known and sha256_files(source, [file.name])[file.name] != known.get(file.name):
            raise BadInput(f"{file}: not the file that {TRACES_SUMMARY} tells of; sample the traces again")
        for where, record in records_in(file, wanted):
            record = _named(record, columns, where)
            if requests:
                if "response" not in record:
                    continue  # the request of an answer in another file
                record = {"body": requests.get(str(record.get("custom_id"))), **record}
            yield where, record


def files_of(source: Path) -> list[Path]:
    """The files of a source in order; `BadInput` that says what a folder holds which has none or several data sets."""
    if not source.is_dir():
        return [source]
    if (source / "dataset_dict.json").exists():
        splits = _told(source / "dataset_dict.json").get("splits")
        names = [name for name in splits if _is_name(name)] if isinstance(splits, list) else []
        if len(names) == 1:
            return files_of(source / names[0])
        raise BadInput(f"{source}: holds the splits {', '.join(names) or 'of none'}; give one, like {source}/train")
    if (source / "state.json").exists() and (source / "dataset_info.json").exists():
        listed = _told(source / "state.json").get("_data_files")
        names = [each.get("filename") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        if not names or not all(_is_name(name) for name in names):
            raise BadInput(f"{source}: its state.json names no files; save the data set again")
        return [source / name for name in names]
    here = sorted(file for file in source.iterdir() if _may_hold_records(file))
    for suffix in SUFFIXES:
        found = [file for file in here if file.name.lower().endswith((suffix, *(suffix + p for p in PACKED)))]
        if suffix in (".json", ".jsonl"):
            found = [file for file in found if file.name not in (TRACES_SUMMARY, TRACES_JOURNAL, "dataset_infos.json")]
        if found:
            splits = sorted({match[1] for file in found if (match := _SPLIT.fullmatch(file.name))})
            if len(splits) > 1:
                raise BadInput(
                    f"{source}: holds the splits {', '.join(splits)}; give a file, or a folder with one split alone"
                )
            return found
    if (source / "data").is_dir():
        return files_of(source / "data")
    folders = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    more = f"; it has the folders {', '.join(folders[:10])}" if folders else ""
    raise BadInput(
        f"{source}: holds no .parquet file, nor any other with records; is this a folder of `rac trace`?{more}"
    )


def _named(record: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A record with its fields by the roles they were given."""
    if not columns:
        return record
    for role, name in columns.items():
        if name not in record:
            there = ", ".join(f"`{each}`" for each in list(record)[:20])
            raise BadInput(f"{where}: has no column {name!r} (column: {role}); it has {there or 'none'}")
    taken = set(columns.values()).union(*(_ALIKE.get(role, {role}) for role in columns))
    rest = {name: value for name, value in record.items() if plain(name) not in taken and name not in taken}
    return rest | {role: record[name] for role, name in columns.items()}


def _requests(files: list[Path], wanted: Collection[str]) -> dict[str, Any]:
    """The requests of a batch by their `custom_id`, where a folder holds files of requests and of answers."""
    kinds = {file: next(records_in(file, wanted), ("", {}))[1] for file in files if _is_lines(file)}
    asked = [file for file, first in kinds.items() if {"custom_id", "body"} <= first.keys() and "response" not in first]
    if not asked or not any({"custom_id", "response"} <= first.keys() for first in kinds.values()):
        return {}
    return {
        str(record.get("custom_id")): record.get("body") for file in asked for _, record in records_in(file, wanted)
    }


def _may_hold_records(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.stat().st_size > 0


def _is_lines(file: Path) -> bool:
    return any(suffix in (".jsonl", ".ndjson", ".json") for suffix in file.suffixes)


def _is_name(name: Any) -> bool:
    """Whether a text names a file or folder within the one that tells of it."""
    return isinstance(name, str) and bool(name) and "/" not in name and "\0" not in name and name not in (".", "..")


def _told(file: Path) -> dict[str, Any]:
    again = "save the data set again"
    return read_json_object(file, _SUMMARY, again, again)


def _known_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a finished `rac trace` has left; nothing for a folder from elsewhere."""
    if (folder / TRACES_JOURNAL).exists() and not (folder / TRACES_SUMMARY).exists():
        raise BadInput(f"{folder}: `rac trace` has not finished here; run it again to go on")
    if not (folder / TRACES_SUMMARY).exists():
        return {}
    again = "sample the traces again"
    files = read_json_object(folder / TRACES_SUMMARY, _SUMMARY, again, again).get("files")
    if not isinstance(files, dict):
        raise BadInput(f"{folder / TRACES_SUMMARY}: `files` should name files and their SHA-256")
    return files
