"""A residual block, the inputs of its matrices seen on the way through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac_engine.models.attention import KeyValues
from rac_engine.models.experts import Expert, Mixture
from rac_engine.models.matrices import Group
from rac_engine.models.plans import BlockPlan, Family
from rac_engine.models.taps import Chunk, Tap, _Enough, _Viewing


class Block:
    """A residual block with its weights.

    What its matrices are given is seen on the way through it, by the names of the inputs (`Group.input`).
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
        self.norm = nn.Identity() if plan.norm is None else layer.get_submodule(plan.norm)
        self._after = nn.Identity() if plan.after is None else layer.get_submodule(plan.after)
        self._rotary, self._scale = rotary, scale
        self._module = layer.get_submodule(plan.module)
        self._seen: KeyValues | None = None
        """Of the sequence of which a part has gone through an attention."""
        taken = inspect.signature(self._module.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # renamed by transformers 5.24
        self.linears = {name: layer.get_submodule(family.in_module(name)) for group in groups for name in group.modules}
        """The block's matrices by their names within the layer on disk."""
        shared = [group for group in groups if group.expert is None]
        self.first = shared[0].input if shared else family.on_disk(plan.module)
        """Name of the block's own input, which all tokens have."""
        self.last: str | None = None
        """Name of the input of the last matrix, where `inner` ends with it: not in a mixture."""
        self.width = 0
        """Columns of the last matrix."""
        self._output: nn.Module = nn.Identity()
        self._mixture: Mixture | None = None
        self._routed: dict[str, tuple[Expert, bool]] = {}
        """By the inputs of experts' matrices: whose they are, and whether they are the last matrix's."""
        self._between = [group.input for group in shared[1:]]
        if plan.experts is None:
            self.last = self._between.pop()
            self._output = self.linears[self.last]
            self.width = self._output.get_parameter("weight").shape[1]
            # The module's own forward then ends with what goes into its last matrix.
            setattr(self._module, plan.output, nn.Identity())
        else:
            self._mixture = next(part for part in self._module.modules() if isinstance(part, Mixture))
            of_experts = [group for group in groups if group.expert is not None]
            half = len(of_experts) // 2
            self._mixture.names = [
                (first.input, last.input) for first, last in zip(of_experts[:half], of_experts[half:], strict=True)
            ]
            for expert, (entrance, exit_) in zip(self._mixture, self._mixture.names, strict=True):
                self._routed |= {entrance: (cast(Expert, expert), False), exit_: (cast(Expert, expert), True)}

    def inner(self, x: Tensor, chunk: Chunk, taps: Mapping[str, Tap] | None = None) -> Tensor:
        """The block's input x [tokens, hidden], normalised, to the input of `output` [tokens, its columns].

        In a mixture, there is no such input, and it goes to the block's end. `taps` are shown the inputs they name.
        """
        return self._pass(x, chunk, _Viewing(taps or {}, through=True))

    def look(self, x: Tensor, chunk: Chunk, taps: Mapping[str, Tap]) -> None:
        """Show `taps` the inputs they name, going no further than that takes."""
        with suppress(_Enough):
            self._pass(x, chunk, _Viewing(taps, through=False))

    def is_routed(self, name: str) -> bool:
        """Whether an input is an expert's."""
        return name in self._routed

    def routed(self, name: str, x: Tensor) -> Tensor:
        """What an expert's input would be, if the tokens x [tokens, hidden] came to that expert."""
        expert, last = self._routed[name]
        return expert.inner(x) if last else x

    def routed_output(self, name: str, inner: Tensor) -> Tensor:
        """What an expert's last matrix gives [tokens, hidden] for its input, called `name`, without its bias."""
        output = self.linears[name]
        return F.linear(inner, output.get_parameter("weight"))

    def leave(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """What the block hands on [tokens, hidden], from what it was given and its `inner`."""
        return self.add(hidden, self.output(inner))

    def output(self, inner: Tensor) -> Tensor:
        """What the last matrix gives [tokens, hidden], its bias included."""
        output: Tensor = self._output(inner)
        return output

    @property
    def bias(self) -> Tensor | None:
        """The last matrix's bias [hidden]."""
        return cast("Tensor | None", getattr(self._output, "bias", None))

    def add(self, hidden: Tensor, output: Tensor) -> Tensor:
        """What the block hands on [tokens, hidden], from what it was given and the `output` of its last matrix."""
        added = self._after(output)
        return hidden + (added if self._scale == 1 else added * self._scale)

    def missing(self, wanted: Tensor, hidden: Tensor) -> Tensor | None:
        """What more the last matrix would have to give for `hidden` [tokens, hidden] to become `wanted`.

        None where a norm stands behind the matrix, so that there is no such answer.
        """
        if self.plan.after is not None:
            return None
        return (wanted.float() - hidden.float()).div_(self._scale).to(hidden.dtype)

    @contextmanager
    def copied(self) -> Iterator[dict[str, nn.Module]]:
        """For a while, all of the block's parameters are copies in fp32. Gives its matrices' modules by their names."""
        parts = (self.norm, self._module, self._output, self._after)
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

    def _pass(self, x: Tensor, chunk: Chunk, viewing: _Viewing) -> Tensor:
        viewing.see(self.first, x)
        hooks = [self._watch(name, viewing, len(x)) for name in self._between if name in viewing.left]
        if self._mixture is not None:
            self._mixture.viewing = viewing
        try:
            if self.plan.attention:
                inner = self._attend(x, chunk)
            else:
                made = self._module(x[None])
                inner = (made[0] if isinstance(made, tuple) else made)[0]
        finally:
            for hook in hooks:
                hook.remove()
            if self._mixture is not None:
                self._mixture.viewing = _Viewing({}, through=True)  # holds on to nothing that was gathered
        if self.last is not None:
            viewing.see(self.last, inner)
        return inner

    def _attend(self, x: Tensor, chunk: Chunk) -> Tensor:
        lengths = chunk.lengths
        if not chunk.is_part:
            self._seen = None
        else:
            lengths = (len(x),)
            if chunk.offset == 0:
                self._seen = KeyValues(chunk.lengths[0])
        inner: Tensor = self._module(
            x[None],
            position_embeddings=self._rotary(x[None], chunk),
            attention_mask=None,
            lengths=lengths,
            **{self._cache_name: self._seen},
        )[0][0]
        if chunk.offset + len(x) == chunk.lengths[0]:
            self._seen = None  # the last part
        return inner

    def _watch(self, name: str, viewing: _Viewing, tokens: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Where keys are computed from what the cache holds, earlier parts of the sequence come before the tokens.
            viewing.see(name, given[0].flatten(0, -2)[-tokens:])

        return self.linears[name].register_forward_pre_hook(hook)


class Head(Block):
    """The final norm, behind it `lm_head`, as a block that no token needs to get through: its input is all there is."""

    def __init__(self, norm: nn.Module, group: Group) -> None:
        self.plan = BlockPlan("", None, group.modules, group.input)
        self.groups, self.norm, self.linears = [group], norm, {}
        self.first, self.last, self.width = group.input, None, 0

    def leave(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """Nothing comes of it."""
        return hidden

    def _pass(self, x: Tensor, chunk: Chunk, viewing: _Viewing) -> Tensor:
        viewing.see(self.first, x)
        return x
