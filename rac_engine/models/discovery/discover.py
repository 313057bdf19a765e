"""A family from a config alone, found by tracing a small model of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rac_engine.models.attention import PACKED_ATTENTION
from rac_engine.models.discovery.names import beginning, expert_plan, named, on_disk, renames
from rac_engine.models.discovery.small import Unfit, build, hidden_number, parse, shrink, skeleton
from rac_engine.models.discovery.tracing import Part, Trace, find_parts, layer_list, same, trace
from rac_engine.models.plans import BlockPlan, ExpertPlan, Family, root_of_width

LENGTHS = (24, 9)  # tokens of the sequences that are sent through

_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True)
class Discovered:
    """What was found in a small model, and what its forward pass gave: to be held against the engine's own."""

    family: Family
    config: Any
    """The small model's configuration object, for our packed attention."""
    tensors: dict[str, Tensor]
    """Its tensors by their names on disk."""
    sequences: tuple[Tensor, ...]
    """Token ids [tokens] of each sequence that was sent through it."""
    traces: tuple[Trace, ...]


def discover(config: Mapping[str, Any]) -> Discovered:
    """The family of a config.json whose model_type no file describes.

    Raises `Unfit` with the reason where its layers are no rows of residual blocks, where transformers runs no small
    model of it, and where the config has a number under a name that is not known, of which a small model might not show
    the effect: how many tokens an index keeps, say.
    """
    try:
        parsed = parse(config)
        found = find(shrink(parsed), str(config["model_type"]))
        if (name := hidden_number(parsed)) is not None:
            raise Unfit(f"its config has {name}, and what that does a small model might not show")
        return found
    except Unfit:
        raise
    except Exception as error:  # whatever the code of some model finds wrong with sizes that were cut down
        reason = " ".join(str(error).split())[:200]
        raise Unfit(f"no small model of its config runs: {type(error).__name__}: {reason}") from error


def find(config: Any, kind: str) -> Discovered:
    """The family of the model_type `kind`, found in the small model of a configuration object."""
    model = build(config)
    layers = layer_list(model, config.num_hidden_layers)
    draw = torch.Generator().manual_seed(1)
    sequences = tuple(torch.randint(0, config.vocab_size, (length,), generator=draw) for length in LENGTHS)
    traces = tuple(trace(model, layers, ids) for ids in sequences)
    first = traces[0]
    found = [find_parts(layer, calls) for layer, calls in zip(first.layers, first.inside, strict=True)]
    disk = on_disk(model)
    name, prefix, folder = _classes(layers[0])
    states = [layer.state_dict() for layer in layers]
    before = beginning(states[0], disk)
    experts, names = _stored(layers, states, found, disk, before)
    family = Family(
        kind,
        prefix,
        _plans(found, None),
        mixture=next(iter(_plans(found, experts)), None) if experts is not None else None,
        renames=names,
        folder=folder,
        layer=name,
        extra_layers=next((key for key in _EXTRA_LAYERS if getattr(config, key, None)), None),
        fp32=_kept_fp32(config),
        traced=True,
        embedding_scale=_embedding_scale(model, sequences[0], first, config),
        residual_scale=_residual_scale({part.scale for parts in found for part in parts}, config),
        layers=before,
        embedding=_named(model.get_input_embeddings().get_parameter("weight"), disk, "embeddings"),
        **_final_norm(layers[0], first, found[0], disk),
        **_rotary(first, prefix),
        **_head(model, disk, config),
    )
    for number, layer in enumerate(layers):
        wanted = [part.module for part in found[number]]
        if [plan.module for plan in family.within(layer)] != wanted:
            raise Unfit("its layers are of kinds that cannot be told apart by their modules")
    if family.mixture is not None and not getattr(config, "num_experts_per_tok", None):
        raise Unfit("its config has no num_experts_per_tok")
    packed = copy.deepcopy(config)
    packed._attn_implementation = PACKED_ATTENTION
    return Discovered(family, packed, disk, sequences, traces)


def _kept_fp32(config: Any) -> tuple[str, ...]:
    """Parts of names of tensors within a layer that transformers makes in fp32 in a model of bf16."""
    layers = layer_list(skeleton(copy.deepcopy(config)), config.num_hidden_layers)
    names = {name for layer in layers for name, x in layer.state_dict().items() if x.dtype == torch.float32}
    return tuple(sorted(names))


def _classes(layer: nn.Module) -> tuple[str, str, str]:
    """A decoder layer's class name behind the family's prefix, the prefix, and the folder of its code."""
    full, home = type(layer).__name__, type(layer).__module__.split(".")
    for name in ("DecoderLayer", "Block", "Layer"):
        if full.endswith(name) and home[:2] == ["transformers", "models"] and home[3] == f"modeling_{home[2]}":
            return name, full.removesuffix(name), home[2]
    raise Unfit(f"its decoder layers ({full}) have no name that a description can say")


def _plans(found: Sequence[Sequence[Part]], experts: ExpertPlan | None) -> tuple[BlockPlan, ...]:
    """The different blocks of all layers: without experts, or the mixture with them."""
    plans = list[BlockPlan]()
    for part in (part for parts in found for part in parts if part.mixture == (experts is not None)):
        plan = BlockPlan(
            part.module,
            part.norm,
            part.inputs,
            part.output,
            attention=part.attention,
            after=part.after,
            between=part.between,
            experts=experts,
        )
        if plan not in plans:
            plans.append(plan)
    if experts is not None and len(plans) > 1:
        raise Unfit("it has mixtures of several kinds")
    return tuple(plans)


def _stored(
    layers: Sequence[nn.Module],
    states: Sequence[Mapping[str, Tensor]],
    found: Sequence[Sequence[Part]],
    disk: Mapping[str, Tensor],
    before: str,
) -> tuple[ExpertPlan | None, tuple[tuple[str, str], ...]]:
    """How the experts are stored, if there are any, and the names within a layer that differ on disk."""
    pairs, plans = dict[str, str](), list[ExpertPlan]()
    for number, (layer, state, parts) in enumerate(zip(layers, states, found, strict=True)):
        stem = f"{before}{number}."
        here = {name.removeprefix(stem): tensor for name, tensor in disk.items() if name.startswith(stem)}
        accounted = set[str]()
        for part in parts:
            if part.mixture:
                plan, names, home = expert_plan(layer.get_submodule(f"{part.module}.experts"), here)
                accounted |= names
                plans.append(plan)
                pairs[f"{part.module}.experts."] = home
        rest = {name: tensor for name, tensor in here.items() if name not in accounted}
        fused = tuple(f"{part.module}.experts." for part in parts if part.mixture)
        for name, tensor in state.items():
            if fused and name.startswith(fused):
                continue
            theirs = named(tensor, rest)
            if theirs is None or pairs.setdefault(name, theirs) != theirs:
                raise Unfit(f"{name} of its layers is stored in a form that is not known")
            del rest[theirs]
        if rest:
            raise Unfit(f"its layers have {next(iter(rest))} on disk, which transformers does not take as it is")
    if len(set(plans)) > 1:
        raise Unfit("its experts are stored in several forms")
    return (plans[0] if plans else None), renames(sorted(pairs.items()))


def _named(tensor: Tensor, disk: Mapping[str, Tensor], what: str) -> str:
    if (name := named(tensor, disk)) is None:
        raise Unfit(f"its {what} are stored in a form that is not known")
    return name


def _final_norm(layer: nn.Module, first: Trace, parts: Sequence[Part], disk: Mapping[str, Tensor]) -> dict[str, Any]:
    """The name on disk of the norm behind the last layer, which is of the same class as those in the layers."""
    last = first.layers[-1].result
    call = next((call for call in first.around if same(call.given, last)), None)
    one = parts[0].norm or parts[0].after
    if call is None or one is None or type(call.module) is not type(layer.get_submodule(one)):
        raise Unfit("behind its last layer there is no norm like those in the layers")
    state = call.module.state_dict()
    return {"norm": _named(state["weight"], disk, "last norm's weights")} if "weight" in state else {}


def _head(model: Any, disk: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Unfit("its head is no matrix")
    return {} if config.tie_word_embeddings else {"head": _named(head.weight, disk, "head's weights")}


def _rotary(first: Trace, prefix: str) -> dict[str, Any]:
    """What a family says of the rotary embedding: its class, and whether it is asked for by the layers' types."""
    calls = [call for call in first.around if "Rotary" in type(call.module).__name__]
    if not calls:
        return {"rotary": None}
    full = {type(call.module).__name__ for call in calls}
    if len(full) != 1 or not (name := full.pop()).startswith(prefix):
        raise Unfit("it has rotary embeddings of several kinds")
    return {"rotary": name.removeprefix(prefix), "rotary_by_layer_type": any(call.words for call in calls)}


def _embedding_scale(model: Any, token_ids: Tensor, first: Trace, config: Any) -> Any:
    """The factor between the table of embeddings and what the first layer is given."""
    looked_up, given = model.get_input_embeddings().weight[token_ids].double(), first.layers[0].given[0].double()
    if looked_up.shape != given.shape:
        raise Unfit("its layers are not as wide as its embeddings")
    scale = float(given.flatten().dot(looked_up.flatten()) / looked_up.square().sum())
    if float((given - scale * looked_up).norm() / given.norm()) > 1e-5:
        raise Unfit("what its first layer is given is no multiple of the embeddings")
    if abs(scale - 1) < 1e-6:
        return Family.embedding_scale
    if abs(scale / config.hidden_size**0.5 - 1) < 1e-6:
        return root_of_width
    key = _key(scale, config)
    return lambda real, dtype: float(getattr(real, key))


def _residual_scale(scales: set[float], config: Any) -> Any:
    """The factor of what a block adds: 1, or a number of the config."""
    if all(abs(scale - 1) < 1e-6 for scale in scales):
        return Family.residual_scale
    keys = {_key(scale, config) for scale in scales}
    if len(keys) > 1:
        raise Unfit("its blocks add multiples of several kinds")
    (key,) = keys
    return lambda real: float(getattr(real, key))


def _key(scale: float, config: Any) -> str:
    """The name of the one number of a config that a factor is: one that is called a scale or a multiplier."""
    found = [
        name
        for name, value in vars(config).items()
        if ("scal" in name or "mult" in name)
        and type(value) in (int, float)
        and abs(value - scale) <= 1e-6 * abs(scale)
    ]
    if len(found) != 1:
        raise Unfit(f"its hidden states are multiplied by {scale:.6g}, which is no number of its config")
    return found[0]
