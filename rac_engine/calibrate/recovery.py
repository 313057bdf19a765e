"""Recovery of a pruned model as a whole: it learns on its mask to say of the calibration what the dense model says.

What each layer is solved for, single outputs and hidden states, is not what counts: that is the next token. Here the
dense model's most probable next tokens are found once for every token of a completion, and the kept weights of all
layers are moved together towards them, by steps along the gradient of the divergence. One layer is in memory at a
time: forward, the hidden states before each layer are kept; backward, a layer is gone through once more from there,
and hands down the gradient by what it was given.

Sequences that are held out make no step: by them it is judged what comes of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rac_engine.calibrate.activations import Activations, Storage
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.tuning import HIDDEN_COPIES, batches_of, reproducible, sequences_of
from rac_engine.models import Block, Chunk, Model
from rac_kernels import KEPT_BYTES, divergence_, most_probable

BATCH = 2048  # tokens of a step at least, and

STEPS = 32  # steps in a pass over the tokens at most, whole sequences permitting

PIECE = 2048  # tokens that go through a layer together, if whole sequences permit

PROBABLE = 64  # next tokens of the dense model that are told apart

TARGET_BYTES = 4 * (PROBABLE + 1) + 4 * PROBABLE  # of a token: log-probabilities and ids

Build = Callable[[int], list[Block]]

"""A decoder layer's blocks by its number."""


class Learner(Protocol):
    """A pruned model that learns: its layers, and what is done with their gradients."""

    def build(self, layer: int) -> list[Block]:
        """A decoder layer's blocks as they are now."""

    def parameters(self, layer: int, blocks: list[Block]) -> list[nn.Parameter]:
        """The matrices of those blocks that learn, ready for gradients."""

    def move(self, layer: int, gradients: list[Tensor]) -> None:
        """Make a step against the gradients, in fp32, of what `parameters` gave last."""


@dataclass(frozen=True)
class Piece:
    """Whole sequences, by their starts and lengths in the packing, that go through a layer together."""

    sequences: tuple[tuple[int, int], ...]
    start: int
    """The place of its first token among those of all pieces."""

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(length for _, length in self.sequences)

    @property
    def chunk(self) -> Chunk:
        """Its tokens as a block has to know them."""
        return Chunk(0, self.tokens, tuple(length for _, length in self.sequences))


@dataclass(frozen=True)
class Learned:
    """The outcome of a step."""

    divergence: float
    """Σ weights · KL over its tokens, of the weights as they were before it."""
    weight: float
    """Σ weights."""
    tokens: int


Step = Callable[[Sequence[Piece], Learner], Learned]

"""A step of a learner on some pieces."""


class _Losing:
    """The divergence of some tokens' logits from their targets, added up in `lost`."""

    def __init__(self, wanted: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._targets, self.lost = (wanted, ids, weights), 0.0

    def __call__(self, at: int, logits: Tensor) -> None:
        """Put the gradient in the place of the logits [n, vocabulary] of the tokens from `at` on."""
        self.lost += float(divergence_(logits, *(part[at : at + len(logits)] for part in self._targets)))


class Lessons:
    """The calibration's tokens, and the next tokens that the dense model finds probable for each of them."""

    def __init__(self, model: Model, packing: Packing, dtype: torch.dtype, storage: Storage) -> None:
        self.packing, self.dtype = packing, dtype
        self._model, self._storage = model, storage
        self._table = model.embedding()
        self._readout = model.readout(dtype, storage.device)
        seen, held = (
            sequences_of([chunk for chunk in packing.chunks if packing.holds_out(chunk) == side], True)
            for side in (False, True)
        )
        self.seen, self.judges = seen, held or seen
        self.held_out = bool(held)
        self._every = seen + held
        self._weights = next_token_weights(packing)
        counted = self._weights > 0
        self._row = torch.cat([torch.zeros(1, dtype=torch.int64), counted.cumsum(0)])
        """[tokens + 1]: how many tokens before one have a target."""
        self._wanted, self._ids = (
            Activations.make(int(self._row[-1]), width, kind, storage)
            for width, kind in ((min(PROBABLE, len(self._table)) + 1, torch.float32), (PROBABLE, torch.int32))
        )

    @property
    def tokens(self) -> int:
        """Tokens that are gone through in a pass."""
        return sum(length for _, length in self.seen)

    def ask(self, build: Build) -> None:
        """Find the dense model's most probable next tokens, its layers being those of `build`."""
        pieces = self._pieces(self._every)
        states = self._make(sum(piece.tokens for piece in pieces))
        with self._computing():
            self._forward(pieces, build, states)
            for piece in pieces:
                counted = self._counted(piece)
                hidden = states.read(piece.start, piece.start + piece.tokens)[counted.to(states.device)]
                found = [most_probable(logits, PROBABLE) for _, logits in self._readout.logits(hidden)]
                if found:
                    self._remember(piece, *(torch.cat(part) for part in zip(*found, strict=True)))
        states.close()

    def judge(self, build: Build) -> float:
        """The mean divergence over the tokens held out, or over all where none are, of the model that `build` makes."""
        pieces = self._pieces(self.judges)
        states, lost, weight = self._make(sum(piece.tokens for piece in pieces)), 0.0, 0.0
        with self._computing():
            self._forward(pieces, build, states)
            for piece in pieces:
                counted, targets = self._counted(piece), self._targets(piece)
                hidden = states.read(piece.start, piece.start + piece.tokens)[counted.to(states.device)]
                losing = _Losing(*targets)
                for at, logits in self._readout.logits(hidden):
                    losing(at, logits)
                lost += losing.lost
                weight += float(targets[2].sum(dtype=torch.float64))
        states.close()
        return lost / weight if weight else 0.0

    def batches(self, number: int) -> list[list[Piece]]:
        """The steps of pass `number`: its sequences in an order of its own, some together."""
        order = torch.randperm(len(self.seen), generator=torch.Generator().manual_seed(number)).tolist()
        size = batch_tokens(self.tokens)
        return [self._pieces(some) for some in batches_of([self.seen[at] for at in order], size)]

    @contextmanager
    def learning(self) -> Iterator[Step]:
        """Room for the hidden states of a batch before every layer; gives what makes a step on it."""
        longest = max((length for _, length in self.seen), default=0)
        most = max(batch_tokens(self.tokens), longest)
        states, down = self._make((self._model.layers + 1) * most), self._make(most)

        def step(pieces: Sequence[Piece], learner: Learner) -> Learned:
            with self._computing():
                return self._learn(pieces, learner, states, down)

        try:
            yield step
        finally:
            states.close()
            down.close()

    def close(self) -> None:
        """Free what is known of the dense model."""
        self._wanted.close()
        self._ids.close()

    def _learn(self, pieces: Sequence[Piece], learner: Learner, states: Activations, down: Activations) -> Learned:
        """One step: forward through all layers, back again, and each layer is moved as its gradients are there."""
        count = sum(piece.tokens for piece in pieces)
        self._forward(pieces, learner.build, states, count)
        targets = [self._targets(piece) for piece in pieces]
        whole = sum(float(weights.sum(dtype=torch.float64)) for *_, weights in targets)
        lost = 0.0
        for piece, (wanted, ids, weights) in zip(pieces, targets, strict=True):
            if not len(weights):
                down.write(piece.start, torch.zeros(piece.tokens, states.width, dtype=self.dtype, device=states.device))
                continue
            counted = self._counted(piece).to(states.device)
            at = self._model.layers * count + piece.start
            hidden = states.read(at, at + piece.tokens)
            losing = _Losing(wanted, ids, weights / whole)
            gradient = torch.zeros_like(hidden)
            gradient[counted] = self._readout.gradient(hidden[counted], losing)
            down.write(piece.start, gradient)
            lost += losing.lost * whole
        for layer in reversed(range(self._model.layers)):
            blocks = learner.build(layer)
            learning = learner.parameters(layer, blocks)
            totals = [torch.zeros_like(each, dtype=torch.float32) for each in learning]
            for piece in pieces:
                at = layer * count + piece.start
                given = states.read(at, at + piece.tokens).clone().requires_grad_(True)
                above = down.read(piece.start, piece.start + piece.tokens)
                with torch.enable_grad():
                    left = _left(blocks, given, piece.chunk)
                found = torch.autograd.grad(left, [given, *learning], above, allow_unused=True)
                for total, one in zip(totals, found[1:], strict=True):
                    if one is not None:  # an expert may have had no token
                        total += one
                if layer and found[0] is not None:
                    down.write(piece.start, found[0])
            del blocks, learning
            learner.move(layer, totals)
        return Learned(lost, whole, count)

    def _forward(self, pieces: Sequence[Piece], build: Build, states: Activations, apart: int = 0) -> None:
        """Send the pieces through all layers; the states before a layer stay, those of the next one `apart` tokens on.

        With 0 they take their place.
        """
        for piece in pieces:
            ids = torch.cat([self.packing.token_ids[start : start + length] for start, length in piece.sequences])
            states.write(piece.start, self._model.embed(ids, self.dtype, self._table).to(states.device))
        for layer in range(self._model.layers):
            blocks = build(layer)
            for piece in pieces:
                at = layer * apart + piece.start
                hidden = states.read(at, at + piece.tokens)
                states.write(at + apart, _left(blocks, hidden, piece.chunk))
            del blocks

    def _pieces(self, sequences: Sequence[tuple[int, int]]) -> list[Piece]:
        """Sequences in their order, cut where there are enough together."""
        found, at = list[Piece](), 0
        for some in batches_of(sequences, PIECE):
            found.append(Piece(tuple(some), at))
            at += found[-1].tokens
        return found

    def _counted(self, piece: Piece) -> Tensor:
        """[tokens] bool: which tokens of a piece have a target."""
        return torch.cat([self._weights[start : start + length] > 0 for start, length in piece.sequences])

    def _spans(self, piece: Piece) -> list[tuple[int, int]]:
        """Where the targets of a piece's sequences lie."""
        spans = [(int(self._row[start]), int(self._row[start + length])) for start, length in piece.sequences]
        return [span for span in spans if span[0] < span[1]]

    def _remember(self, piece: Piece, wanted: Tensor, ids: Tensor) -> None:
        """Keep the targets of a piece's tokens."""
        at = 0
        for start, stop in self._spans(piece):
            here = slice(at, at + stop - start)
            self._wanted.write(start, wanted[here].contiguous())
            self._ids.write(start, ids[here].to(torch.int32))
            at += stop - start

    def _targets(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, ids and weights of the next tokens, of the tokens of a piece that have such."""
        spans, device = self._spans(piece), self._storage.device
        wanted, ids = (
            torch.cat([each.clone() for each in store.each(spans)]) if spans else store.read(0, 0)
            for store in (self._wanted, self._ids)
        )
        weights = torch.cat([self._weights[start : start + length] for start, length in piece.sequences])
        return wanted, ids.long(), weights[weights > 0].to(device)

    def _make(self, tokens: int) -> Activations:
        return Activations.make(tokens, self._model.hidden_size, self.dtype, self._storage)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Within this gradients can be asked for, which come out the same every time."""
        with torch.inference_mode(False), torch.no_grad(), reproducible(self._storage.device):
            yield


def next_token_weights(packing: Packing) -> Tensor:
    """How much each token's next one counts [tokens] fp32: 0 for the last of a sequence and where a prompt goes on.

    Where no sequence has a completion, prompts count too.
    """
    own = packing.completions if bool(packing.completions.any()) else torch.ones_like(packing.completions)
    weights = own.float() if packing.weights is None else own * packing.weights
    found = torch.cat([weights[1:], weights.new_zeros(min(1, len(weights)))])
    lengths = itertools.chain.from_iterable(
        chunk.lengths for chunk in packing.chunks if not (chunk.is_part and chunk.offset)
    )
    for end in itertools.accumulate(lengths):
        found[end - 1] = 0
    return found


def batch_tokens(tokens: int) -> int:
    """How many of a pass's tokens a step is made of, if whole sequences permit."""
    return max(BATCH, tokens // STEPS)


def learning_bytes(weights: int, density: float, size: int, tokens: int, hidden: int, inner: int) -> dict[str, int]:
    """Bytes by purpose while a layer of so many weights learns of `tokens` at a time, of `size` bytes an activation.

    `inner` are the elements that a token has between entrance and exit of its blocks; `density` is the share of weights
    that are kept.
    """
    kept = int(density * weights)
    return {
        "kept weights, their means and files": (3 * KEPT_BYTES + 8) * kept + weights,
        "weights and gradients": (2 * size + 4) * weights,
        "activations of a batch and their gradients": 4 * tokens * (2 * HIDDEN_COPIES * hidden + inner),
    }


def learning_files(weights: int, density: float) -> int:
    """Bytes of the files in which so many weights lie after a pass."""
    return int(KEPT_BYTES * density * weights) + weights // 8


def _left(blocks: Sequence[Block], hidden: Tensor, chunk: Chunk) -> Tensor:
    """The hidden states behind a layer."""
    for block in blocks:
        hidden = block.finish(hidden, block.inner(block.norm(hidden), chunk))
    return hidden
