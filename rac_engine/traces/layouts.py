"""Layouts of calibration records: where prompts, answers and thoughts are, as many programs and data sets write them.

`exchange_of` tries one after the other; what a record asks is found as in `questions`. docs/traces.md has them as a
table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.traces.conversation import (
    THOUGHT,
    THOUGHTS,
    Messages,
    Said,
    absent,
    holds_thought,
    is_conversation,
    messages_from,
    said_in,
    split_answer,
    written_down,
)
from rac_engine.traces.questions import (
    COMPLETION_IDS,
    GENERATIONS,
    PROMPT_IDS,
    Fields,
    asked_in,
    conversation_of,
    hint,
    text_of,
    text_question,
    user,
)

_SWITCHES = ("on", "off", "low", "medium", "high", "true", "false", "")  # of `reasoning`, where it is a setting


@dataclass(frozen=True)
class Exchange:
    """A prompt and what was answered to it, before it is tokens.

    `prompt` is a conversation for the chat template, text that was rendered already, or token ids. A completion is in
    words, or token ids.
    """

    prompt: Messages | str | list[int]
    completions: list[Said | list[int]]


def exchange_of(record: dict[str, Any], where: str) -> Exchange | None:
    """Prompt and completions of a record in any layout known; None for a request that failed.

    Raises `BadInput` for a record in no layout, and for one that has a field with an answer or a thought in it that
    would be lost.
    """
    fields = Fields(record, where)
    if _failed(fields):
        return None
    for layout in _LAYOUTS:
        if (found := layout(fields)) is not None:
            _refuse_loss(fields, found)
            return found
    raise BadInput(f"{where}: needs `problem`, `prompt` or `messages`, with text in it; {hint(fields, 'problem')}")


def token_ids(value: Any, where: str) -> list[int]:
    """A list of token ids, checked."""
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 1 << 31 for item in value):
        raise BadInput(f"{where}: token ids should be a list of integers")
    return value


# Layouts of calibration, in the order in which they are tried: token ids first, since they are the truth.


def _ids(fields: Fields) -> Exchange | None:
    """`prompt_token_ids` with `completion_token_ids` and the like: `rac trace`, TRL, vLLM's servers."""
    given = {name: fields.values[name] for name in (*PROMPT_IDS, *COMPLETION_IDS) if name in fields.values}
    there = {name for name, value in given.items() if not absent(value)}
    if not there or (there.isdisjoint(COMPLETION_IDS) and (fields.get("outputs") or fields.get("choices"))):
        return None
    fields.used |= given.keys()
    of: dict[bool, list[int]] = {False: [], True: []}
    for name, value in given.items():
        of[name in COMPLETION_IDS] = token_ids(value, f"{fields.where}: {name}")
    if there.isdisjoint(PROMPT_IDS):
        if _is_text(prompt := fields.values.get("prompt")):
            return Exchange(str(prompt), [of[True]])
        return Exchange(text_question(fields) or conversation_of(fields) or [], [of[True]])
    if there.isdisjoint(COMPLETION_IDS):
        completions: list[Said | list[int]] = [*_generations(fields)]
        if text := fields.get("text"):
            completions = completions or [Said(text_of(text, "text", fields.where))]
        return Exchange(of[False], completions)
    return Exchange(of[False], [of[True]])


def _padded_ids(fields: Fields) -> Exchange | None:
    """`input_ids` with `num_prompt_tokens` (SGLang), `output_ids`, or `attention_mask` and `labels` (trainers)."""
    if (given := fields.get("input_ids")) is None:
        return None
    ids, where = token_ids(_one_row(given), f"{fields.where}: input_ids"), fields.where
    if (said := fields.get("output_ids")) is not None:
        return Exchange(ids, [token_ids(said, f"{where}: output_ids")])
    count = fields.get("num_prompt_tokens")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(ids)):
        raise BadInput(f"{where}: `num_prompt_tokens` should lie between 0 and the {len(ids)} tokens of `input_ids`")
    asked = [number < (count or 0) for number in range(len(ids))]
    kept = [True] * len(ids)
    if (mask := fields.get("attention_mask")) is not None:
        mask = _one_row(mask)
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(each in (0, 1) for each in mask):
            raise BadInput(f"{where}: `attention_mask` should hold a 0 or a 1 for each of the {len(ids)} `input_ids`")
        kept = [bool(each) for each in mask]
    if count is None and (labels := fields.get("labels")) is not None:
        labels = token_ids(_one_row(labels), f"{where}: labels")
        if len(labels) != len(ids):
            raise BadInput(f"{where}: {len(labels)} `labels` for {len(ids)} `input_ids`")
        first = next((at for at, label in enumerate(labels) if label != -100 and kept[at]), len(ids))
        asked = [number < first for number in range(len(ids))]
    both = [[t for t, keep, a in zip(ids, kept, asked, strict=True) if keep and a == part] for part in (True, False)]
    return Exchange(both[0], [both[1]] if both[1] else [])


def _vllm_outputs(fields: Fields) -> Exchange | None:
    """vLLM's `RequestOutput`: `prompt` or `prompt_token_ids`, and `outputs` with `text` and `token_ids`."""
    outputs = written_down(fields.get("outputs"))
    if not isinstance(outputs, list) or not outputs:
        return None
    ids = fields.get("prompt_token_ids")
    prompt = None if ids is None else token_ids(ids, f"{fields.where}: prompt_token_ids")
    if all(isinstance(each, dict) for each in outputs):
        said = [_choice(Fields(each, fields.where)) for each in outputs]
        text = fields.get("prompt")
        rendered = prompt if prompt is not None else text if isinstance(text, str) else None
    else:
        said, rendered = [*_said(outputs, "outputs", fields.where)], prompt
    asked = rendered if rendered is not None else text_question(fields) or conversation_of(fields)
    if asked is None:
        raise BadInput(f"{fields.where}: `outputs` without a `prompt`; {hint(fields, 'prompt')}")
    return Exchange(asked, said)


def _lighteval(fields: Fields) -> Exchange | None:
    """lighteval's details: `doc` and `model_response`, before 0.10 `full_prompt` and `predictions`."""
    doc, response = fields.inside("doc"), fields.inside("model_response")
    if doc is not None and response is not None:
        ids, prompt, texts = ("input_tokens", "output_tokens"), response.get("input"), response.get("text")
        asked = doc.get("query")
    elif fields.get("full_prompt", "example") is not None and fields.get("predictions") is not None:
        response, ids, prompt = fields, ("input_tokens", "cont_tokens"), fields.get("full_prompt")
        texts, asked = fields.get("predictions"), fields.get("example")
    else:
        return None
    given, said = (written_down(response.get(name)) for name in ids)
    if given and said:
        where = fields.where
        many = said if isinstance(said[0], list) else [said]
        return Exchange(token_ids(_one_row(given), where), [token_ids(each, where) for each in many])
    thoughts = written_down(response.get("reasonings")) or []
    answers = _said(written_down(texts), "text", fields.where)
    if not isinstance(thoughts, list) or not all(absent(t) or isinstance(t, str) for t in thoughts):
        raise BadInput(f"{fields.where}: `reasonings` should be a list of texts")
    if len(thoughts) == len(answers):
        answers = [Said(s.text, "" if absent(t) else t) for s, t in zip(answers, thoughts, strict=True)]
    prompt = written_down(prompt)
    if is_conversation(prompt):
        return Exchange(messages_from(prompt, fields.where), [*answers])
    if isinstance(prompt, str) and prompt:
        return Exchange(prompt, [*answers])
    return Exchange(user(text_of(asked, "query", fields.where)), [*answers])


def _openai(fields: Fields) -> Exchange | None:
    """A request and its reply as OpenAI's batches and servers write them: `body` and `response`, or `choices`."""
    response = fields.inside("response")
    reply = (response.inside("body") or response) if response is not None else fields
    choices = written_down(reply.get("choices"))
    objects = isinstance(choices, list) and bool(choices) and all(isinstance(each, dict) for each in choices)
    if not objects or not any(key in choices[0] for key in ("message", "text", "token_ids")):
        body = fields.inside("body")
        if body is None or (asked := text_question(body) or conversation_of(body)) is None:
            return None
        messages, last = split_answer(asked)
        return Exchange(messages, [] if last is None else [last])
    said = [_choice(Fields(each, fields.where)) for each in choices]
    ids = next((each["prompt_token_ids"] for each in (reply.values, choices[0]) if each.get("prompt_token_ids")), None)
    if ids is not None:
        return Exchange(token_ids(ids, f"{fields.where}: prompt_token_ids"), said)
    if (asked := asked_in(fields) or text_question(fields) or conversation_of(fields)) is None:
        raise BadInput(
            f"{fields.where}: an answer without its prompt, which the batch's input file has under the same "
            "`custom_id`; put both files into a folder and give that"
        )
    return Exchange(asked, said)


def _rendered(fields: Fields) -> Exchange | None:
    """Text that was rendered already: `prompt` with `completion` (DeepSpeed), or with `text` or `output_ids` (SGLang).

    A `text` alone is a whole sequence.
    """
    prompt, where = fields.values.get("prompt"), fields.where
    plain_prompt = _is_text(prompt)
    if plain_prompt and (ids := fields.get("output_ids")) is not None:
        fields.used |= {"prompt", "text"}
        return Exchange(str(prompt), [token_ids(ids, f"{where}: output_ids")])
    if plain_prompt and not absent(said := fields.values.get("completion")) and not isinstance(said, list):
        fields.used |= {"prompt", "completion"}
        return Exchange(str(prompt), [Said(text_of(said, "completion", where))])
    if (text := fields.get("text")) is None:
        return None
    text = text_of(text, "text", where)
    if plain_prompt and prompt:
        fields.used.add("prompt")
        if text.startswith(str(prompt)):
            return Exchange(str(prompt), [Said(text[len(str(prompt)) :])])
        if str(prompt) in text and fields.get("meta_info") is None:
            raise BadInput(
                f"{where}: `text` holds the `prompt` within it, so it may be the whole sequence or the answer alone; "
                "remove `prompt`, or call the answer `completion`"
            )
        return Exchange(str(prompt), [Said(text)])
    asked = text_question(fields) or conversation_of(fields) or []
    if lost := next((each["content"] for each in asked if each["content"].strip() not in text), None):
        raise BadInput(
            f"{where}: `text` does not hold {lost.strip()[:40]!r} of the question beside it; remove one of them, or "
            "call an answer `completion`"
        )
    return Exchange("", [Said(text)])


def _templated(fields: Fields) -> Exchange | None:
    """A question for the chat template, and answers to it in words: TRL, ShareGPT, OpenR1, verl and most data sets."""
    asked = conversation_of(fields) or asked_in(fields) or text_question(fields)
    if asked is None:
        return None
    if is_conversation(turns := written_down(fields.values.get("completion"))) and len(turns) > 1:
        fields.used.add("completion")
        asked += messages_from(turns, fields.where, "completion")
    messages, last = split_answer(asked)
    answers = _generations(fields)
    if not answers and last is not None:
        answers, last = [last], None
    thoughts = [
        (name, value)
        for name, value in fields.all(*THOUGHTS)
        if not (isinstance(value, str) and value.lower() in _SWITCHES) and not isinstance(value, bool)
    ]
    for name, value in thoughts:
        each = value if isinstance(value, list) else [value]
        if len(each) != len(answers) or not all(isinstance(thought, str) for thought in each):
            raise BadInput(
                f"{fields.where}: `{name}` would be lost: there is no answer for each thought; give the answer behind "
                "it as `response`"
            )
        answers = [s if t in s.text else Said(s.text, t) for s, t in zip(answers, each, strict=True)]
    if last is not None and not any(_same(last, answer) for answer in answers):
        answers.append(last)
    if not messages:
        raise BadInput(f"{fields.where}: the conversation asks nothing: all of it is the assistant's")
    return Exchange(messages, [*answers])


_LAYOUTS: tuple[Callable[[Fields], Exchange | None], ...] = (
    _ids,
    _padded_ids,
    _vllm_outputs,
    _lighteval,
    _openai,
    _rendered,
    _templated,
)


def _is_text(value: Any) -> bool:
    """Whether a prompt is text, and no conversation that was written down as text."""
    return isinstance(value, str) and not is_conversation(written_down(value))


def _one_row(value: Any) -> Any:
    """The only row of a list of lists, as tokenizers give them for tensors; else the value."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


def _generations(fields: Fields) -> list[Said]:
    """The answers that a record has beside its question, each once."""
    found: list[Said] = []
    for name, value in fields.all(*(name for name in GENERATIONS if name not in fields.used)):
        found += [each for each in _said(value, name, fields.where) if each not in found]
    return found


def _said(value: Any, name: str, where: str) -> list[Said]:
    """Answers of a field: a text, a list of texts, or a message or more of the assistant's."""
    if is_conversation(listed := written_down(value)):
        return [said_in(each, where) for each in listed]
    if isinstance(value, dict):
        return [said_in(value, where)]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) or absent(text) for text in texts):
        raise BadInput(f"{where}: `{name}` should be text, or a list of texts")
    return [Said(text) for text in texts if isinstance(text, str) and text.strip()]


def _choice(fields: Fields) -> Said | list[int]:
    """What a server chose: token ids if it gave them, else its message or text."""
    if (ids := fields.get("token_ids")) is not None:
        return token_ids(ids, f"{fields.where}: token_ids")
    if (message := fields.get("message")) is not None:
        return said_in(message, fields.where)
    thought = fields.get(*THOUGHTS)
    return Said(text_of(fields.get("text"), "text", fields.where), thought if isinstance(thought, str) else "")


def _same(one: Said, other: Said) -> bool:
    return one.text.strip() == other.text.strip() or bool(one.thought and one.thought.strip() in other.text)


def _failed(fields: Fields) -> bool:
    """Whether a request of a batch has an error in place of an answer."""
    response = fields.inside("response")
    status = None if response is None else response.get("status_code")
    asked = "custom_id" in fields.values and "response" in fields.values
    return (isinstance(status, int) and status >= 400) or (asked and bool(fields.values.get("error")))


def _refuse_loss(fields: Fields, found: Exchange) -> None:
    """`BadInput` for a field with an answer or a thought in it that is not in what was found."""
    words = [found.prompt] if isinstance(found.prompt, str) else []
    said = [each for each in found.completions if isinstance(each, Said)]
    words += [text for each in said for text in (each.text, each.thought, "".join([*words, each.text]))]
    by_ids = len(said) < len(found.completions) or (
        isinstance(found.prompt, list) and not is_conversation(found.prompt)
    )
    for name, value in fields.values.items():
        answers = name in (*GENERATIONS, *THOUGHTS, "text", "outputs") and name not in fields.used
        if by_ids or absent(value) or not (answers or holds_thought(name, value)):
            continue
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        texts = [text for text in texts if text.lower() not in _SWITCHES]
        if any(not any(text.strip() in each for each in words) for text in texts):
            raise BadInput(
                f"{fields.where}: `{name}` is not read here and would be lost; a thought goes into `{THOUGHT}` beside "
                "`response`, and an answer into `completion` (or name its column, --column completion=NAME)"
            )
