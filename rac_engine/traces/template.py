"""The one place where a chat template is applied."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes
from rac_engine.traces.conversation import Messages

_MAX_TEMPLATE = 1 << 20  # characters; the largest that models come with have some 30,000

_MAX_RENDERED = 64 << 20  # characters

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}

_RENDERING_BYTES = 1 << 30  # of memory that rendering a prompt may take


@contextmanager
def _memory_limit(count: int) -> Iterator[None]:
    """Let this process take at most `count` bytes more than now, or raise `MemoryError`: {{ "x" * 10 ** 12 }} is short.

    What other threads take meanwhile counts too; there are none with work to do where prompts are rendered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + count
    limits = [most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
    try:
        # transformers renders in jinja's sandbox: a template reaches nothing but what it is given.
        with _memory_limit(_RENDERING_BYTES):
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=not answered, tokenize=False, **(arguments or {})
            )
    except MemoryError:
        limit = format_bytes(_RENDERING_BYTES)
        raise BadInput(f"{where}: the chat template takes more than {limit} for it; that is no prompt") from None
    except Exception as error:  # a template may refuse a conversation with any exception of its own
        raise BadInput(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:300]}") from None
    if len(text) > _MAX_RENDERED:
        raise BadInput(f"{where}: the chat template makes {len(text):,} characters of it; that is no prompt")
    return str(text)


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of what turns text into tokens: the backend's whole state, or the vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode("utf-8", "backslashreplace")).hexdigest()


def template_sha256(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
