"""Traces: what the model writes on its own prompts, sampled, stored, and read back as calibration tokens.

A trace is a prompt and the completion that the model sampled for it, as token ids: those are the truth. Text is kept
for people, and is never tokenized again (templates drop earlier reasoning, and text that is tokenized again drifts).

The token budget is met exactly, by this rule: traces are taken in the order of the file, all samples of a prompt
before the next prompt; prompt and completion tokens count, and the trace that passes the budget is cut at its end,
which its finish_reason "budget" says. If the prompts run out first there are fewer tokens, and the summary says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rac_engine.base.errors import BadInput
from rac_engine.recipe import TEXT_PREFIX
from rac_engine.traces.files import Tally, Trace, from_records, from_text

Part = Literal["all", "prompt", "completion"]

REPLACED = "copies with replaced tokens"
"""The `kind` of a calibration of such copies."""


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one sequence of the model; `weights` [tokens] fp32 say how much each counts in H (None: 1 each)."""

    token_ids: np.ndarray
    prompt_length: int
    weights: np.ndarray | None = None
    source: int = 0
    """The number of its source, where there are several."""
    held_out: bool = False
    """Whether no solver learns from it: what is made of the others is judged by it (see `hold_out`)."""

    @property
    def counted(self) -> int:
        """Number of tokens that count."""
        return len(self.token_ids) if self.weights is None else int((self.weights > 0).sum())


@dataclass(frozen=True)
class Weighting:
    """Weights of tokens in H: by what they belong to, times the traces' own weights."""

    completion: float = 1.0
    column: str | None = None

    def describe(self) -> str:
        """The weights in words; empty where all tokens count 1."""
        parts = [] if self.completion == 1 else [f"completions × {self.completion:g}"]
        parts += [f"by the column {self.column}"] if self.column else []
        return "weighted " + " and ".join(parts) if parts else ""

    def of(self, prompt: int, completion: int, own: Any, where: str) -> np.ndarray | None:
        """Weights [tokens] fp32 of a trace with so many tokens; None if all are 1. `own` is what its column holds."""
        weights = np.ones(prompt + completion)
        weights[prompt:] *= self.completion
        if self.column is not None:
            listed = own if isinstance(own, list) else [own]
            if not all(type(item) in (int, float) and 0 <= item <= 1e6 for item in listed):
                raise BadInput(f"{where}: `{self.column}` should be a number from 0 to 1e6, or a list of such")
            if isinstance(own, list) and len(own) != len(weights):
                raise BadInput(f"{where}: `{self.column}` has {len(own)} weights for {len(weights)} tokens")
            weights *= np.asarray(listed, np.float64)
        return None if (weights == 1).all() else weights.astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """The sequences that calibrate a job. `tokens` is how many count, `sha256` that of ids and weights."""

    source: str
    kind: str
    part: Part
    sequences: list[TokenSequence]
    weighting: str = ""
    """The weights of tokens in words; empty where all are 1."""
    remarks: tuple[str, ...] = ()
    """What a user has to know of it, such as that no record has a completion."""
    models: frozenset[str] = frozenset()
    """SHA-256 of the models that its records say they are of."""
    parts: tuple[Calibration, ...] = ()
    """What came of each source, where there are several."""

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(sequence.counted for sequence in self.sequences)

    @property
    def held_out(self) -> list[TokenSequence]:
        """The sequences that no solver learns from."""
        return [sequence for sequence in self.sequences if sequence.held_out]

    @property
    def sha256(self) -> str:
        """SHA-256 of lengths, token ids, weights, and which sequences are held out, if any are."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(np.asarray([len(sequence.token_ids), sequence.weights is not None], "<i8").tobytes())
            digest.update(sequence.token_ids.astype("<i8").tobytes())
            if sequence.weights is not None:
                digest.update(sequence.weights.astype("<f4").tobytes())
        if self.held_out:
            digest.update(bytes(sequence.held_out for sequence in self.sequences))
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """A word for tables: "traces" (prompts with completions), "prompt", "completion" or "text"."""
        if self.parts:
            return " + ".join(dict.fromkeys(part.label for part in self.parts))
        if self.part != "all" and self.kind != REPLACED:
            return self.part
        return {"pieces of text": "text", "prompts": "prompt", REPLACED: "replaced"}.get(self.kind, "traces")

    def describe(self) -> str:
        """The calibration in words: tokens, sequences, the part that counts, weights."""
        what = {"all": "", "prompt": ", prompts alone", "completion": ", completions alone"}[self.part]
        weighted = f", {self.weighting}" if self.weighting else ""
        shares = ", ".join(f"{part.tokens / self.tokens:.0%} {part.label}" for part in self.parts)
        mixed = f" ({shares})" if shares else ""
        return f"{self.tokens:,} tokens in {len(self.sequences):,} {self.kind}{mixed}{what}{weighted}"


def load_calibration(
    source: str,
    *,
    part: Part = "all",
    tokens: int | None = None,
    tokenizer: Any,
    sequence_length: int = 2048,
    weighting: Weighting = Weighting(),
    columns: Mapping[str, str] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    role: str = "calibration",
) -> Calibration:
    """Calibration sequences from traces, JSONL or text.

    `source` is a folder of `rac trace`, another file or folder of records (see `read_records` and `exchange_of`;
    records with a prompt alone are prompt-only calibration), or "text:FILE", which is read as far as it is needed and
    cut into sequences of `sequence_length`. `columns` says which column of the records plays a role, and
    `template_arguments` what the chat template is told where they hold no tokens. Of part "prompt"
    the completion is left away; of "completion" the whole sequence is run, but only the completion's tokens count.
    Sequences are taken in order until `tokens` count, the last one cut so that just as many do, whatever the
    `weighting` says that they count for. `role` is what errors call it.

    Raises `BadInput` for a source that is missing, broken (by its line) or empty, and for tokens the model lacks.
    """
    tally = Tally()
    path = _source_path(source, part, weighting, role)
    traces: Iterable[Trace]
    if source.startswith(TEXT_PREFIX):
        traces, kind = from_text(path, tokenizer, sequence_length, role), "pieces of text"
    else:
        kind = "traces" if path.is_dir() or path.suffix == ".parquet" else "sequences"
        traces = from_records(path, tokenizer, weighting.column, columns or {}, template_arguments or {}, tally)
    size = len(tokenizer)
    sequences: list[TokenSequence] = []
    left, completions = tokens, 0
    for number, (prompt, completion, own, where) in enumerate(traces, 1):
        if left == 0:
            break
        sequence = _sequence(prompt, completion, part, left)
        if sequence is None:
            continue
        ids = sequence.token_ids
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise BadInput(
                f"{where or f'{role} {source}: piece {number}'}: token ids from {ids.min()} to {ids.max()}, but "
                f"the model has {size}; was it made by another model?"
            )
        counted = sequence.counted
        weights = weighting.of(len(prompt), len(completion), own, where)
        if weights is not None:
            weights = weights[: len(ids)] * (1 if sequence.weights is None else sequence.weights)
            sequence = replace(sequence, weights=weights)
        sequences.append(sequence)
        completions += len(ids) > sequence.prompt_length
        if left is not None:
            left -= counted
    if sequences and not any(sequence.weights is None or sequence.weights.any() for sequence in sequences):
        raise BadInput(f"{role} {source}: every token has weight 0")
    if not sequences:
        missing = "completions" if part == "completion" else "tokens"
        raise BadInput(f"{role} {source}: holds no {missing}")
    if not completions and (kind == "sequences" or (kind == "traces" and part == "all")):
        kind = "prompts"
    remarks = tally.remarks() if part != "prompt" else []
    return Calibration(source, kind, part, sequences, weighting.describe(), tuple(remarks), frozenset(tally.models))


def _source_path(source: str, part: Part, weighting: Weighting, role: str) -> Path:
    """The file or folder of a `source` (see `load_calibration`); `BadInput` where it cannot be what is asked for."""
    if source.startswith(TEXT_PREFIX):
        if part != "all":
            raise BadInput(f"{role} {source}: text has no {part}; leave the part at all")
        if weighting.describe():
            raise BadInput(f"{role} {source}: text has no completions to weight; leave the weights at 1")
    elif not Path(source).exists():
        raise BadInput(f"{role} {source}: not found; give a traces folder or file, a .jsonl or text:FILE")
    return Path(source.removeprefix(TEXT_PREFIX))


def _sequence(prompt: Sequence[int], completion: Sequence[int], part: Part, left: int | None) -> TokenSequence | None:
    """A sequence of which at most `left` tokens count; None if none would."""
    if part == "completion":
        said = np.asarray(completion[:left], np.int64)
        weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(said), np.float32)])
        ids = np.concatenate([np.asarray(prompt, np.int64), said])
        return TokenSequence(ids, len(prompt), weights) if len(said) else None
    ids = np.asarray([*prompt, *(completion if part == "all" else ())][:left], np.int64)
    return TokenSequence(ids, min(len(prompt), len(ids))) if len(ids) else None
