"""What a record asks, what the right answer is, and what it is called: the fields of records as many programs and data
sets write them.

A name is the same in any case, and with spaces for underscores. docs/traces.md has all layouts as a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.traces.choices import CHOICES, letter_of, with_choices
from rac_engine.traces.conversation import THOUGHTS, Messages, absent, is_conversation, messages_from, written_down

PROMPT_IDS = ("prompt_token_ids", "prompt_ids")
COMPLETION_IDS = ("completion_token_ids", "completion_ids", "output_token_ids", "response_token_ids", "token_ids")
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "query", "instruction")
GENERATIONS = ("completion", "generations", "generation", "responses", "response", "generated_solution", "output")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "correct_answer", "answerkey", "answer_index")
IDS = ("unique_id", "uuid", "problem_id", "question_id", "task_id", "custom_id", "record_id")

_WRITTEN = re.compile(r"\s*(array\()?\[?\s*\{\s*['\"](role|from|content)['\"]\s*:")

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
    asked = asked_in(fields)
    if asked is None:
        asked = text_question(fields) or conversation_of(fields)
    if asked is None:
        raise BadInput(f"{where}: needs `problem`, `prompt` or `messages`, with text in it; {hint(fields, 'problem')}")
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


def asked_in(fields: Fields) -> Messages | None:
    """The question of a record that keeps it in an object: a request's `body`, or lighteval's `doc`."""
    for name in ("body", "request"):
        if (body := fields.inside(name)) is not None and (found := conversation_of(body) or text_question(body)):
            return found
    doc = fields.inside("doc")
    text = doc.get("query") if doc is not None else fields.get("example", "full_prompt")
    return None if text is None else user(text_of(text, "query", fields.where))


def text_question(fields: Fields) -> Messages | None:
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
    return user(with_choices(fields.values, text))


def conversation_of(fields: Fields) -> Messages | None:
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


def user(text: str) -> Messages:
    """A conversation of one message, the user's."""
    return [{"role": "user", "content": text}]


def text_of(value: Any, name: str, where: str) -> str:
    """A field that has to be text; `BadInput` by its `name` where it is none."""
    if not isinstance(value, str):
        raise BadInput(f"{where}: `{name}` should be text")
    return value


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


def hint(fields: Fields, role: str) -> str:
    """A clause on what a record has, and how to say which column plays a `role`."""
    return f"it has {fields.names()}: name the column with --column {role}=NAME"
