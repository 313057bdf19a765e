"""Prompts and problems from JSONL files, and the one place where a chat template is applied."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rac_engine.errors import BadInput
from rac_engine.sizes import format_bytes

Messages = list[dict[str, str]]

_MAX_LINE = 16 << 20
_MAX_TEMPLATE = 1 << 20  # characters; the largest that models come with have some 30,000
_MAX_RENDERED = 64 << 20  # characters
_RENDERING_BYTES = 1 << 30  # of memory that rendering a prompt may take


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key is given twice, since readers differ in which they believe."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice[:50]!r} is given twice")
    return made


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", object) of every line that is not empty. Raises `BadInput` that names the first broken line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), 1):
                where = f"{path}:{number}"
                if len(line) > _MAX_LINE:
                    raise BadInput(f"{where}: the line is longer than 16 MiB; is this a JSONL file?")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.rstrip(), object_pairs_hook=_once)
                except json.JSONDecodeError as error:
                    place = f"{where}:{error.colno}"
                    raise BadInput(f"{place}: not valid JSON ({error.msg}); mend or remove the line") from None
                except (ValueError, RecursionError) as error:
                    reason = " ".join(str(error).split())[:200]
                    raise BadInput(f"{where}: not valid JSON ({reason}); mend or remove the line") from None
                if not isinstance(value, dict):
                    raise BadInput(f'{where}: should be a JSON object such as {{"problem": …}}')
                yield where, value
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a JSONL file") from None


def question_of(record: dict[str, Any], where: str) -> Messages:
    """The conversation that a model is to answer: `problem` or `prompt`, else `messages` up to the last user's turn.

    A record may hold the answer too (OpenR1-Math-220k gives `problem`, `answer`, and `messages` with a solution): the
    model must not be shown it. Raises `BadInput` for a conversation of which nothing else is left.
    """
    if record.get("problem") is not None or record.get("prompt") is not None:
        record = {key: record.get(key) for key in ("problem", "prompt")}
    messages = messages_of(record, where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadInput(f"{where}: the conversation asks nothing: all of it is the assistant's; give a user's message")
    return messages


def messages_of(record: dict[str, Any], where: str) -> Messages:
    """The conversation that a record asks to continue: its `messages`, else its `problem` or `prompt` as the user's."""
    messages = record.get("messages")
    if messages is None:
        text = record["problem"] if record.get("problem") is not None else record.get("prompt")
        if isinstance(text, list):
            messages = text
        elif isinstance(text, str) and text.strip():
            return [{"role": "user", "content": text}]
        else:
            raise BadInput(f"{where}: needs `problem`, `prompt` or `messages`, with text in it")
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where}: `messages` should be a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadInput(f"{where}: a message should be an object with `role` and `content` as text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


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


def render(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """Token ids of the conversation by the model's chat template, ready for its answer."""
    if not tokenizer.chat_template:
        raise BadInput(f"{where}: the model's tokenizer has no chat template, so a prompt cannot be rendered")
    if len(str(tokenizer.chat_template)) > _MAX_TEMPLATE:
        raise BadInput(f"{where}: the model's chat template has more than {_MAX_TEMPLATE:,} characters; that is none")
    try:
        # transformers renders in jinja's sandbox: a template reaches nothing but what it is given.
        with _memory_limit(_RENDERING_BYTES):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except MemoryError:
        limit = format_bytes(_RENDERING_BYTES)
        raise BadInput(f"{where}: the chat template takes more than {limit} for it; that is no prompt") from None
    except Exception as error:  # a template may refuse a conversation with any exception of its own
        raise BadInput(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:300]}") from None
    if len(text) > _MAX_RENDERED:
        raise BadInput(f"{where}: the chat template makes {len(text):,} characters of it; that is no prompt")
    try:
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    except TypeError:  # its message is about types, though what it cannot take is half a character
        raise BadInput(f"{where}: is no text that can be tokenized (a lone surrogate?); mend or remove it") from None
    if not ids:
        raise BadInput(f"{where}: renders to no token at all")
    return ids


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of what turns text into tokens: the backend's whole state, or the vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode("utf-8", "backslashreplace")).hexdigest()


def template_sha256(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
