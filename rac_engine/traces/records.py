"""Prompts and problems from JSONL files, and the one place where a chat template is applied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import loads

Messages = list[dict[str, str]]

_MAX_LINE = 16 << 20


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
                    value = loads(line.rstrip())
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


def instructed(messages: Messages, instruction: str, where: str) -> Messages:
    """The conversation with an instruction in its last user's message: below it, or around it at `{prompt}`.

    Raises `BadInput` for a conversation without a user.
    """
    if not instruction:
        return messages
    last = max((index for index, each in enumerate(messages) if each["role"] == "user"), default=None)
    if last is None:
        raise BadInput(f"{where}: no message is the user's, so an instruction has no place")
    form = instruction if "{prompt}" in instruction else "{prompt}\n" + instruction
    content = form.replace("{prompt}", messages[last]["content"])
    return [*messages[:last], {"role": "user", "content": content}, *messages[last + 1 :]]


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
