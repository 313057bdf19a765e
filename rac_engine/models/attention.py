"""Our packed attention behind transformers' modules, and keys and values of a sequence that comes in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rac_kernels import Scoring, packed_attention

PACKED_ATTENTION = "rac_packed"


class KeyValues:
    """Keys and values of a sequence that goes through an attention in parts: transformers' cache, in its full size."""

    def __init__(self, length: int) -> None:
        self._length, self._seen = length, 0
        self._held: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Take key and value [1, heads, tokens, d] of the next tokens; returns those of all tokens so far."""
        if not self._held:
            self._held = tuple(x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key, value))
        first, self._seen = self._seen, self._seen + key.shape[2]
        for held, new in zip(self._held, (key, value), strict=True):
            held[:, :, first : self._seen] = new
        return tuple(held[:, :, : self._seen] for held in self._held)


def scoring_of(module: nn.Module, options: dict[str, Any]) -> Scoring:
    """The `Scoring` that the options of transformers' attention functions ask for; the others are passed over.

    Where no option names the window, it is the attention `module`'s own: transformers then has it in its mask alone.
    """
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    return Scoring(options["scaling"], window, options.get("softcap"), sinks=options.get("s_aux"))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """`rac_kernels.packed_attention` as one of transformers' attention functions.

    query [1, heads, tokens, d], key and value [1, key-value heads, tokens, …]; `options` name the `lengths` of the
    sequences that lie behind one another, and what `scoring_of` reads. Returns [1, tokens, heads, e].
    """
    lengths: Sequence[int] = options["lengths"]
    if torch.is_autocast_enabled(value.device.type):
        # The rotary step leaves fp32 beside autocast's values, and no fused kernel takes two dtypes.
        query, key = query.to(value.dtype), key.to(value.dtype)
    return packed_attention(query[0], key[0], value[0], lengths, scoring_of(module, options))[None], None


AttentionInterface.register(PACKED_ATTENTION, attend)
