"""Tuning a pruned block as a whole: the weights that stay are moved until its hidden states are the dense model's.

A method solves one matrix after the other, each for its own outputs. Products of two matrices' outputs (gate
and up, queries and keys), and how well a later matrix can make up for an earlier one, are seen by none of these
problems alone. Here the block's error ‖hidden′ − hidden‖², hidden′ being what it hands on of what the pruned model
gives it and hidden what the dense model has there, is minimised over all its pruned matrices at once, by Adam on
shuffled sequences, in fp32. Masks stay. Here it is said which tokens make a step; error, schedule and steps are
`rac_kernels.Tuning`'s.

Reference: block-wise fine-tuning as in Guo et al., "EBFT" (arXiv 2402.12419).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_engine.calibrate.stream import Stream
from rac_engine.models import Block, Chunk
from rac_kernels import Grid, Tuning, relative_error, rounded, squared_error

BATCH = 256  # tokens in a step at least, and

STEPS = 150  # steps in an epoch at most, whole sequences and chunks permitting


# Bytes a weight while a block is tuned: fp32 itself, its gradient, two means and their root, and the best one so far as
# it is to be stored.
WEIGHT_BYTES = 24

# Copies in fp32 of a token's activations and their gradients: of hidden states, of queries, keys and values, and of
# attention's scores where they are in the open.
HIDDEN_COPIES, QUERY_COPIES, SCORE_COPIES = 8, 2, 4


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning: ‖hidden′ − hidden‖² / ‖hidden‖² before and after, and the matrices by their names.

    The errors are those on sequences that are held out, where there are such, else those on the ones tuned on.
    """

    before: float
    after: float
    weights: dict[str, Tensor]
    """[rows, columns] in the dtype they are stored in; empty where tuning made nothing better."""
    epochs: int
    """The epochs after which they were best, of those that there were."""


def tune(
    stream: Stream,
    wanted: Stream,
    block: Block,
    weights: Mapping[str, Tensor],
    epochs: int,
    grids: Mapping[str, Grid] | None = None,
) -> Tuned | None:
    """Tune matrices of a block, so that the tokens of `stream` leave it as they stand in `wanted`.

    Sequences that are held out make no step: they say after which of the `epochs` the matrices are best, none included.
    `weights` are the pruned matrices, by their names within the layer and in the dtype to be stored. Neither streams
    nor block are changed. An attention's sequences that are longer than a chunk count up to there. None where hidden
    states hold NaN or Inf, or are beyond fp32 when squared. Matrices with a grid in `grids` stay on it.
    """
    stream.flush()
    wanted.flush()
    seen, held = (
        [chunk for chunk in stream.packing.chunks if stream.packing.holds_out(chunk) == side] for side in (False, True)
    )
    every = sequences_of(seen, block.plan.mixes)
    judges = sequences_of(held, block.plan.mixes) or every
    most = max((chunk.stop - chunk.start for chunk in stream.packing.chunks), default=1)
    size = min(step_tokens(sum(length for _, length in every)), most)
    # What was made in inference mode, as all of a job is, takes part in no gradient.
    with torch.inference_mode(False), block.copied() as linears, _computing(stream):
        tuned = [linears[name].get_parameter("weight") for name in weights]
        for weight, stored in zip(tuned, weights.values(), strict=True):
            weight.copy_(stored)
        before = best = _error(stream, wanted, block, judges, size)
        if not math.isfinite(before):
            return None
        found, kept = dict[str, Tensor](), 0
        for weight in tuned:
            weight.requires_grad_(True)
        kinds = [None if grids is None else grids.get(name) for name in weights]
        tuning = Tuning(tuned, epochs * sum(length for _, length in every), kinds)
        order = torch.Generator().manual_seed(0)
        for epoch in range(1, epochs + 1):
            shuffled = [every[at] for at in torch.randperm(len(every), generator=order).tolist()]
            for some in batches_of(shuffled, size):
                with torch.enable_grad():
                    missed, whole = _missed(stream, wanted, block, some)
                    tuning.step(missed, whole, sum(length for _, length in some))
            if held:  # the epoch that is best for them is kept
                now = _error(stream, wanted, block, judges, size)
                if not now < best:
                    continue
                best = now
            elif epoch < epochs:
                continue
            kept = epoch
            found.clear()  # before there are others
            found.update({name: rounded(w, old.dtype) for (name, old), w in zip(weights.items(), tuned, strict=True)})
        del tuning
        if not found:
            return Tuned(before, before, {}, 0)
        for weight, new in zip(tuned, found.values(), strict=True):
            weight.requires_grad_(False).copy_(new)
        after = _error(stream, wanted, block, judges, size)
    return Tuned(before, after, found, kept) if after < before else Tuned(before, before, {}, 0)


def step_tokens(tokens: int) -> int:
    """How many of a block's tokens a step is made of, if sequences and chunks permit."""
    return max(BATCH, tokens // STEPS)


def workspace(weights: int, tokens: int, hidden: int, inner: int, on_grid: bool = False) -> dict[str, int]:
    """Bytes by purpose while a block of so many weights is tuned by steps of `tokens`.

    `hidden` is the width of the hidden states, `inner` the elements in fp32 that a token has between entrance and exit.
    With weights on a grid there is a copy that moves, and at most twice the size of a matrix while it is rounded.
    """
    return {
        "weights in fp32, gradients and their means": (WEIGHT_BYTES + 12 * on_grid) * weights,
        "activations of a batch and their gradients": 4 * tokens * (HIDDEN_COPIES * hidden + inner),
    }


def attention_inner(queries: int, key_values: int, scores: int) -> int:
    """`inner` of `workspace` for an attention with so many queries, keys and values, and scores in the open a token."""
    return QUERY_COPIES * (queries + key_values) + SCORE_COPIES * scores


def sequences_of(chunks: Sequence[Chunk], attention: bool) -> list[tuple[int, int]]:
    """Start and length of every sequence; of one in parts, each part, or where tokens see others the first one."""
    found = list[tuple[int, int]]()
    for chunk in chunks:
        if chunk.is_part:
            if not (attention and chunk.offset):
                found.append((chunk.start, chunk.stop - chunk.start))
            continue
        start = chunk.start
        for length in chunk.lengths:
            found.append((start, length))
            start += length
    return found


def batches_of(sequences: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences in their order, as many together as have at most `size` tokens, or one; longest first."""
    some, tokens = list[tuple[int, int]](), 0
    for sequence in sequences:
        if some and tokens + sequence[1] > size:
            yield sorted(some, key=lambda each: -each[1])
            some, tokens = [], 0
        some.append(sequence)
        tokens += sequence[1]
    if some:
        yield sorted(some, key=lambda each: -each[1])


def _error(stream: Stream, wanted: Stream, block: Block, every: Sequence[tuple[int, int]], size: int) -> float:
    """‖hidden′ − hidden‖² / ‖hidden‖² over all sequences."""
    with torch.no_grad():
        return relative_error(_missed(stream, wanted, block, some) for some in batches_of(every, size))


def _missed(
    stream: Stream, wanted: Stream, block: Block, sequences: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """‖hidden′ − hidden‖² and ‖hidden‖² of some sequences, each token with its weight."""
    spans = [(start, start + length) for start, length in sequences]
    given, aim = (  # copied, since what is read holds until the next is
        torch.cat([part.to(torch.float32, copy=True) for part in each.hidden.each(spans)]) for each in (stream, wanted)
    )
    chunk = Chunk(0, len(given), tuple(length for _, length in sequences))
    found, weights = block.finish(given, block.inner(block.norm(given), chunk)), stream.packing.weights
    own = None if weights is None else torch.cat([weights[start:stop] for start, stop in spans]).to(found.device)
    return squared_error(found, aim, own)


@contextmanager
def _computing(stream: Stream) -> Iterator[None]:
    """On a GPU matrix products in the activations' own dtype, always the same way, so that bytes come out the same."""
    with ExitStack() as stack:
        if torch.device(stream.device).type == "cuda" and stream.dtype.itemsize == 2:
            stack.enter_context(torch.autocast("cuda", stream.dtype))
        stack.enter_context(reproducible(stream.device))
        yield


@contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Within this a GPU computes always the same way, gradients too, so that bytes come out the same."""
    with ExitStack() as stack:
        if torch.device(device).type == "cuda":
            before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(True, warn_only=True)
            stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        yield
