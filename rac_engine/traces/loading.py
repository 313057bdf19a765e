"""Loading a causal LM through transformers, and finding out what it has not read as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import read_json_object
from rac_engine.checkpoint import Checkpoint, TensorInfo, find_format
from rac_engine.models import Model, loading_config

_MAX_GENERATION_CONFIG = 4 << 20  # bytes


def refuse_generation_config(folder: Path) -> None:
    """`BadInput` for a generation_config.json that transformers would fail at."""
    file, mend = folder / "generation_config.json", "mend it, or remove it"
    if not file.exists():
        return
    read_json_object(file, _MAX_GENERATION_CONFIG, mend, mend)
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has no one exception for this
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{file}: transformers refuses it ({reason}); {mend}") from None


def load_causal_lm(source: Model, dtype: torch.dtype, attention: str, layers: bool = True) -> Any:
    """The causal LM of a checkpoint; quantized weights as what they stand for, on every device, as they are pruned.

    Without its `layers`, all but embeddings, final norm and lm_head is left on the meta device, in the shapes and
    dtypes that it would have (see `LayerReader`). Raises `BadInput` where transformers does not find all of its
    weights: it would go on with random ones.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
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
    if layers and find_format(checkpoint.config) is None:
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        pair = auto.from_pretrained(path, config=config, use_safetensors=True, **local, **options)
    else:
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        tensors = {
            name: LazyTensor(checkpoint, name) if layers or _is_around(source, name) else _Later(info)
            for name, info in checkpoint.tensors.items()
        }
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
    for number in range(source.layers):
        put_fp32_back(model.get_decoder().layers[number], source, number, real=layers)
    return model


def put_fp32_back(layer: Any, source: Model, number: int, real: bool = True, verify: bool = True) -> None:
    """Give what is stored in fp32 and is to be used so (`Family.fp32`) as it is: transformers rounds some of it.

    `layer` is the decoder layer of that number. What is not `real` stays on the meta device, `verify` is as in
    `Checkpoint.read`.
    """
    family = source.family
    for name in source.tensor_names(number) if family.fp32 else ():
        inside = family.in_module(name.removeprefix(f"{family.layers}{number}."))
        info = source.checkpoint.tensors[name]
        if info.dtype == torch.float32 and any(part in inside for part in family.fp32):
            home, _, part = inside.rpartition(".")
            stored = (
                source.checkpoint.read(name, verify=verify)
                if real
                else torch.empty(info.shape, dtype=info.dtype, device="meta")
            )
            getattr(layer.get_submodule(home), part).data = stored


def _is_around(source: Model, name: str) -> bool:
    """Whether a tensor of the language model lies around its decoder layers, not in them."""
    family = source.family
    if name.startswith(family.layers):
        return False
    home = family.embedding.removesuffix(".weight").rpartition(".")[0]
    return name.startswith((f"{home}." if home else family.norm.rpartition(".")[0], family.head.rpartition(".")[0]))


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when transformers' loader asks for `[...]` of it."""

    checkpoint: Checkpoint
    name: str
    verify: bool = True

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read(self.name, verify=self.verify)


@dataclass(frozen=True)
class _Later:
    """A tensor of a checkpoint that is not read yet: transformers' loader is given one on the meta device."""

    info: TensorInfo

    def __getitem__(self, _: Any) -> _Later:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """One of its shape."""
        return torch.empty(self.info.shape, dtype=dtype or self.info.dtype, device="meta")
