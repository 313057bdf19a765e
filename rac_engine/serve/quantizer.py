"""transformers' side: packed folders load by its own registry of quantizers, with packed layers in place of dense ones.

Importing this module enters them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "rac"
"""The `quant_method` of packed folders."""


@register_quantization_config(METHOD)
class RacConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder; what else stands there is kept and saved again."""

    def __init__(self, version: int = 1, **rest: Any) -> None:
        rest.pop("quant_method", None)
        self.quant_method: Any = METHOD
        self.version = version
        self.__dict__.update(rest)


@register_quantizer(METHOD)
class RacQuantizer(HfQuantizer):
    """Puts packed layers where the files have packed matrices."""

    _pending: tuple[Any, list[str]] | None = None
    """A model that waits for its layers, and its files."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse versions of the format that this release does not know."""
        from rac_kernels.ops.packed import VERSION

        if not self.pre_quantized:
            raise ValueError("a dense model is packed by `rac pack`, not while it is loaded")
        version = getattr(self.quantization_config, "version", None)
        if version != VERSION:
            raise ValueError(f"packed files of version {version!r:.40}; this release knows version {VERSION}")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self._pending = (model, list(checkpoint_files or ()))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Put packed layers into the model, which has no weights yet; returns how the files' tensors get there.

        It is the first time that both are known: the model and the names that its tensors have on disk.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return weight_conversions
        from rac_engine.serve.placing import place

        model, files = pending
        return place(model, files, weight_conversions)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from rac_engine.base.process import trim_memory
        from rac_engine.serve.modules import PackedExperts, PackedLinear

        for name, module in model.named_modules():
            if isinstance(module, (PackedLinear, PackedExperts)):
                try:
                    module.take()
                except ValueError as why:
                    raise ValueError(f"{name}: {why}") from None
        trim_memory()  # the checks' own
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
