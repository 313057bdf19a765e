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

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.checkpoint import Checkpoint, bytes_of, find_format, read_config
from rac_engine.models import Model, States, loading_config, run_on, run_packed, scoring_of, working_dtype
from rac_engine.traces.endings import stop_tokens
from rac_engine.traces.sampling import Completion, Progress, Request, Sampling, choose, uniforms
from rac_kernels import Scoring, decode_attention, packed_attention

DECODE_ATTENTION = "rac_decode"

PROMPT_TOKENS = 8192  # that join in one step, or one prompt that is longer

_SMALL = 50_000_000  # parameters

_MAX_TEMPLATE_FILE = 4 << 20  # bytes


@dataclass(eq=False)
class _InFlight:
    """A request in flight: the first `prompt` of its `tokens` were given, the others sampled."""

    index: int
    key: int
    prompt: int
    tokens: list[int]


class _Cache:
    """Keys and values of the sequences in flight, a row each: [rows, capacity, heads, d] in every layer.

    Of recurrent mixers, their states, a row each for those that have been in a step.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.capacity = rows, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, States] = {}

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        if length > self.capacity:
            self.capacity = max(length, self.capacity * 3 // 2)
            for layer, tensors in self.layers.items():
                self.layers[layer] = (self._grown(tensors[0]), self._grown(tensors[1]))

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put key and value [tokens, heads, d] at their slots [tokens] = row * capacity + position."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key), self._empty(value))
        held = self.layers[layer]
        for buffer, new in zip(held, (key, value), strict=True):
            buffer.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
        return held

    def drop(self, row: int, last: int, length: int) -> None:
        """Let row `row` hold what the `last` one, of `length` tokens, holds, which goes."""
        for tensor in itertools.chain(*self.layers.values()) if row < last else ():
            tensor[row, :length] = tensor[last, :length]
        for states in self.states.values():
            states.drop(row)

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: what is masked is multiplied by zero, which memory that holds NaN would survive.
        return like.new_zeros(self.rows, self.capacity, *like.shape[1:])

    def _grown(self, tensor: Tensor) -> Tensor:
        grown = self._empty(tensor[0])
        grown[:, : tensor.shape[1]] = tensor
        return grown


class _DecodeStep:
    """One forward pass: rows below `old` get one token each, those behind them a whole prompt of `lengths` tokens."""

    def __init__(self, cache: _Cache, sequences: list[_InFlight], old: int, device: torch.device) -> None:
        self.cache, self.old, self.device = cache, old, device
        self.lengths = [len(sequence.tokens) for sequence in sequences[old:]]
        ends = np.array([len(sequence.tokens) for sequence in sequences[:old]], dtype=np.int64)
        self.span = int(ends.max(initial=0))
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
        keys, values = self.cache.write(layer, self.slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
        parts = []
        if self.old:
            held, worth = (x[: self.old, : self.span].transpose(1, 2) for x in (keys, values))
            queries = q[0, :, : self.old].transpose(0, 1)
            parts.append(decode_attention(queries, held, worth, self._mask(scoring.window), scoring))
        if self.lengths:
            new = slice(self.old, None)
            parts.append(packed_attention(q[0, :, new], k[0, :, new], v[0, :, new], self.lengths, scoring))
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
            at, end = torch.arange(self.span, device=self.device), self.positions[: self.old, None]
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


class Decoder:
    """A causal LM and its tokenizer, loaded from a local folder (safetensors only, no remote code).

    `dtype` defaults to the checkpoint's own, or fp32 where a processor is quicker with it. Raises `BadInput` for a
    checkpoint of no known family, and `Damaged` where a tensor, as transformers has read it, is not what it was when
    its checksum was taken.
    """

    def __init__(self, path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        source = Model.open(Checkpoint.open(path))
        self.sha256 = source.checkpoint.sha256()
        """SHA-256 of the checkpoint."""
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(path)
        model = _load(source, dtype or source.dtype)
        stored = source.checkpoint.tensors
        for name, tensor in model.state_dict().items():  # those that it does not fuse, widen or rename
            info = stored.get(name) or stored.get(
                name.partition(".")[2]
            )  # of a checkpoint without `model.` before them
            if info is not None and (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape):
                source.checkpoint.check_unchanged(info.name, bytes_of(tensor))
        self.model = model.eval().to(self.device)
        _take_mixers(self.model, source)
        if dtype is None and source.dtype != (quicker := working_dtype(source.dtype, self.device.type != "cpu")):
            self.model.to(quicker)
        self.stops = stop_tokens(source.checkpoint.path, self.tokenizer)
        # An embedding may be padded beyond the tokenizer's tokens: those rows are never sampled.
        self.vocabulary = len(self.tokenizer)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """One thread for a small model on a CPU: its steps are too short for threads that wait for each other.

        On a busy machine, where one of them is always late, two were measured ten times slower than one.
        """
        before = torch.get_num_threads()
        if self.device.type == "cpu" and self.model.num_parameters() < _SMALL:
            torch.set_num_threads(1)
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
        """Continue every request until it stops or has `max_new_tokens`, at most `rows` at a time.

        Returns a completion a request, in their order.
        """
        with self._threads():
            return self._decode(requests, sampling, rows, progress)

    def _decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        rows: int,
        progress: Callable[[Progress], None],
    ) -> list[Completion]:
        began, sampled = time.monotonic(), 0
        cache, waiting = _Cache(min(rows, len(requests))), deque(enumerate(requests))
        flying: list[_InFlight] = []
        completions: dict[int, Completion] = {}
        while len(completions) < len(requests):
            old = len(flying)
            _join(flying, waiting, cache.rows)
            self._extend(cache, flying, old, sampling)
            sampled += len(flying)
            completions.update(self._retire(cache, flying, sampling))
            progress(Progress(len(completions), len(requests), sampled, sampled / (time.monotonic() - began)))
        return [completions[index] for index in range(len(requests))]

    def _retire(self, cache: _Cache, flying: list[_InFlight], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Take out the sequences that have ended; the last row takes the place that becomes free."""
        row = 0
        while row < len(flying):
            sequence = flying[row]
            stopped = sequence.tokens[-1] in self.stops
            if not stopped and len(sequence.tokens) < sequence.prompt + sampling.max_new_tokens:
                row += 1
                continue
            said = sequence.tokens[sequence.prompt :]
            yield sequence.index, Completion(said, "stop" if stopped else "length")
            last = flying.pop()
            cache.drop(row, len(flying), len(last.tokens))
            if row < len(flying):
                flying[row] = last

    def _extend(self, cache: _Cache, flying: list[_InFlight], old: int, sampling: Sampling) -> None:
        """Sample a token for every sequence; those from `old` on have not been in the cache before."""
        cache.reserve(max(len(sequence.tokens) for sequence in flying))
        step = _DecodeStep(cache, flying, old, self.device)
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


def _join(flying: list[_InFlight], waiting: deque[tuple[int, Request]], rows: int) -> None:
    """Let requests join, in their order, while rows are free and one step has room for their prompts."""
    old, room = len(flying), PROMPT_TOKENS
    while waiting and len(flying) < rows:
        index, request = waiting[0]
        if len(request.prompt) > room and len(flying) > old:
            break
        room -= len(request.prompt)
        flying.append(_InFlight(index, request.key, len(request.prompt), list(request.prompt)))
        waiting.popleft()


def _load(source: Model, dtype: torch.dtype) -> Any:
    """The causal LM of a checkpoint; quantized weights as what they stand for, on every device, as they are pruned.

    Raises `BadInput` where transformers does not find all of its weights: it would go on with random ones.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": DECODE_ATTENTION,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # told of below, in one line
    }
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    checkpoint, config = source.checkpoint, loading_config(source.checkpoint.config)
    path = checkpoint.path
    if config is None:
        config = AutoConfig.from_pretrained(path, **local)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    pair: Any
    if find_format(checkpoint.config) is None:
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        pair = auto.from_pretrained(path, config=config, use_safetensors=True, **local, **options)
    else:
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        tensors = {name: _Lazy(checkpoint, name) for name in checkpoint.tensors}
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        made = cast(Any, mapping[type(config)])
        if made.config_class is not type(config):  # the language model of one that also takes images
            config = config.get_text_config()
        pair = made.from_pretrained(None, config=config, state_dict=tensors, **options)
        if (path / "generation_config.json").exists():
            pair[0].generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    model, found = pair
    if lost := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise BadInput(
            f"{path}: transformers finds no weights that fit {lost[0]!r}, one of {len(lost)} such tensors; sample with "
            "another engine"
        )
    _put_fp32_back(model, source)
    return model


def _put_fp32_back(model: Any, source: Model) -> None:
    """Give what is stored in fp32 and is to be used so (`Family.fp32`) as it is: transformers rounds some of it."""
    family = source.family
    for number in range(source.layers if family.fp32 else 0):
        layer = model.get_decoder().layers[number]
        for name in source.tensor_names(number):
            inside = family.in_module(name.removeprefix(f"{family.layers}{number}."))
            stored = source.checkpoint.tensors[name].dtype
            if stored == torch.float32 and any(part in inside for part in family.fp32):
                home, _, part = inside.rpartition(".")
                getattr(layer.get_submodule(home), part).data = source.checkpoint.read(name)


@dataclass(frozen=True)
class _Lazy:
    """A tensor of a checkpoint that is read when transformers' loader asks for `[...]` of it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read(self.name)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a local folder. Raises `BadInput` if there is none that transformers can load."""
    try:
        file = Path(path) / "config.json"
        config = loading_config(read_config(file)) if file.exists() else None
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers has no one exception for this
        if "contains custom code" in str(error):
            raise BadInput(
                f"{path}: its tokenizer is code that was published with it, which is never run; put a tokenizer in its "
                "place that transformers loads without (a tokenizer.json), or import traces of another engine"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: no tokenizer that transformers can load ({reason})") from None
    # Where its files are missing, transformers makes up a tokenizer that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BadInput(f"{path}: no tokenizer; copy the model's tokenizer files into the folder")
    # Models that also take images may have the template there, where transformers' processors look for it alone.
    file = Path(path) / "chat_template.json"
    if not tokenizer.chat_template and file.exists():
        found = read_json_object(file, _MAX_TEMPLATE_FILE, "give the checkpoint's folder", "fetch the checkpoint again")
        if isinstance(template := found.get("chat_template"), str):
            tokenizer.chat_template = template
    return tokenizer
