"""Zeros that stay zero while a pruned model is trained on: a mask of the gradients, and one behind every step."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rac_engine.base.errors import BadInput


class KeptZeros:
    """The zeros of a model's matrices, kept from `keep_zeros` on until `remove`; as a context manager, to its end."""

    def __init__(self, masks: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
        # By weak references, since the hook on optimizers is torch's own and would keep the model alive.
        self._kept = {name: (weakref.ref(parameter), mask) for name, (parameter, mask) in masks.items()}
        self._ids = {id(parameter) for parameter, _ in masks.values()}
        self._hooks: list[Any] = [
            parameter.register_hook(_Masked(mask)) for parameter, mask in masks.values() if parameter.requires_grad
        ]
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))
        self.zeros = sum(int(mask.sum()) for _, mask in masks.values())
        """Zeros that are kept."""
        self.weights = sum(mask.numel() for _, mask in masks.values())
        """Elements of the matrices that have them."""

    @property
    def names(self) -> list[str]:
        """Names of the parameters whose zeros are kept."""
        return list(self._kept)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the kept places to zero at once, as after a step: for what changes weights without an optimizer."""
        for reference, mask in self._kept.values():
            if (parameter := reference()) is not None:
                parameter.masked_fill_(mask.to(parameter.device), 0.0)

    def remove(self) -> None:
        """Stop keeping the zeros. The weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        if any(id(parameter) in self._ids for group in groups for parameter in group["params"]):
            self.apply()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class _Masked:
    """A hook that sets a gradient to zero where its weight is to stay zero."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self.mask.to(gradient.device), 0.0)


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep the zeros that `model`'s matrices have now, whatever a training does; `rac_engine.keep_zeros` tells more."""
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        if parameter.is_meta:
            raise BadInput(f"{name} is on the meta device; load the weights before their zeros are kept")
        mask = parameter.detach() == 0
        if mask.any() and not mask.all():  # one that is all zero is none that was pruned: LoRA begins with such
            masks[name] = (parameter, mask)
    if not masks:
        raise BadInput("no matrix of the model has zeros; give the pruned model, before it is trained")
    kept = KeptZeros(masks)
    weakref.finalize(model, kept.remove).atexit = False
    return kept
