"""Conversations as files have them: messages with a role, a text, and sometimes the thought apart from the text."""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

from rac_engine.base.errors import BadInput

Messages = list[dict[str, str]]
"""Messages with `role`, `content` and, if there is one, the thought before it as `reasoning_content`."""

THOUGHT = "reasoning_content"

THOUGHTS = (THOUGHT, "reasoning", "thinking")
"""Names of a message's thought: of DeepSeek's and other servers, of later vLLM, and of gpt-oss and Ollama."""

_OTHER_THOUGHT = re.compile(
    r"(.*_)?(thoughts?|cot|chain_of_thought|rationale|scratchpad|analysis|reasoning_(text|trace)|"
    r"thinking_(text|trace|trajectory|trajectories))"
)
"""Names that hold a thought in some files, and are not read."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Who speaks, by the `from` of ShareGPT."""

_MAX_TEXT = 1 << 20  # characters of a text that may be a list or an object written down


@dataclass(frozen=True)
class Said:
    """An answer in words. With a `thought` and no `text` it was cut off while it thought."""

    text: str
    thought: str = ""


def absent(value: Any) -> bool:
    """Whether a field is as good as not there: null, or NaN, which is how pandas writes it."""
    return value is None or (isinstance(value, float) and value != value)


def holds_thought(name: str, value: Any) -> bool:
    """Whether a field that is not read looks as if it held a thought."""
    texts = value if isinstance(value, list) else [value]
    return bool(_OTHER_THOUGHT.fullmatch(name)) and any(isinstance(text, str) and text.strip() for text in texts)


def written_down(value: Any) -> Any:
    """The list or object that a text stands for, in JSON or as Python writes it; any other value as it is.

    Tables that went through pandas or CSV, and lighteval's details, hold such texts.
    """
    ends = {"[": "]", "{": "}"}
    if not isinstance(value, str) or len(value) > _MAX_TEXT or ends.get(value.lstrip()[:1]) != value.rstrip()[-1:]:
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return found if isinstance(found, list | dict) else value
    return value


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in value)
    )


def messages_from(value: Any, where: str, name: str = "messages") -> Messages:
    """Messages from a list of {role, content} or of ShareGPT's {from, value}, or from such a list as text."""
    value = written_down(value)
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: `{name}` should be a list of {{role, content}}")
    return [_message(each, where) for each in value]


def split_answer(messages: Messages) -> tuple[Messages, Said | None]:
    """A conversation up to its last message, and that one if it is the assistant's."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    last = messages[-1]
    return messages[:-1], Said(last["content"], last.get(THOUGHT, ""))


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


def said_in(message: Any, where: str) -> Said:
    """What the assistant says in a message, whoever it says that it is from."""
    made = _message({"role": "assistant", **message} if isinstance(message, dict) else message, where)
    return Said(made["content"], made.get(THOUGHT, ""))


def _message(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise BadInput(f"{where}: a message should be an object with `role` and `content` as text")
    role, content = given.get("role"), given.get("content")
    if role is None and "from" in given:
        role, content = _ROLES.get(str(given["from"]).lower()), given.get("value")
        if role is None:
            raise BadInput(f"{where}: a message is `from` {str(given['from'])[:40]!r}; known are {', '.join(_ROLES)}")
    thought = next((given[name] for name in THOUGHTS if isinstance(given.get(name), str) and given[name]), "")
    if isinstance(content, list):
        content, within = _joined(content, where)
        thought = thought or within
    if content is None and thought:
        content = ""  # it was cut off while it thought
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadInput(f"{where}: a message should be an object with `role` and `content` as text")
    lost = [name for name in ("tool_calls", "function_call") if given.get(name)]
    lost += [name for name, value in given.items() if holds_thought(str(name), value)]
    if lost:
        raise BadInput(
            f"{where}: `{lost[0]}` of a message is not read and would be lost; a thought goes into `{THOUGHT}`, and "
            "calls of tools into `content` as the model writes them"
        )
    return {"role": role, "content": content, **({THOUGHT: thought} if thought else {})}


def _joined(parts: list[Any], where: str) -> tuple[str, str]:
    """Text and thought of a message whose content is a list of parts."""
    text, thought = "", ""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        inside = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            inside = part.get("thinking", inside)
            if isinstance(inside, list):
                inside = _joined(inside, where)[0]
            thought += inside if isinstance(inside, str) else ""
        elif isinstance(inside, str) and kind in (None, "text", "input_text", "output_text"):
            text += inside
        else:
            raise BadInput(f"{where}: a message holds {kind or 'something'} beside text; only text is read")
    return text, thought
