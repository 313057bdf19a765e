"""The residual blocks of each decoder layer of a model, found by watching which tensor goes where in a forward pass.

A block adds scale · after(module(norm(hidden))) to the hidden states. Which modules these are is told by the tensors
themselves: a norm is given the hidden states, a module what the norm makes, and the next module the sum. Tensors are
the same where they lie at the same place in memory; all are kept until the pass has been read.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rac_engine.models.discovery.small import Unfit

SAME = 1e-5  # relative: of sums in fp32


@dataclass
class Call:
    """One call of a module: what tensor it was given and what it made."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor | None = None
    words: tuple[str, ...] = ()
    """Further positional arguments that are text."""

    @property
    def result(self) -> Tensor:
        """What it made."""
        assert self.made is not None
        return self.made


@dataclass(frozen=True)
class Part:
    """A residual block as it was found, by names within the layer and, for matrices, within the module."""

    module: str
    norm: str | None
    after: str | None
    inputs: tuple[str, ...]
    between: tuple[str, ...]
    output: str
    attention: bool
    mixture: bool
    scale: float


@dataclass
class Trace:
    """A forward pass of one sequence through a model."""

    layers: list[Call]
    """The decoder layers, in their order."""
    inside: list[list[Call]]
    """The calls within each layer, in the order in which they began."""
    around: list[Call] = field(default_factory=list)
    """Calls of the modules beside the layers."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers at the same place in memory, whatever their shapes."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() and b.is_contiguous()


def layer_list(model: nn.Module, count: int) -> list[nn.Module]:
    """The decoder layers of a model. Raises `Unfit` where there is not exactly one row of them."""
    found = [
        (name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == count
    ]
    found = [(name, each) for name, each in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(found) != 1:
        raise Unfit(f"{len(found)} of its modules could be the row of decoder layers")
    layers = list(found[0][1])
    if len({type(layer) for layer in layers}) != 1:
        raise Unfit(
            f"its decoder layers are of several classes: {', '.join(sorted({type(x).__name__ for x in layers}))}"
        )
    return layers


def trace(model: nn.Module, layers: Sequence[nn.Module], token_ids: Tensor) -> Trace:
    """Send token ids [tokens] through the model and note the calls of all modules."""
    made = Trace([], [])
    open_: list[list[Call]] = [made.around]
    hooks = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *named.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            given = named.get("hidden_states", tensors[0] if tensors else torch.empty(0))
            open_[-1].append(Call(name, module, given, words=tuple(x for x in args if isinstance(x, str))))

        return hook

    def after(calls: list[Call]) -> Any:
        def hook(module: nn.Module, _: Any, found: Any) -> None:
            first = found[0] if isinstance(found, tuple) else found
            call = next(call for call in reversed(calls) if call.module is module and call.made is None)
            call.made = first if isinstance(first, Tensor) else torch.empty(0)

        return hook

    within: dict[int, list[Call]] = {}
    for number, layer in enumerate(layers):
        within[number] = []

        def enter(module: nn.Module, args: Any, named: Any, number: int = number) -> None:
            given = args[0] if args else named["hidden_states"]
            made.layers.append(Call(str(number), module, given))
            open_.append(within[number])

        def leave(module: nn.Module, _: Any, found: Any) -> None:
            open_.pop()
            made.layers[-1].made = found[0] if isinstance(found, tuple) else found

        hooks += [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
        for name, module in layer.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                hooks.append(module.register_forward_hook(after(within[number])))
    inside_layers = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if name and module not in inside_layers and not any(layer in set(module.modules()) for layer in layers[:1]):
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(made.around)))
    try:
        with torch.no_grad():
            model(input_ids=token_ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if [call.name for call in made.layers] != [str(number) for number in range(len(layers))]:
        raise Unfit("its decoder layers are not run one after the other, once each")
    made.inside = [within[number] for number in range(len(layers))]
    return made


def find_parts(layer: Call, calls: Sequence[Call]) -> tuple[Part, ...]:
    """The residual blocks of a decoder layer from the `calls` in it. Raises `Unfit` where it is no row of them."""
    own = [call for call in calls if "." not in call.name]
    parts = [call for call in own if _has_matrices(call.module)]
    norms = [call for call in own if call not in parts and not same(call.given, call.result)]
    if not parts:
        raise Unfit(f"{type(layer.module).__name__} has no modules with matrices of their own")
    hidden, found, entrances = layer.given, list[Part](), list[Tensor]()
    for part in parts:
        if isinstance(part.module, nn.Linear):
            raise Unfit(f"{part.name} is a matrix of the layer itself, in no module with others")
        norm = None if same(part.given, hidden) else _made_by(norms, part.given)
        source = part.given if norm is None else norm.given
        if entrances and same(source, entrances[-1]):
            raise Unfit(f"{found[-1].module} and {part.name} are parallel branches")
        if not same(source, hidden):
            raise Unfit(f"{part.name} is given neither the hidden states nor a norm of them")
        entrances.append(hidden)
        after = next((call for call in norms if same(call.given, part.result) and not same(call.given, hidden)), None)
        added = part.result if after is None else after.result
        begun = own.index(part if after is None else after)
        ahead = next((call for call in own[begun + 1 :] if call in parts or call in norms), None)
        beyond = layer.result if ahead is None else ahead.given
        scale = _factor(hidden, added, beyond)
        if scale is None and any(same(other.given, part.given) for other in parts if other is not part):
            raise Unfit(f"{' and '.join(each.name for each in parts)} are parallel branches")
        if scale is None:
            raise Unfit(f"behind {part.name} the hidden states are not those before it and a multiple of its output")
        found.append(
            _matrices(part, norm, after, scale, [call for call in calls if call.name.startswith(f"{part.name}.")])
        )
        hidden = beyond
    if not same(hidden, layer.result):
        raise Unfit(f"{type(layer.module).__name__} changes the hidden states behind its last block")
    return tuple(found)


def _has_matrices(module: nn.Module) -> bool:
    normed = {id(p) for each in module.modules() if "norm" in type(each).__name__.lower() for p in each.parameters()}
    return any(parameter.ndim > 1 and id(parameter) not in normed for parameter in module.parameters())


def _made_by(calls: Sequence[Call], tensor: Tensor) -> Call | None:
    return next((call for call in calls if same(call.result, tensor)), None)


def _factor(hidden: Tensor, added: Tensor, beyond: Tensor) -> float | None:
    """The s with beyond = hidden + s · added; None where there is none."""
    if not hidden.shape == added.shape == beyond.shape:
        return None
    gap, part = (beyond.double() - hidden.double()).flatten(), added.double().flatten()
    length = float(part.dot(part))
    if not length:
        return None
    scale = float(gap.dot(part)) / length
    off = float((gap - scale * part).norm()) / float(beyond.double().norm())
    return scale if off < SAME and scale else None


def _matrices(part: Call, norm: Call | None, after: Call | None, scale: float, calls: Sequence[Call]) -> Part:
    """A block with its matrices by who is given what."""
    kind = type(part.module).__name__
    taken = inspect.signature(part.module.forward).parameters
    attention = bool({"attention_mask", "position_embeddings"} & taken.keys())
    mixture = hasattr(part.module, "experts")
    if any(isinstance(each, nn.Conv1d) for each in part.module.modules()):
        raise Unfit(f"{part.name} ({kind}) is recurrent: it has a convolution or a state")
    where, entrance, exit_ = "", part.given, part.result
    if mixture:
        fused = part.module.get_submodule("experts")
        if isinstance(fused, nn.ModuleList) or not hasattr(fused, "down_proj"):
            raise Unfit(f"the experts of {part.name} ({type(fused).__name__}) are in a form that is not known")
        shared = [
            call
            for call in calls
            if _direct(call, part)
            and not isinstance(call.module, nn.Linear)
            and call.module is not fused
            and any(isinstance(each, nn.Linear) for each in call.module.modules())
            and call.result.numel() == call.given.numel()
        ]
        if len(shared) > 1:
            raise Unfit(f"{part.name} ({kind}) has several experts that all tokens go through")
        if not shared:
            return Part(part.name, _name(norm), _name(after), (), (), "", attention, True, scale)
        where, entrance, exit_ = shared[0].name.removeprefix(f"{part.name}.") + ".", shared[0].given, shared[0].result
    linears = [
        call for call in calls if isinstance(call.module, nn.Linear) and call.name.startswith(f"{part.name}.{where}")
    ]
    names = [call.name.removeprefix(f"{part.name}.") for call in linears]
    if len(set(names)) < len(names):
        raise Unfit(f"{part.name} ({kind}) uses a matrix more than once")
    inputs = tuple(name for name, call in zip(names, linears, strict=True) if same(call.given, entrance))
    outputs = [name for name, call in zip(names, linears, strict=True) if same(call.result, exit_)]
    _refuse_other_weights(part, names)
    if not inputs or len(outputs) != 1 or outputs[0] in inputs:
        raise Unfit(f"{part.name} ({kind}) does not begin and end with matrices of its own")
    between = tuple(name for name in names if name not in inputs and name not in outputs)
    if len(between) > (0 if mixture else 2 if attention else 1):
        raise Unfit(f"{part.name} ({kind}) has {len(between)} matrices between its first and its last ones")
    return Part(part.name, _name(norm), _name(after), inputs, between, outputs[0], attention, mixture, scale)


def _direct(call: Call, part: Call) -> bool:
    return "." not in call.name.removeprefix(f"{part.name}.")


def _name(call: Call | None) -> str | None:
    return None if call is None else call.name


def _refuse_other_weights(part: Call, linears: Sequence[str]) -> None:
    """Refuse a module with matrices that would stay dense: those of no `nn.Linear`, and those that were not called."""
    if hasattr(part.module, "experts"):
        return  # of its matrices the routers' stay
    used = {f"{name}.weight" for name in linears}
    for name, parameter in part.module.named_parameters():
        home = part.module.get_submodule(name.rpartition(".")[0])
        if parameter.ndim > 1 and name not in used and "norm" not in type(home).__name__.lower():
            raise Unfit(f"{part.name}.{name} ({type(home).__name__}) is no matrix that its input goes through")
