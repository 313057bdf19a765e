"""Sampling of tokens: requests, random numbers by counter, and the nucleus.

This stands in the driver, not among the kernels: no weight or activation of the model is changed here. Logits go in,
and token ids come out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rac_engine.base.sizes import format_count

_CANDIDATES = 256  # tokens among which a nucleus is looked for first

FinishReason = Literal["stop", "length", "context"]
"""The model ended; it had said as much as it was to; or its context was full."""


def at_a_time(batch_size: int) -> int:
    """Number of a batch's sequences that are in flight: half, so that rows are filled again as they become free.

    A batch is what a job decodes between two entries of its journal, and so what an interruption costs at most. It is
    decoded by itself, so that one done again gets the same tokens: what else is in flight may change the last bits of
    a sequence's logits.
    """
    return -(-batch_size // 2)


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; temperature 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float = 0.6
    top_p: float = 0.95


@dataclass(frozen=True)
class Request:
    """A prompt to be continued; `key` decides the random numbers of its continuation."""

    prompt: Sequence[int]
    key: int


@dataclass(frozen=True)
class Completion:
    """The tokens sampled for a request, the one that stopped it included."""

    token_ids: list[int]
    finish: FinishReason


@dataclass(frozen=True)
class Progress:
    """Progress of a decoding: `tokens` were sampled, `rate` a second."""

    finished: int
    requests: int
    tokens: int
    rate: float

    def __str__(self) -> str:
        done = f"{self.finished} of {self.requests} done"
        return f"{done} · {format_count(self.tokens)} tokens · {format_count(self.rate)}/s"


def request_key(seed: int, name: str, sample: int) -> int:
    """The key of a request's random numbers, 64 bits of a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}/{name}".encode()).digest()[:8], "little")


def batch_key(requests: Sequence[Request], sampling: Sampling, rows: int) -> str:
    """SHA-256 of all that is asked for."""
    asked = [[request.key, [int(token) for token in request.prompt]] for request in requests]
    return hashlib.sha256(json.dumps([asked, vars(sampling), rows]).encode()).hexdigest()


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Random numbers [n] fp32 in [0, 1), one for each key and position: the splitmix64 generator, by counter."""
    with np.errstate(over="ignore"):
        x = np.asarray(keys, np.uint64) + (np.asarray(positions, np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def choose(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Sample a token of each row of logits [n, vocabulary], with random numbers draws [n] fp32 in [0, 1).

    The nucleus is the shortest row of tokens, likeliest first, whose probabilities reach `top_p`. Returns [n] int64.
    """
    logits = logits.float()
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise ValueError("the model's logits are not finite; its weights, or its dtype on this device, are broken")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    total = logits.logsumexp(dim=-1, keepdim=True)
    if top_p >= 1:  # no need to sort
        everything = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        return _choose_among(logits, everything, total, draws, top_p)[0]
    count = min(_CANDIDATES, logits.shape[-1])
    chosen, held = _choose_among(*logits.topk(count), total, draws, top_p)
    if count < logits.shape[-1] and not bool(held.all()):
        wide = (~held).nonzero()[:, 0]
        ordered = logits[wide].sort(dim=-1, descending=True)
        chosen[wide] = _choose_among(*ordered, total[wide], draws[wide], top_p)[0]
    return chosen


def _choose_among(values: Tensor, ids: Tensor, total: Tensor, draws: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Choose among the likeliest tokens, and tell whether they hold the whole nucleus."""
    probabilities = (values - total).exp()
    reach = probabilities.cumsum(dim=-1)
    size = (reach - probabilities < top_p).sum(dim=-1, keepdim=True)
    aim = draws[:, None] * reach.gather(1, size - 1)
    place = (reach <= aim).sum(dim=-1, keepdim=True).minimum(size - 1)
    return ids.gather(1, place)[:, 0], reach[:, -1] >= top_p
