"""A residual block of a decoder layer, and a pass of tokens through it that observes the inputs of its matrices."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac_engine.models.attention import KeyValues
from rac_engine.models.chunk import Chunk
from rac_engine.models.experts import Expert, Mixture
from rac_engine.models.matrices import Group
from rac_engine.models.observers import AllObserved, Observation, Observer
from rac_engine.models.plans import BlockPlan, Family
from rac_engine.models.recurrent import States, cache_name, run_on, run_packed
from rac_kernels import add_residual, residual_gap

PIECE = 512  # tokens that are gone on with at a time on a CPU
GRAIN = 64  # of which their number is a multiple where it can be: oneDNN compiles a product for each number anew


class Block:
    """A residual block with its weights: hidden + scale · after(output(inner(norm(hidden)))).

    Observers see the inputs of its matrices by the names of the inputs (`Group.input`).
    """

    def __init__(
        self,
        layer: nn.Module,
        plan: BlockPlan,
        groups: Sequence[Group],
        family: Family,
        rotary: Callable[[Tensor, Chunk], Any],
        scale: float = 1.0,
    ) -> None:
        self.plan, self.groups = plan, groups
        self._norm = nn.Identity() if plan.norm is None else layer.get_submodule(plan.norm)
        self._after = nn.Identity() if plan.after is None else layer.get_submodule(plan.after)
        self._factor = None if plan.times is None else cast(Tensor, getattr(layer, plan.times))
        self._rotary, self._scale = rotary, scale
        self._module = layer.get_submodule(plan.module)
        self._beside = None if plan.beside is None else layer.get_submodule(plan.beside.module)
        self._seen: KeyValues | None = None
        """Keys and values of the sequence of which a part has gone through the attention."""
        taken = inspect.signature(self._module.forward).parameters
        self._asks_positions, self._shares = "position_ids" in taken, "shared_kv_states" in taken
        self._states = States()
        """States of a recurrent module behind the part of a sequence that has gone through it."""
        self._cache_name = cache_name(self._module)
        self.linears = {name: layer.get_submodule(family.in_module(name)) for group in groups for name in group.modules}
        """The block's matrices by their names within the layer on disk."""
        shared = [group for group in groups if group.expert is None]
        self.first = shared[0].input if shared else family.on_disk(plan.module)
        """Name of the block's own input, which all tokens have."""
        self.last: str | None = None
        """Name of the input of the last matrix, where `inner` ends with it: not in a mixture or with an MLP beside."""
        self.width = 0
        """Columns of the last matrix."""
        self._output: nn.Module = nn.Identity()
        self._mixture: Mixture | None = None
        self._routed: dict[str, tuple[Expert, bool]] = {}
        """By an input's name: the expert it belongs to, and whether it is that of the expert's last matrix."""
        self._between = [group.input for group in shared[1:]]
        if plan.experts is None and plan.beside is None:
            self._take_output(self._between.pop())
        if plan.experts is not None:
            self._name_experts([group.input for group in groups if group.expert is not None])

    def _take_output(self, name: str) -> None:
        """Take the last matrix out of the module, whose forward then ends with the matrix's input, called `name`."""
        self.last = name
        self._output = self.linears[name]
        self.width = self._output.get_parameter("weight").shape[1]
        setattr(self._module, self.plan.output, nn.Identity())

    def _name_experts(self, inputs: Sequence[str]) -> None:
        """Tell the mixture the names of its experts' `inputs`, those of the entrance first, then the others."""
        self._mixture = next(part for part in self._module.modules() if isinstance(part, Mixture))
        half = len(inputs) // 2
        self._mixture.names = list(zip(inputs[:half], inputs[half:], strict=True))
        for expert, (entrance, exit_) in zip(self._mixture, self._mixture.names, strict=True):
            self._routed |= {entrance: (cast(Expert, expert), False), exit_: (cast(Expert, expert), True)}

    def norm(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """The block's normalised input [tokens, hidden] from the hidden states before it, in `room` if that does.

        On a CPU some tokens at a time, so that what a norm makes in fp32 on the way stays in the cache: a third of the
        time, and the same bits, as each token is normalised by itself.
        """
        if isinstance(self._norm, nn.Identity) or hidden.device.type != "cpu" or torch.is_grad_enabled():
            normed: Tensor = self._norm(hidden)
            return normed
        return _piecewise(lambda some: self._norm(hidden[some]), _pieces(len(hidden)), room)

    def inner(
        self, x: Tensor, chunk: Chunk, observers: Mapping[str, Observer] | None = None, room: Tensor | None = None
    ) -> Tensor:
        """The input of the last matrix [tokens, width] from the block's normalised input x [tokens, hidden].

        In a mixture, or with an MLP beside, there is no such input: the output [tokens, hidden] of all is returned.
        `observers` are shown the inputs they name. `room` [tokens, width] is where to put what is returned.
        """
        made = self._pass(x, chunk, Observation(observers or {}, through=True), room)
        if room is None or made is room:
            return made
        return room.copy_(made)

    def observe(self, x: Tensor, chunk: Chunk, observers: Mapping[str, Observer]) -> None:
        """Show `observers` the inputs they name of x [tokens, hidden], going no further into the block than needed."""
        with suppress(AllObserved):
            self._pass(x, chunk, Observation(observers, through=False))

    def is_routed(self, name: str) -> bool:
        """Whether an input is an expert's."""
        return name in self._routed

    def expert_input(self, name: str, x: Tensor) -> Tensor:
        """An expert's input [tokens, columns], called `name`, if all tokens x [tokens, hidden] came to that expert."""
        expert, last = self._routed[name]
        return expert.inner(x) if last else x

    def expert_output(self, name: str, inner: Tensor) -> Tensor:
        """The output of an expert's last matrix [tokens, hidden] for its input, called `name`, without its bias."""
        output = self.linears[name]
        return F.linear(inner, output.get_parameter("weight"))

    def finish(self, hidden: Tensor, inner: Tensor, room: Tensor | None = None) -> Tensor:
        """The hidden states behind the block [tokens, hidden] from those before it and its `inner`.

        `room` [tokens, hidden] is where to put them; it may be the memory of those before.
        """
        if _goes_by_pieces(inner):
            pieces = _pieces(len(hidden))
            made = _piecewise(lambda some: self.add(hidden[some], self.output(inner[some])), pieces, room)
        else:
            made = self.add(hidden, self.output(inner))
        return made if room is None or made is room else room.copy_(made)

    def output(self, inner: Tensor) -> Tensor:
        """The last matrix's output [tokens, hidden] for its input `inner` [tokens, width], its bias included."""
        output: Tensor = self._output(inner)
        return output

    @property
    def bias(self) -> Tensor | None:
        """The last matrix's bias [hidden]."""
        return cast("Tensor | None", getattr(self._output, "bias", None))

    def add(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The hidden states behind the block [tokens, hidden] from those before it and its last matrix's `output`."""
        factor = None if self._factor is None else self._factor.to(hidden.dtype)
        return add_residual(hidden, self._after(output), self._scale, factor)

    def output_gap(self, wanted: Tensor, hidden: Tensor) -> Tensor | None:
        """The change of the last matrix's output that would turn the states `hidden` [tokens, hidden] into `wanted`.

        None where a norm stands behind the matrix, so that no one change does.
        """
        if self.plan.after is not None:
            return None
        return residual_gap(wanted, hidden, self._scale)

    @contextmanager
    def copied(self) -> Iterator[dict[str, nn.Module]]:
        """Replace the block's parameters with fp32 copies within the context; gives its matrices by their names."""
        parts = [self._norm, self._module, self._output, self._after]
        parts += [] if self._beside is None else [self._beside]
        held = {
            (module, name): parameter
            for part in parts
            for module in part.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        try:
            for (module, name), parameter in held.items():
                copy = parameter.detach().to(torch.float32, copy=True)
                module.register_parameter(name, nn.Parameter(copy, requires_grad=False))
            yield self.linears
        finally:
            for (module, name), parameter in held.items():
                module.register_parameter(name, parameter)

    def _pass(self, x: Tensor, chunk: Chunk, observation: Observation, room: Tensor | None = None) -> Tensor:
        observation.show(self.first, x)
        hooks = [self._hook(name, observation, len(x)) for name in self._between if name in observation.left]
        if self._mixture is not None:
            self._mixture.observation = observation
        try:
            by_pieces = not hooks and _goes_by_pieces(x)
            if self.plan.attention:
                inner = self._attend(x, chunk, room) if by_pieces else self._attend_to(x, chunk)
            elif self.plan.recurrent:
                inner = self._recur(x, chunk)
            elif by_pieces and self._mixture is None:
                inner = _piecewise(lambda some: self._run(x[some]), _pieces(len(x)), room)
            else:
                inner = self._run(x)
            if self._beside is not None:
                inner = inner + self._beside(x)
        finally:
            for hook in hooks:
                hook.remove()
            if self._mixture is not None:
                self._mixture.observation = Observation({}, through=True)  # holds on to nothing that was gathered
        if self.last is not None:
            observation.show(self.last, inner)
        return inner

    def _run(self, x: Tensor) -> Tensor:
        """What a module that looks at each token by itself gives for x [tokens, hidden]."""
        made = self._module(x[None])
        inner: Tensor = (made[0] if isinstance(made, tuple) else made)[0]
        return inner

    def _attend(self, x: Tensor, chunk: Chunk, room: Tensor | None) -> Tensor:
        """By pieces of whole sequences, each with some of the next one's tokens that make its size a common one."""
        pieces = {each.start - chunk.start: each for each in chunk.pieces(PIECE)}
        spans = [slice(at, at + each.stop - each.start) for at, each in pieces.items()]

        def attended(some: slice) -> Tensor:
            piece = pieces[some.start].filled(GRAIN, chunk.stop)
            return self._attend_to(x[some.start : some.start + piece.stop - piece.start], piece)[
                : some.stop - some.start
            ]

        return _piecewise(attended, spans, room)

    def _attend_to(self, x: Tensor, chunk: Chunk) -> Tensor:
        lengths = chunk.lengths
        if not chunk.is_part:
            self._seen = None
        else:
            lengths = (len(x),)
            if chunk.offset == 0:
                self._seen = KeyValues(chunk.lengths[0])
        asked: dict[str, Any] = {self._cache_name: self._seen}
        if self._asks_positions:
            asked["position_ids"] = chunk.positions(x.device)[None]
        if self._shares:
            asked["shared_kv_states"] = {}  # what other layers might use: none does
        inner: Tensor = self._module(
            x[None],
            position_embeddings=self._rotary(x[None], chunk),
            attention_mask=None,
            lengths=lengths,
            **asked,
        )[0][0]
        if chunk.offset + len(x) == chunk.lengths[0]:
            self._seen = None  # the last part
        return inner

    def _recur(self, x: Tensor, chunk: Chunk) -> Tensor:
        if not chunk.is_part:
            return run_packed(self._module, x, chunk.lengths)
        if chunk.offset == 0:
            self._states = States()
        inner = run_on(self._module, x[None], self._states)[0]
        if chunk.offset + len(x) == chunk.lengths[0]:
            self._states = States()  # the last part
        return inner

    def _hook(self, name: str, observation: Observation, tokens: int) -> torch.utils.hooks.RemovableHandle:
        """Show a matrix's input, of the newest `tokens`, when its module is called."""

        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Where keys are computed from what the cache holds, earlier parts of the sequence come before the tokens.
            observation.show(name, given[0].flatten(0, -2)[-tokens:])

        return self.linears[name].register_forward_pre_hook(hook)


def _goes_by_pieces(x: Tensor) -> bool:
    """Whether x [tokens, …] goes through linear layers some tokens at a time, so that all that is made stays in cache.

    Where these give the same bits: oneDNN's products of bf16 do, those of other libraries need not.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def _pieces(tokens: int) -> list[slice]:
    """Even runs of at most `PIECE` tokens, in order: of very few some products are others.

    All but the last are multiples of `GRAIN`, so that few sizes occur.
    """
    count, grains = max(-(-tokens // PIECE), 1), -(-tokens // GRAIN)
    edges = [min(grains * at // count * GRAIN, tokens) for at in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _piecewise(make: Callable[[slice], Tensor], pieces: Sequence[slice], room: Tensor | None = None) -> Tensor:
    """What `make` gives for each of the pieces [tokens, …], behind one another, in `room` if it is of their kind."""
    first, *others = pieces
    made = make(first)
    if not others:
        return made
    shape = (others[-1].stop, *made.shape[1:])
    fits = room is not None and room.dtype == made.dtype and room.shape == shape
    every = room if room is not None and fits else made.new_empty(shape)
    every[first] = made
    for some in others:
        every[some] = make(some)
    return every


class Head(Block):
    """The final norm and `lm_head`, as a block of which only the input is ever asked for."""

    def __init__(self, norm: nn.Module, group: Group) -> None:
        self.plan = BlockPlan("", None, group.modules, group.input)
        self.groups, self._norm, self.linears = [group], norm, {}
        self.first, self.last, self.width = group.input, None, 0

    def finish(self, hidden: Tensor, inner: Tensor, room: Tensor | None = None) -> Tensor:
        """The hidden states as they are: no token goes further."""
        return hidden

    def _pass(self, x: Tensor, chunk: Chunk, observation: Observation, room: Tensor | None = None) -> Tensor:
        observation.show(self.first, x)
        return x
