"""Sources of calibration as token ids of prompt and completion: text, and records in any layout that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rac_engine.base.errors import BadInput
from rac_engine.traces.conversation import Messages, Said, is_conversation
from rac_engine.traces.layouts import Exchange, exchange_of, token_ids
from rac_engine.traces.records import read_records
from rac_engine.traces.template import encode, render
from rac_engine.traces.text import text_sequences
from rac_engine.traces.thoughts import answer_ids

Trace = tuple[Sequence[int], Sequence[int], Any, str]

"""Ids of prompt and completion, what the column of weights holds, and where it was read."""


def from_text(path: Path, tokenizer: Any, length: int, role: str) -> Iterator[Trace]:
    """A text file in pieces of `length` tokens, read as far as they are taken; errors call it by its `role`."""
    for ids in text_sequences(path, tokenizer, length, role):
        yield (), ids, None, ""


def from_records(
    source: Path,
    tokenizer: Any,
    weights: str | None,
    columns: Mapping[str, str],
    arguments: Mapping[str, Any],
    tally: Tally,
) -> Iterator[Trace]:
    """Traces of a file or folder of records in any layout (see layouts), one for each completion.

    `weights` names their field of weights, if they have one; `columns` says which column plays a role, and
    `arguments` are the chat template's own. What is to be remarked on goes into the `tally`.
    """
    also = [] if weights is None else [weights]
    for where, record in read_records(source, columns, also):
        if weights is not None and weights not in record:
            raise BadInput(f"{where}: has no field {weights!r} of weights")
        if (exchange := exchange_of(record, where)) is None:
            tally.failed += 1
            continue
        if isinstance(exchange.prompt, str) and exchange.prompt and tokenizer.chat_template:
            tally.unrendered += not any(token in exchange.prompt for token in tokenizer.all_special_tokens)
        own = record.get(weights) if weights else None
        tally.count(record, bool(exchange.completions))
        for prompt, completion in _token_ids(exchange, tokenizer, arguments, where):
            yield prompt, completion, own, where


@dataclass
class Tally:
    """Counts of records that are worth a remark, and the models that they say they are of."""

    records: int = 0
    without_completion: int = 0
    failed: int = 0
    unrendered: int = 0
    models: set[str] = field(default_factory=set)
    """SHA-256 of models, by the records."""

    def count(self, record: dict[str, Any], answered: bool) -> None:
        """Count a record."""
        self.records += 1
        self.without_completion += not answered
        if isinstance(model := record.get("model_sha256"), str):
            self.models.add(model)

    def remarks(self) -> list[str]:
        """What is to be said about the records."""
        said = []
        if self.records and self.without_completion == self.records:
            said.append(
                "no record of the calibration has a completion: calibrating on prompts alone, which costs a reasoning "
                "model much of its accuracy; `rac trace` samples its own chains of thought"
            )
        elif self.without_completion:
            said.append(
                f"{self.without_completion:,} of {self.records:,} records of the calibration have no completion: of "
                "those the prompt alone counts"
            )
        if self.unrendered:
            said.append(
                f"{self.unrendered:,} prompts are taken as they stand, rendered already, though they hold no special "
                "token of the model; the chat template is for `problem` or `messages`"
            )
        if self.failed:
            said.append(f"{self.failed:,} records are requests that failed, and are left out")
        return said


def _token_ids(
    exchange: Exchange, tokenizer: Any, arguments: Mapping[str, Any], where: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of a prompt with each of its completions, or of the prompt alone."""
    prompt = exchange.prompt
    conversation = cast(Messages, prompt) if is_conversation(prompt) else None
    if isinstance(prompt, str):
        prompt = encode(tokenizer, prompt, where)
    ids = [] if conversation is not None else token_ids(prompt, where)
    if not exchange.completions:
        yield (ids if conversation is None else render(tokenizer, conversation, where, arguments)), []
    for said in exchange.completions:
        if conversation is None:
            yield ids, encode(tokenizer, said.text, where) if isinstance(said, Said) else said
        elif isinstance(said, Said):
            yield answer_ids(tokenizer, conversation, said, where, arguments)
        else:
            yield render(tokenizer, conversation, where, arguments), said
