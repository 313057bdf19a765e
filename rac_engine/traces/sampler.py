"""What all ways to sample from a model have in common: its tokenizer, its prompts, and what ends an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput
from rac_engine.models import Model
from rac_engine.traces.conversation import Messages
from rac_engine.traces.endings import stop_tokens
from rac_engine.traces.sampling import Completion, Progress, Request, Sampling
from rac_engine.traces.snapshot import Snapshots
from rac_engine.traces.template import render
from rac_engine.traces.tokenizer import load_tokenizer


class Sampler(ABC):
    """A model that continues prompts: loaded here (`Decoder`), or run by a server (`ServedModel`)."""

    planned: Sequence[str] = ()
    """What is done to keep to limits of memory, in a line, for results."""
    embedded: int
    """Tokens that the model has an embedding of."""

    def __init__(self, source: Model) -> None:
        path = source.checkpoint.path
        self.sha256 = source.checkpoint.sha256()
        """SHA-256 of the checkpoint."""
        self.notes: list[str] = []
        self.snapshots: Snapshots | None = None
        """Where the batch at work is written now and then."""
        self.tokenizer = load_tokenizer(path)
        self.context = context_of(source.config)
        """Tokens that a prompt and its answer may have together; None where the config says nothing."""
        self.stops = stop_tokens(path, self.tokenizer)
        # An embedding may be padded beyond the tokenizer's tokens: those rows are never sampled.
        self.vocabulary = len(self.tokenizer)

    def prompt(
        self, messages: Messages, where: str, arguments: Mapping[str, Any] | None = None, fit: bool = True
    ) -> list[int]:
        """Token ids of a conversation that the model can answer.

        Raises `BadInput` as `render` does, for a token that the model has no embedding of and, if it has to `fit`, for
        a prompt that leaves no room in the model's context.
        """
        ids = render(self.tokenizer, messages, where, arguments)
        require_embedding(max(ids), self.embedded, where)
        if fit and self.context is not None and len(ids) >= self.context:
            raise BadInput(
                f"{where}: has {len(ids):,} tokens, and the model's context {self.context:,} (max_position_embeddings "
                "in its config.json); remove or shorten it"
            )
        return ids

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What of this way to sample decides the tokens: a job that was stopped goes on only with the same."""

    def record(self) -> dict[str, Any]:
        """What results tell of another engine than the project's own."""
        return {}

    @abstractmethod
    def choose_threads(self, journal: Path, rows: int, restart: bool = False) -> dict[str, Any]:
        """Choose the threads to sample with, for `rows` sequences at a time; what is to be entered in the journal."""

    @abstractmethod
    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        rows: int,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[Completion]:
        """Continue every request until it stops, has `max_new_tokens` or fills the context, at most `rows` at a time.

        Returns a completion a request, in their order. Where there are `snapshots` the batch is written there now and
        then, and one that is found there goes on.
        """

    def close(self) -> None:  # noqa: B027 - not all have something to let go of
        """Let go of the model. Nothing can be sampled any more."""

    def forget_batch(self) -> None:
        """Remove the snapshot of a batch that is in the journal."""
        if self.snapshots is not None:
            self.snapshots.remove()


def require_embedding(highest: int, rows: int, where: str) -> None:
    """`BadInput` for a token that the model, with embeddings of `rows` tokens, has none of; its tokenizer may."""
    if highest >= rows:
        raise BadInput(
            f"{where}: has token {highest}, but the model has embeddings of {rows:,} alone; its tokenizer is another "
            "model's: copy the right one into its folder"
        )


def context_of(config: Any) -> int | None:
    """The longest sequence that a model's config allows, positions stretched by rope scaling included."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or not isinstance(factor := rope.get("factor"), int | float):
        return longest  # those of several kinds of layers have a longest that counts them in
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, int):
        return max(longest, int(original * factor))
    return int(longest * factor) if kind in ("linear", "dynamic", "yarn") and original is None else longest
