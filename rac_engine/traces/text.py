"""Plain text as calibration: read and tokenized piece by piece, as far as the budget goes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rac_engine.base.errors import BadInput
from rac_engine.recipe import TEXT_PREFIX

PIECE = 1 << 20
"""Characters that are tokenized together; a tokenizer takes a hundred bytes of memory and more for each."""

OVERLAP = 1 << 12
"""Characters that two pieces share, to be joined where their tokens are the same."""

_AGREED = 8  # tokens in a row that two pieces are joined by


def text_sequences(path: Path, tokenizer: Any, length: int, role: str = "calibration") -> Iterator[list[int]]:
    """Token ids of a UTF-8 file in sequences of `length`, the last one shorter; read no further than they are taken.

    A file of up to `PIECE` characters is tokenized whole. A longer one is tokenized in pieces that overlap and are
    joined where they agree, so that the tokens are those of the whole; by a tokenizer that does not tell where a token
    lies in the text, in pieces side by side. Raises `BadInput` for what is not a regular file, or not UTF-8;
    `role` is what it is called then.
    """
    held: list[int] = []
    for ids in _tokens(path, tokenizer, role):
        held += ids
        whole = len(held) // length * length
        yield from (held[at : at + length] for at in range(0, whole, length))
        del held[:whole]
    if held:
        yield held


def _tokens(path: Path, tokenizer: Any, role: str) -> Iterator[list[int]]:
    """Token ids of a file, a run of them for each piece."""
    characters = _characters(path, role)
    if not tokenizer.is_fast:
        yield from (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in characters)
        return
    text = next(characters, "")
    ids, starts = _tokenized(tokenizer, text)
    first = 0
    for more in characters:
        shared = text[-OVERLAP:]
        after, places = _tokenized(tokenizer, shared + more)
        begins = len(text) - len(shared)
        end, then = _joint((ids, [start - begins for start in starts]), (after, places), len(shared))
        yield ids[first:end]
        first, text, ids, starts = then, shared + more, after, places
    yield ids[first:]


def _tokenized(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where each one starts in it."""
    made = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return list(made["input_ids"]), [start for start, _ in made["offset_mapping"]]


def _joint(
    before: tuple[Sequence[int], Sequence[int]], after: tuple[Sequence[int], Sequence[int]], shared: int
) -> tuple[int, int]:
    """The first token of one piece that is left to the next one, and which one that is there.

    Both are token ids and the places where they start, counted from the beginning of the `shared` characters, near
    which the next piece may have other tokens than the whole text has, as near their end the piece before.
    """
    (ids, starts), (later, places) = before, after
    at: dict[int, int] = {}
    for index, place in enumerate(places):
        at.setdefault(place, index)
    for index, start in enumerate(starts):
        there = at.get(start)
        if start < shared // 4 or there is None:
            continue
        run = ids[index : index + _AGREED]
        if len(run) == _AGREED and run == later[there : there + _AGREED]:
            return index, there
    middle = shared // 2  # nothing agrees: the text is cut here
    return sum(start < middle for start in starts), sum(place < middle for place in places)


def _characters(path: Path, role: str) -> Iterator[str]:
    """The text of a UTF-8 file in pieces that make `PIECE` characters with the overlap."""
    where = f"{role} {TEXT_PREFIX}{path}"
    try:
        with open(path, encoding="utf-8", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput(f"{where}: is no regular file (a device, a pipe or a folder); give a text file")
            try:
                yield file.read(PIECE)
                while text := file.read(PIECE - OVERLAP):
                    yield text
            except UnicodeDecodeError as error:
                bytes_read = cast(Any, file.buffer).tell()
                at = bytes_read - len(error.object) + error.start
                raise BadInput(f"{where}: not UTF-8 text (byte {at})") from None
    except OSError as error:
        raise BadInput(f"{where}: {error.strerror}") from None


def _open_at_once(name: str, flags: int) -> int:
    """Open a file without waiting for somebody who writes to a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)
