"""Where a model's chat template puts thoughts: answers in words become what the model itself would have written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.traces.conversation import THOUGHTS, Messages, Said
from rac_engine.traces.template import encode, render_text

_SWITCHES = ("enable_thinking", "thinking")
"""Arguments by which templates turn thinking on."""


@dataclass(frozen=True)
class Tags:
    """What opens and closes a thought."""

    opening: str
    closing: str


_TAGS = (
    Tags("<think>", "</think>"),
    Tags("<thought>", "</thought>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("◁think▷", "◁/think▷"),
)


def answer_ids(
    tokenizer: Any, messages: Messages, said: Said, where: str, given: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation by the chat template, and of the answer to it as the model would have written it.

    A thought goes where the template puts it: as its own message field has it, where it knows one; else between the
    tags that the template opens or names, by default <think> and </think>. `given` are arguments of the template; those
    that switch thinking on are added where a thought needs it. No token that ends a message is added.
    Raises `BadInput` where the template closes the thought before the answer begins.
    """
    thinks = bool(said.thought) or _thinks(said.text)
    arguments = dict(given)
    prompt = render_text(tokenizer, messages, where, arguments)
    if thinks and _closed(prompt) is not None:
        template = str(tokenizer.chat_template)
        arguments = {name: True for name in _SWITCHES if re.search(rf"\b{name}\b", template)} | arguments
        prompt = render_text(tokenizer, messages, where, arguments)
        if (tags := _closed(prompt)) is not None:
            raise BadInput(
                f"{where}: the model's chat template ends with {tags.closing}, so that a thought has no place behind "
                "it; remove the thought, or give token ids"
            )
    text = None
    if said.thought:
        text = _by_template(tokenizer, messages, said, where, arguments, prompt)
    if text is None:
        text = _by_tags(str(tokenizer.chat_template), said, prompt)
    ids = encode(tokenizer, prompt, where)
    if not ids:
        raise BadInput(f"{where}: renders to no token at all")
    return ids, encode(tokenizer, text, where)


def _thinks(text: str) -> bool:
    return any(text.lstrip().startswith(tags.opening) for tags in _TAGS)


def _opened(prompt: str) -> Tags | None:
    return next((tags for tags in _TAGS if prompt.rstrip().endswith(tags.opening)), None)


def _closed(prompt: str) -> Tags | None:
    return next((tags for tags in _TAGS if prompt.rstrip().endswith(tags.closing)), None)


def _by_template(
    tokenizer: Any, messages: Messages, said: Said, where: str, arguments: Mapping[str, Any], prompt: str
) -> str | None:
    """The answer as a template writes it that knows a message's thought; None for one that does not."""
    template = str(tokenizer.chat_template)
    known = [name for name in THOUGHTS if re.search(rf"""(\.|['"]){name}\b""", template)]
    if not known:
        return None
    answer = {"role": "assistant", "content": said.text, **dict.fromkeys(known, said.thought)}
    try:
        whole = render_text(tokenizer, [*messages, answer], where, arguments, answered=True)
    except BadInput:  # it may take no answer that was cut off, say
        return None
    thought, text = said.thought.strip(), said.text.strip()
    if not whole.startswith(prompt) or thought not in whole[len(prompt) :]:
        return None
    made = whole[len(prompt) :]
    last = text or thought
    end = made.rfind(last)
    return made[: end + len(last)] if end >= made.find(thought) else None


def _by_tags(template: str, said: Said, prompt: str) -> str:
    """The answer with its thought between tags, of which the prompt may have opened the first already."""
    opened = _opened(prompt)
    tags = opened or next((tags for tags in _TAGS if tags.opening in template or tags.closing in template), _TAGS[0])
    thought, text = said.thought, said.text
    if not thought or thought.strip() in text:
        return _without(text, tags.opening) if opened is not None else text
    thought = _without(thought.strip(" "), tags.opening)
    if thought.rstrip().endswith(tags.closing):
        thought = thought.rstrip().removesuffix(tags.closing)
    starts = opened is not None and prompt.endswith("\n")
    made = ("" if opened is not None else tags.opening) + ("" if starts else "\n") + thought.lstrip("\n")
    if not text:
        return made  # it was cut off while it thought
    made += ("" if made.endswith("\n") else "\n") + tags.closing
    return made + ("" if text.startswith("\n") else "\n") + text


def _without(text: str, opening: str) -> str:
    return text.removeprefix(opening).removeprefix("\n") if text.startswith(opening) else text
