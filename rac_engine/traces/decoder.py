"""Sampling from a causal LM, many sequences at once.

Every step is one forward pass over the new tokens of all sequences in flight: a token each, and whole prompts for
those that join. A sequence that ends leaves at once and the next one in line takes its place, so one long answer does
not hold up a batch. Nothing is padded. Keys and values lie in place in buffers of this module's own; transformers'
modules do the rest.

On one machine, with one number of threads, what is sampled is a function of the model, the requests, the seed and the
batch size alone: the random number for a token depends only on its request and its position, and which sequences share
a step follows from the requests.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
)

from rac_engine.checkpoint import Checkpoint, bytes_of
from rac_engine.jobs.journal import first_record
from rac_engine.jobs.surroundings import surroundings
from rac_engine.models import Model, States, run_on, run_packed, scoring_of, working_dtype
from rac_engine.traces.cache import Cache
from rac_engine.traces.layers import LayerReader, Placement, StreamedLayers
from rac_engine.traces.loading import load_causal_lm, refuse_generation_config
from rac_engine.traces.memory import PROMPT_TOKENS, Room, SamplingPlan, SamplingShape, Sequences, plan_sampling
from rac_engine.traces.sampler import Sampler
from rac_engine.traces.sampling import (
    Completion,
    FinishReason,
    Progress,
    Request,
    Sampling,
    batch_key,
    choose,
    uniforms,
)
from rac_engine.traces.snapshot import Snapshots
from rac_kernels import Scoring, decode_attention, packed_attention

DECODE_ATTENTION = "rac_decode"

_SMALL = 50_000_000  # parameters

_THREADS = "threads"

_CACHE = "cache_bytes"

_SLACK = 32 << 20  # bytes by which what a process has already differs from time to time

_PROBE = 16  # tokens of a prompt by which steps are timed

_PROBE_SECONDS = 1.5  # in which one number of threads is tried, unless a few steps take longer

_WORTH = 0.9  # of the time: less is not gained by more threads


@dataclass(eq=False)
class _InFlight:
    """A request in flight: the first `prompt` of its `tokens` were given, the others sampled."""

    index: int
    key: int
    prompt: int
    tokens: list[int]


class _Batch:
    """The requests of a call: those that wait, those in flight with what is cached of them, and those completed."""

    def __init__(self, requests: Sequence[Request], cache: Cache) -> None:
        self.requests = requests
        self.cache = cache
        self.waiting = deque(enumerate(requests))
        self.flying: list[_InFlight] = []
        self.completions: dict[int, Completion] = {}
        self.sampled = 0
        self.began = time.monotonic()

    def progress(self) -> Progress:
        """Where it is."""
        rate = self.sampled / max(time.monotonic() - self.began, 1e-9)
        return Progress(len(self.completions), len(self.requests), self.sampled, rate)

    def keep(self, snapshots: Snapshots, key: str) -> None:
        """Write a snapshot if it is time for one."""
        lengths = [len(sequence.tokens) - 1 for sequence in self.flying]  # the newest has been in no step yet

        def nbytes() -> int:
            return sum(tensor.nbytes for tensor in self.cache.kept(lengths))

        if not snapshots.due(nbytes):
            return
        state = {
            "batch": key,
            "seconds": time.monotonic() - self.began,
            "sampled": self.sampled,
            "waiting": len(self.waiting),
            "flying": [[sequence.index, sequence.tokens] for sequence in self.flying],
            "completions": [[index, done.token_ids, done.finish] for index, done in self.completions.items()],
            "cache": self.cache.describe(),
        }
        snapshots.write(state, self.cache.kept(lengths), nbytes())

    def take_up(self, snapshots: Snapshots, key: str, device: torch.device) -> None:
        """Go on from a snapshot of this batch, if there is one."""
        found = snapshots.read()
        if found is None or found.state["batch"] != key:
            return
        state = found.state
        for _ in range(len(self.waiting) - state["waiting"]):
            self.waiting.popleft()
        self.completions = {index: Completion(ids, finish) for index, ids, finish in state["completions"]}
        for index, tokens in state["flying"]:
            asked = self.requests[index]
            self.flying.append(_InFlight(index, asked.key, len(asked.prompt), tokens))
        self.cache.restore(state["cache"], device)
        for tensor in self.cache.kept([len(sequence.tokens) - 1 for sequence in self.flying]):
            found.fill(tensor)
        self.sampled, self.began = state["sampled"], self.began - state["seconds"]
        snapshots.seconds = state["seconds"]


class _DecodeStep:
    """One forward pass: rows below `old` get one token each, those behind them a whole prompt of `lengths` tokens."""

    def __init__(self, cache: Cache, sequences: list[_InFlight], old: int, device: torch.device, threads: int) -> None:
        self.cache, self.old, self.device, self.threads = cache, old, device, threads
        self.lengths = [len(sequence.tokens) for sequence in sequences[old:]]
        ends = np.array([len(sequence.tokens) for sequence in sequences[:old]], dtype=np.int64)
        self.ends = ends.tolist()
        tokens = [sequence.tokens[-1] for sequence in sequences[:old]]
        positions, rows = [ends - 1], [np.arange(old)]
        for row, sequence in enumerate(sequences[old:], start=old):
            tokens += sequence.tokens
            positions.append(np.arange(len(sequence.tokens)))
            rows.append(np.full(len(sequence.tokens), row))
        last = np.cumsum([1] * old + self.lengths) - 1
        self.tokens, self.positions = self._tensor(tokens), self._tensor(np.concatenate(positions))
        self.slots = self._tensor(np.concatenate(rows)) * cache.capacity + self.positions
        self.last = self._tensor(last)
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Attention of q [1, heads, tokens, d] on k and v [1, key-value heads, tokens, d] and what is in the cache.

        Returns [1, tokens, heads, d].
        """
        self.cache.write(layer, self.slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
        parts = []
        # PyTorch's kernel adds up in another order with another number of threads; linear layers do not.
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        if self.old:
            held, worth = (x.transpose(1, 2) for x in self.cache.read(layer, self.ends, self.device))
            queries = q[0, :, : self.old].transpose(0, 1)
            parts.append(decode_attention(queries, held, worth, self._mask(scoring.window), scoring))
        if self.lengths:
            new = slice(self.old, None)
            parts.append(packed_attention(q[0, :, new], k[0, :, new], v[0, :, new], self.lengths, scoring))
        if before != self.threads:
            torch.set_num_threads(before)
        return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]

    def recur(self, layer: int, module: nn.Module, x: Tensor) -> Tensor:
        """The output [1, tokens, width] of a recurrent mixer for x [1, tokens, hidden] and the states in the cache."""
        states, parts = self.cache.states.setdefault(layer, States()), []
        if self.old:
            parts.append(run_on(module, x[0, : self.old, None], states)[:, 0])
        if self.lengths:
            parts.append(run_packed(module, x[0, self.old :], self.lengths, states))
        return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]

    def _mask(self, window: int | None) -> Tensor:
        """[old, span] bool: which positions of the cache each row sees."""
        if window not in self._masks:
            at, end = torch.arange(max(self.ends), device=self.device), self.positions[: self.old, None]
            self._masks[window] = at <= end if window is None else (at <= end) & (at > end - window)
        return self._masks[window]

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.device)


_STEP: ContextVar[_DecodeStep] = ContextVar("step")
"""The forward pass that is under way: not every decoder layer of transformers hands options on to its attention."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """`_DecodeStep.attend`, of the forward pass under way, as one of transformers' attention functions."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return _STEP.get().attend(layer, query, key, value, scoring_of(module, options)), None


AttentionInterface.register(DECODE_ATTENTION, _attend)


class _RecurrentMixer(nn.Module):
    """A recurrent mixer of a decoder layer in place of transformers' own, for tokens of several sequences at once."""

    def __init__(self, layer: int, module: nn.Module) -> None:
        super().__init__()
        self.layer, self.module = layer, module

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """The output [1, tokens, hidden] for the step's tokens."""
        return _STEP.get().recur(self.layer, self.module, hidden_states)


def _take_mixers(model: Any, source: Model) -> None:
    """Put `_RecurrentMixer`s in the place of the recurrent mixers of a causal LM."""
    for number in range(source.layers):
        for plan in source.plans(number):
            if plan.recurrent:
                layer = model.get_decoder().layers[number]
                layer.set_submodule(plan.module, _RecurrentMixer(number, layer.get_submodule(plan.module)))


def _move_around(model: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move what lies around a model's layers to a device, numbers with fractions to `dtype` if that is given.

    What is tied stays tied, and what is on the meta device there.
    """
    moved = dict[int, Tensor]()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    change = dtype if tensor.is_floating_point() else None
                    there = tensor.detach().to(device, change)
                    learned = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if learned else there
                held[name] = moved[id(tensor)]


class Decoder(Sampler):
    """A causal LM and its tokenizer, loaded from a local folder (safetensors only, no remote code).

    `dtype` defaults to the checkpoint's own, or fp32 where a processor is quicker with it. Raises `BadInput` for a
    checkpoint of no known family, and `Damaged` where a tensor, as transformers has read it, is not what it was when
    its checksum was taken.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        room: Room | None = None,
        asked: Sequences | None = None,
        placement: Placement | None = None,
    ) -> None:
        """With a `placement` layers are streamed as it says, with `room` as is planned for what is `asked`."""
        source = Model.open(Checkpoint.open(path))
        super().__init__(source)
        self.device = torch.device(device)
        on_gpu = self.device.type != "cpu"
        working = dtype or working_dtype(source.dtype, on_gpu)
        self._room = room
        self.plan: SamplingPlan | None = None
        """How sampling keeps to its limits; None where there are none, and the model fits."""
        if room is not None and asked is not None:
            self._shape = SamplingShape.of(source, working)
            if room.limited or not self._shape.fits(room.device if on_gpu else room.host):
                self.plan = plan_sampling(self._shape, room, self._cut(asked), on_gpu)
                placement = self.plan.placement
                self.planned = (self.plan.describe(),)
                self.notes += self.planned
        self._budget = 0 if self.plan is None else self.plan.cache
        """Bytes that keys, values and states may take, under a plan."""
        self.threads = torch.get_num_threads()
        """Threads that a CPU samples with (see `choose_threads`); attention has all that there are."""
        refuse_generation_config(source.checkpoint.path)
        loaded = dtype or source.dtype
        model = load_causal_lm(source, loaded, DECODE_ATTENTION, layers=placement is None)
        stored = source.checkpoint.tensors
        for name, tensor in model.state_dict().items():  # those that it does not fuse, widen or rename
            bare = name.partition(".")[2]  # in a checkpoint without `model.` before its names
            info = stored.get(name) or stored.get(bare)
            same = info is not None and (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
            if info is not None and same and not tensor.is_meta:
                source.checkpoint.check_unchanged(info.name, bytes_of(tensor))
        self.model = model.eval()
        self._layers: StreamedLayers | None = None
        if placement is None:
            self.model.to(self.device)
            _take_mixers(self.model, source)
            if working != loaded:
                self.model.to(working)
        else:
            reader = LayerReader(source, model, loaded, working)
            _move_around(model, self.device, working if working != loaded else None)
            self._layers = StreamedLayers(model, reader, placement, self.device)
            _take_mixers(self.model, source)
        if self.device.type == "cpu" and self.model.num_parameters() < _SMALL:
            self.threads = 1  # its steps are too short for threads that wait for each other
        self._most = self.threads
        self.embedded = int(self.model.get_input_embeddings().weight.shape[0])

    def identity(self) -> dict[str, Any]:
        return surroundings(str(self.device))

    def _cut(self, asked: Sequences) -> Sequences:
        """What is asked, with sequences that fit the model's context."""
        return asked if self.context is None else replace(asked, longest=min(asked.longest, self.context))

    def close(self) -> None:
        """Let go of the model."""
        if self._layers is not None:
            self._layers.close()
        self.model = None
        gc.collect()  # modules and their hooks name each other

    @torch.inference_mode()
    def choose_threads(self, journal: Path, rows: int, restart: bool = False) -> dict[str, Any]:
        """Sample with one thread or with all, as is quicker here and now, by a few steps of `rows` sequences each.

        On a busy machine, where one of several threads is always late, two were measured ten times slower than one. A
        job that goes on keeps what its `journal` says. The tokens are the same with either, where PyTorch's products of
        matrices are, as they were wherever that was tried. Returns what is to be entered in the journal. Nothing is
        measured on a GPU, for a small model or where there is but one thread.
        """
        most = self._most
        known = {} if restart else first_record(journal)
        if type(count := known.get(_THREADS)) is int and 1 <= count <= most:
            self.threads = count
        else:
            self.threads = self._quickest(rows, sorted({1, most}))
        if self.threads != most:
            self.notes.append(f"sampled with {self.threads} of {most} threads, which a measurement found the quickest")
        if self.plan is None:
            return {_THREADS: self.threads}
        # A job that goes on has as many sequences in flight as before, for the same tokens.
        before = known.get(_CACHE)
        if type(before) is int and before <= self._budget + _SLACK:
            self._budget = before
        return {_THREADS: self.threads, _CACHE: self._budget}

    def _quickest(self, rows: int, choices: list[int]) -> int:
        """The number of threads among `choices`, in ascending order, by which to sample."""
        if self.device.type != "cpu" or len(choices) == 1 or self._layers is not None:
            return choices[-1]
        best = {count: self._step_seconds(rows, count) for count in choices}
        found = choices[0]
        for count in choices[1:]:  # more threads take more processor time: they have to be worth it
            if best[count] < _WORTH * best[found]:
                found = count
        return found

    def _step_seconds(self, rows: int, threads: int) -> float:
        """The shortest of some steps' times, after one that takes in the prompts and one that is not counted."""
        prompt = [min(self.vocabulary, self.embedded) - 1] * _PROBE
        batch = _Batch([Request(prompt, row) for row in range(rows)], Cache(rows))
        sampling = Sampling(_PROBE)
        with self._with_threads(threads):
            times, until = list[float](), 0.0
            while len(times) < 4 or (len(times) < 12 and time.monotonic() < until):
                old = len(batch.flying)
                _join(batch.flying, batch.waiting, rows, PROMPT_TOKENS)
                began = time.monotonic()
                self._extend(batch.cache, batch.flying, old, sampling)
                times.append(time.monotonic() - began)
                until = until or began + _PROBE_SECONDS
        return min(times[2:])

    @contextmanager
    def _with_threads(self, threads: int) -> Iterator[None]:
        """So many threads of torch, on a CPU."""
        before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        rows: int,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[Completion]:
        """Continue every request until it stops, has `max_new_tokens` or fills the context, at most `rows` at a time.

        Returns a completion a request, in their order. Where there are `snapshots` the batch is written there now and
        then, and one that is found there goes on, to the same tokens.
        """
        rows, prompts, longest = self._in_flight(requests, sampling, rows)
        cache = Cache(min(rows, len(requests)), longest, self.plan is not None and self.plan.cache_on_host)
        batch, snapshots = _Batch(requests, cache), self.snapshots
        key = "" if snapshots is None else batch_key(requests, sampling, rows)
        if snapshots is not None:
            batch.take_up(snapshots, key, self.device)
        with self._with_threads(self.threads):
            while len(batch.completions) < len(requests):
                old = len(batch.flying)
                _join(batch.flying, batch.waiting, batch.cache.rows, prompts)
                self._extend(batch.cache, batch.flying, old, sampling)
                batch.sampled += len(batch.flying)
                batch.completions.update(self._retire(batch.cache, batch.flying, sampling))
                if snapshots is not None:
                    batch.keep(snapshots, key)
                progress(batch.progress())
        return [batch.completions[index] for index in range(len(requests))]

    def _in_flight(self, requests: Sequence[Request], sampling: Sampling, rows: int) -> tuple[int, int, int | None]:
        """Sequences in flight, tokens of prompts in a step, and of the longest sequence, as the plan has room for.

        Where sequences cannot become as long as was planned for, more of them are in flight than was planned.
        """
        if self.plan is None or self._room is None or not requests:
            return rows, PROMPT_TOKENS, None
        prompt = max(len(request.prompt) for request in requests)
        asked = self._cut(Sequences(rows, prompt + sampling.max_new_tokens, prompt))
        each = asked.longest * self._shape.cached + self._shape.state
        fit = self._budget // max(each, 1)
        if fit < 1 or prompt > max(self.plan.prompt_tokens, 1):
            plan_sampling(self._shape, self._room, replace(asked, rows=1), self.device.type != "cpu")
        return max(min(rows, fit), 1), self.plan.prompt_tokens, asked.longest

    def _retire(self, cache: Cache, flying: list[_InFlight], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Take out the sequences that have ended; the last row takes the place that becomes free."""
        row = 0
        while row < len(flying):
            sequence = flying[row]
            finish = self._finish(sequence, sampling)
            if finish is None:
                row += 1
                continue
            yield sequence.index, Completion(sequence.tokens[sequence.prompt :], finish)
            last = flying.pop()
            cache.drop(row, len(flying), len(last.tokens))
            if row < len(flying):
                flying[row] = last

    def _finish(self, sequence: _InFlight, sampling: Sampling) -> FinishReason | None:
        """Why a sequence has ended; None while it has not."""
        if sequence.tokens[-1] in self.stops:
            return "stop"
        if len(sequence.tokens) >= sequence.prompt + sampling.max_new_tokens:
            return "length"
        return "context" if self.context is not None and len(sequence.tokens) >= self.context else None

    def _extend(self, cache: Cache, flying: list[_InFlight], old: int, sampling: Sampling) -> None:
        """Sample a token for every sequence; those from `old` on have not been in the cache before."""
        cache.reserve(max(len(sequence.tokens) for sequence in flying))
        step = _DecodeStep(cache, flying, old, self.device, self._most)
        before = _STEP.set(step)
        try:
            found = self.model(
                input_ids=step.tokens[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=step.last,
            )
        finally:
            _STEP.reset(before)
        logits = found.logits[0, :, : self.vocabulary]
        positions = [len(sequence.tokens) - sequence.prompt for sequence in flying]
        draws = torch.from_numpy(uniforms([sequence.key for sequence in flying], positions)).to(self.device)
        chosen = choose(logits, draws, sampling.temperature, sampling.top_p).tolist()
        for sequence, token in zip(flying, chosen, strict=True):
            sequence.tokens.append(token)


def _join(flying: list[_InFlight], waiting: deque[tuple[int, Request]], rows: int, room: int) -> None:
    """Let requests join, in their order, while rows are free and one step has `room` for tokens of their prompts."""
    old = len(flying)
    while waiting and len(flying) < rows:
        index, request = waiting[0]
        if len(request.prompt) > room and len(flying) > old:
            break
        room -= len(request.prompt)
        flying.append(_InFlight(index, request.key, len(request.prompt), list(request.prompt)))
        waiting.popleft()
