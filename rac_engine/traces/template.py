"""The one place where a chat template is applied."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rac_engine.base.errors import BadInput
from rac_engine.jobs.journal import first_record
from rac_engine.traces.conversation import Messages
from rac_engine.traces.rendering import Unrendered, renderer_of

_MAX_TEMPLATE = 1 << 20  # characters; the largest that models come with have some 30,000

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


@dataclass
class Dating:
    """The moment that dates in prompts are taken from, and whether any was asked for."""

    moment: datetime
    used: bool = False

    def record(self) -> dict[str, str]:
        """What a journal is to hold of it: nothing where no template has a date, so that the same job has its bytes."""
        return {RENDERED_AT: self.moment.isoformat()} if self.used else {}


_DATING: ContextVar[Dating | None] = ContextVar("dating", default=None)

RENDERED_AT = "rendered_at"
"""The key of the moment of a job's prompts, in the first record of its journal and in results."""


@contextmanager
def dated(moment: datetime) -> Iterator[Dating]:
    """Within, chat templates that put in a date take it from this moment: a job that goes on renders the same."""
    dating = Dating(moment)
    before = _DATING.set(dating)
    try:
        yield dating
    finally:
        _DATING.reset(before)


def has_date(tokenizer: Any) -> bool:
    """Whether the chat template may put in a date."""
    return "strftime_now" in str(tokenizer.chat_template)


def moment_of(journal: Path, restart: bool = False) -> datetime:
    """The moment at which a job's prompts are rendered: its journal's if it was begun, else that of `dated`, or now."""
    if (begun := read_moment({} if restart else first_record(journal))) is not None:
        return begun
    dating = _DATING.get()
    return datetime.now().replace(microsecond=0) if dating is None else dating.moment


def read_moment(record: Mapping[str, Any]) -> datetime | None:
    """The moment in a record of a journal or in results, if it has one."""
    try:
        return datetime.fromisoformat(record[RENDERED_AT])
    except (KeyError, TypeError, ValueError):
        return None


def render(tokenizer: Any, messages: Messages, where: str, arguments: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of the conversation by the model's chat template, ready for its answer.

    `arguments` are the template's own, such as `enable_thinking`. Raises `BadInput` for one that it does not know.
    """
    ids = encode(tokenizer, render_text(tokenizer, messages, where, arguments), where)
    if not ids:
        raise BadInput(f"{where}: renders to no token at all")
    return ids


def encode(tokenizer: Any, text: str, where: str) -> list[int]:
    """Token ids of text as it stands, with no special token added."""
    try:
        return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    except TypeError:  # its message is about types, though what it cannot take is half a character
        raise BadInput(f"{where}: is no text that can be tokenized (a lone surrogate?); mend or remove it") from None


def render_text(
    tokenizer: Any,
    messages: Messages,
    where: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    answered: bool = False,
) -> str:
    """The conversation as text by the model's chat template: ready for an answer, or with one at its end."""
    if not tokenizer.chat_template:
        raise BadInput(f"{where}: the model's tokenizer has no chat template, so a prompt cannot be rendered")
    if len(str(tokenizer.chat_template)) > _MAX_TEMPLATE:
        raise BadInput(f"{where}: the model's chat template has more than {_MAX_TEMPLATE:,} characters; that is none")
    for name in arguments or ():
        if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise BadInput(f"{where}: the model's chat template has no argument {name!r} (template_arguments)")
    dating = _DATING.get() or Dating(datetime.now())
    dating.used |= has_date(tokenizer)
    try:
        return renderer_of(tokenizer).render(messages, arguments or {}, dating.moment, answered)
    except Unrendered as error:
        raise BadInput(f"{where}: the chat template {error}") from None


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of what turns text into tokens: the backend's whole state, or the vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode("utf-8", "backslashreplace")).hexdigest()


def template_sha256(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
