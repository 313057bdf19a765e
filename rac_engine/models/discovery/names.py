"""How the tensors of a model are called on disk, and what of it a family's description has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rac_engine.models.discovery.small import Unfit
from rac_engine.models.plans import ExpertPlan


def on_disk(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint, in the form in which they are published."""
    stored = {name for name, _ in model.named_parameters()}  # a head that is tied to the embeddings is not
    stored |= {name for name, _ in model.named_buffers()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in stored}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, state).items()}


def named(tensor: Tensor, among: Mapping[str, Tensor]) -> str | None:
    """The name of the tensor of these shape and numbers."""
    return next(
        (name for name, other in among.items() if other.shape == tensor.shape and torch.equal(other, tensor)), None
    )


def beginning(layer: Mapping[str, Tensor], disk: Mapping[str, Tensor]) -> str:
    """What the names of a layer's tensors on disk begin with, up to its number `0.`."""
    name = next((found for tensor in layer.values() if (found := named(tensor, disk)) is not None), None)
    before, number, _ = (name or "").partition(".0.")
    if not number:
        raise Unfit("its layers are not numbered on disk")
    return f"{before}."


def renames(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Beginnings of names (of the module, on disk) that turn all `pairs` of names into one another, and nothing else.

    Raises `Unfit` where there are none.
    """
    found: list[tuple[str, str]] = []

    def renamed(name: str, way: int) -> str:
        for pair in found:
            if name.startswith(pair[way]):
                return pair[1 - way] + name.removeprefix(pair[way])
        return name

    for ours, theirs in pairs:
        if renamed(ours, 0) == theirs and renamed(theirs, 1) == ours:
            continue
        for begin in _beginnings(ours, theirs):
            if all(begin[1] + a.removeprefix(begin[0]) == b for a, b in pairs if a.startswith(begin[0])) and all(
                begin[0] + b.removeprefix(begin[1]) == a for a, b in pairs if b.startswith(begin[1])
            ):
                found.append(begin)
                break
        else:
            raise Unfit(f"what transformers calls {ours} is {theirs} on disk")
    if any(renamed(a, 0) != b or renamed(b, 1) != a for a, b in pairs):
        raise Unfit("its names on disk follow no rule that a description can say")
    return tuple(found)


def _beginnings(ours: str, theirs: str) -> list[tuple[str, str]]:
    """The ways in which two names may differ in their beginnings, the shortest first."""
    a, b = ours.split("."), theirs.split(".")
    common = 0
    while common < min(len(a), len(b)) - 1 and a[-1 - common] == b[-1 - common]:
        common += 1
    return [(".".join(a[: len(a) - kept]), ".".join(b[: len(b) - kept])) for kept in range(common, -1, -1)]


def expert_plan(fused: Any, disk: Mapping[str, Tensor]) -> tuple[ExpertPlan, set[str], str]:
    """How experts, fused in a module of transformers, are stored among a layer's tensors on disk.

    Gives the plan, the names that it accounts for, and what these begin with. Raises `Unfit` for a form that is not
    known.
    """
    inside: dict[str, Tensor] = dict(fused.state_dict())
    stacked = {part: name for part, tensor in inside.items() if (name := named(tensor, disk)) is not None}
    if len(stacked) == len(inside):
        homes = {name.removesuffix(part) for part, name in stacked.items()}
        entrance = "gate_up_proj" if "gate_up_proj" in inside else "up_proj"
        if len(homes) == 1:
            transposed, biases = bool(getattr(fused, "is_transposed", False)), len(inside) > 2
            plan = ExpertPlan((entrance,), "down_proj", stacked=True, transposed=transposed, biases=biases)
            return plan, set(stacked.values()), homes.pop()
    if set(inside) - {"gate_up_proj", "up_proj", "down_proj"}:
        raise Unfit(f"its experts ({type(fused).__name__}) have tensors in a form that is not known")
    turn = bool(getattr(fused, "is_transposed", False))
    first = inside.get("gate_up_proj", inside.get("up_proj"))
    assert first is not None
    halves = 2 if "gate_up_proj" in inside else 1
    accounted, parts, home = set[str](), list[str](), ""
    for number in range(len(first)):
        entrance_, exit_ = (x[number].T if turn else x[number] for x in (first, inside["down_proj"]))
        names = [named(each.contiguous(), disk) for each in (*entrance_.chunk(halves), exit_)]
        if any(name is None for name in names):
            raise Unfit(f"its experts ({type(fused).__name__}) are stored in a form that is not known")
        known = [name for name in names if name is not None]
        accounted.update(known)
        homes = {name.partition(f".{number}.")[0] for name in known}
        ends = [name.partition(f".{number}.")[2].removesuffix(".weight") for name in known]
        if len(homes) != 1 or (parts and parts != ends):
            raise Unfit("its experts are not numbered on disk")
        home, parts = f"{homes.pop()}.", ends
    return ExpertPlan(tuple(parts[:-1]), parts[-1]), accounted, home
