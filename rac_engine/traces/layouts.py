"""Layouts of records, as many programs and data sets write them: where the question, the answers and the thoughts are.

One list serves prompts (`question_of`), problems (`question_of` and `answer_of`) and calibration (`exchange_of`).
docs/traces.md has it as a table. A name is the same in any case, and with spaces for underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.traces.choices import CHOICES, letter_of, with_choices
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

PROMPT_IDS = ("prompt_token_ids", "prompt_ids")
COMPLETION_IDS = ("completion_token_ids", "completion_ids", "output_token_ids", "response_token_ids", "token_ids")
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "query", "instruction")
GENERATIONS = ("completion", "generations", "generation", "responses", "response", "generated_solution", "output")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "correct_answer", "answerkey", "answer_index")
IDS = ("unique_id", "uuid", "problem_id", "question_id", "task_id", "custom_id", "record_id")

_WRITTEN = re.compile(r"\s*(array\()?\[?\s*\{\s*['\"](role|from|content)['\"]\s*:")

_SWITCHES = ("on", "off", "low", "medium", "high", "true", "false", "")  # of `reasoning`, where it is a setting

COLUMNS = frozenset(
    [
        *PROMPT_IDS,
        *COMPLETION_IDS,
        *CONVERSATIONS,
        *QUESTIONS,
        *GENERATIONS,
        *ANSWERS,
        *IDS,
        *THOUGHTS,
        *CHOICES,
        *("id", "kind", "subject", "problem", "prompt", "text", "input", "system", "solution", "reward_model"),
        *("input_ids", "num_prompt_tokens", "attention_mask", "labels", "output_ids", "meta_info", "outputs"),
        *("doc", "model_response", "example", "full_prompt", "predictions", "gold", "input_tokens", "cont_tokens"),
        *("body", "request", "choices", "error", "model", "model_sha256"),
    ]
)
"""Every name that is read: of a wide table only these columns are."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and what was answered to it, before it is tokens.

    `prompt` is a conversation for the chat template, text that was rendered already, or token ids. A completion is in
    words, or token ids.
    """

    prompt: Messages | str | list[int]
    completions: list[Said | list[int]]


class Fields:
    """The fields of a record by their plain names; it notes which were looked at."""

    def __init__(self, record: dict[str, Any], where: str) -> None:
        self.where = where
        self.own = list(record)
        self.values = {plain(name): value for name, value in record.items()} | record
        self.used: set[str] = set()

    def get(self, *names: str) -> Any:
        """The first of these fields that is there; None if there is none."""
        return next((value for _, value in self.all(*names)), None)

    def all(self, *names: str) -> Iterator[tuple[str, Any]]:
        """Those of these fields that are there."""
        for name in names:
            if not absent(value := self.values.get(name)):
                self.used.add(name)
                yield name, value

    def inside(self, name: str) -> Fields | None:
        """The fields of an object that is a field."""
        value = written_down(self.values.get(name))
        if not isinstance(value, dict):
            return None
        return Fields(value, self.where)

    def names(self) -> str:
        """The record's own names, for a message."""
        return ", ".join(f"`{name}`" for name in self.own[:20]) or "nothing"


def plain(name: str) -> str:
    """A column's name as it is looked up: in small letters, with underscores."""
    return name.strip().lower().replace(" ", "_")


def question_of(record: dict[str, Any], where: str) -> Messages:
    """The conversation that a model is to answer: `problem` or `prompt`, else `messages` up to the last user's turn.

    A record may hold the answer too (OpenR1-Math-220k gives `problem`, `answer`, and `messages` with a solution): the
    model must not be shown it. Raises `BadInput` for a conversation of which nothing else is left.
    """
    fields = Fields(record, where)
    asked = _asked(fields)
    if asked is None:
        asked = _text_question(fields) or _conversation(fields)
    if asked is None:
        raise BadInput(f"{where}: needs `problem`, `prompt` or `messages`, with text in it; {_hint(fields, 'problem')}")
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise BadInput(f"{where}: the conversation asks nothing: all of it is the assistant's; give a user's message")
    return asked


def answer_of(record: dict[str, Any], where: str) -> str:
    """The right answer of a problem, as text; empty if the record has none.

    Of GSM8K's `answer` it is what stands behind the last ####, of a list of one its only entry, of a multiple choice
    the letter. Raises `BadInput` for an answer that is neither text nor a number.
    """
    fields = Fields(record, where)
    reward, doc = fields.inside("reward_model"), fields.inside("doc")
    value = next((given for name in ANSWERS if not _missing(given := fields.values.get(name))), None)
    if value is None and reward is not None:
        value = reward.get("ground_truth")
    if value is None and doc is not None:
        value = _gold(doc)
    if value is None:
        value = fields.get("gold")
    value = written_down(value)
    if isinstance(value, list) and value and all(_is_answer(each) for each in value):
        value = ", ".join(str(each).strip() for each in value)
    if value is None or value == []:
        return ""
    if not _is_answer(value):
        raise BadInput(f"{where}: needs `answer`, as text or a number, not {str(value)[:40]!r}")
    if (letter := letter_of(fields.values, value)) is not None:
        return letter
    return str(value).rpartition("####")[2].strip()


def id_of(record: dict[str, Any]) -> tuple[str | None, bool]:
    """A record's id, and whether it is its `id`; (None, False) where it has none, or null for one."""
    fields = Fields(record, "")
    if (own := fields.get("id")) is not None:
        return str(own), True
    other = next((value for _, value in fields.all(*IDS) if isinstance(value, str | int) and str(value)), None)
    return (None if other is None else str(other)), False


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
    raise BadInput(f"{where}: needs `problem`, `prompt` or `messages`, with text in it; {_hint(fields, 'problem')}")


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
        return Exchange(_text_question(fields) or _conversation(fields) or [], [of[True]])
    if there.isdisjoint(COMPLETION_IDS):
        completions: list[Said | list[int]] = [*_generations(fields)]
        if text := fields.get("text"):
            completions = completions or [Said(_text(text, "text", fields.where))]
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
    asked = rendered if rendered is not None else _text_question(fields) or _conversation(fields)
    if asked is None:
        raise BadInput(f"{fields.where}: `outputs` without a `prompt`; {_hint(fields, 'prompt')}")
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
    return Exchange(_user(_text(asked, "query", fields.where)), [*answers])


def _openai(fields: Fields) -> Exchange | None:
    """A request and its reply as OpenAI's batches and servers write them: `body` and `response`, or `choices`."""
    response = fields.inside("response")
    reply = (response.inside("body") or response) if response is not None else fields
    choices = written_down(reply.get("choices"))
    objects = isinstance(choices, list) and bool(choices) and all(isinstance(each, dict) for each in choices)
    if not objects or not any(key in choices[0] for key in ("message", "text", "token_ids")):
        body = fields.inside("body")
        if body is None or (asked := _text_question(body) or _conversation(body)) is None:
            return None
        messages, last = split_answer(asked)
        return Exchange(messages, [] if last is None else [last])
    said = [_choice(Fields(each, fields.where)) for each in choices]
    ids = next((each["prompt_token_ids"] for each in (reply.values, choices[0]) if each.get("prompt_token_ids")), None)
    if ids is not None:
        return Exchange(token_ids(ids, f"{fields.where}: prompt_token_ids"), said)
    if (asked := _asked(fields) or _text_question(fields) or _conversation(fields)) is None:
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
        return Exchange(str(prompt), [Said(_text(said, "completion", where))])
    if (text := fields.get("text")) is None:
        return None
    text = _text(text, "text", where)
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
    asked = _text_question(fields) or _conversation(fields) or []
    if lost := next((each["content"] for each in asked if each["content"].strip() not in text), None):
        raise BadInput(
            f"{where}: `text` does not hold {lost.strip()[:40]!r} of the question beside it; remove one of them, or "
            "call an answer `completion`"
        )
    return Exchange("", [Said(text)])


def _templated(fields: Fields) -> Exchange | None:
    """A question for the chat template, and answers to it in words: TRL, ShareGPT, OpenR1, verl and most data sets."""
    asked = _conversation(fields) or _asked(fields) or _text_question(fields)
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


def _asked(fields: Fields) -> Messages | None:
    """The question of a record that keeps it in an object: a request's `body`, or lighteval's `doc`."""
    for name in ("body", "request"):
        if (body := fields.inside(name)) is not None and (found := _conversation(body) or _text_question(body)):
            return found
    doc = fields.inside("doc")
    text = doc.get("query") if doc is not None else fields.get("example", "full_prompt")
    return None if text is None else _user(_text(text, "query", fields.where))


def _text_question(fields: Fields) -> Messages | None:
    """The question that a record has as a text of its own (or as a conversation in `prompt`)."""
    name = next((n for n in ("problem", "prompt", *QUESTIONS, "input") if not absent(fields.values.get(n))), None)
    if name is None or (name not in ("problem", "prompt") and _has_conversation(fields)):
        return None
    text = fields.get(name)
    if is_conversation(listed := written_down(text)):
        return messages_from(listed, fields.where, name)
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{fields.where}: needs `problem`, `prompt` or `messages`, with text in it; `{name}` has none")
    if _WRITTEN.match(text):
        raise BadInput(
            f"{fields.where}: `{name}` is a conversation written down as text, and not as JSON; save it as one"
        )
    if name == "instruction" and isinstance(more := fields.get("input"), str) and more.strip():
        text = f"{text}\n\n{more}"
    return _user(with_choices(fields.values, text))


def _conversation(fields: Fields) -> Messages | None:
    """The conversation of a record that has one, behind its `system` prompt if that stands apart."""
    for name, value in fields.all(*CONVERSATIONS):
        made = messages_from(value, fields.where, name)
        system = fields.values.get("system") if name != "messages" else None
        if isinstance(system, str) and system.strip() and made[0]["role"] != "system":
            made.insert(0, {"role": "system", "content": system})
        return made
    return None


def _has_conversation(fields: Fields) -> bool:
    return any(not absent(fields.values.get(name)) for name in CONVERSATIONS)


def _is_text(value: Any) -> bool:
    """Whether a prompt is text, and no conversation that was written down as text."""
    return isinstance(value, str) and not is_conversation(written_down(value))


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{name}` should be text")
    return value


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
    return Said(_text(fields.get("text"), "text", fields.where), thought if isinstance(thought, str) else "")


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


def _gold(doc: Fields) -> Any:
    """The right answer of lighteval's `doc`: those of its `choices` that `gold_index` names."""
    choices, index = written_down(doc.get("choices")), written_down(doc.get("gold_index"))
    if not isinstance(choices, list):
        return None
    wanted = index if isinstance(index, list) else [index]
    if not all(type(at) is int and 0 <= at < len(choices) for at in wanted):
        return None
    found = [choices[at] for at in wanted]
    return found[0] if len(found) == 1 else found


def _missing(value: Any) -> bool:
    return value is None or value == []


def _is_answer(value: Any) -> bool:
    return (
        isinstance(value, str | int | float)
        and not isinstance(value, bool)
        and value == value
        and bool(str(value).strip())
    )


def _hint(fields: Fields, role: str) -> str:
    return f"it has {fields.names()}: name the column with --column {role}=NAME"
