"""A config.json of an unknown origin: whose family it is, what is refused, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import READ, unread_format
from rac_engine.models.attention import PACKED_ATTENTION
from rac_engine.models.discovery.small import Unfit
from rac_engine.models.families import find_family, known_families
from rac_engine.models.plans import Family

# What transformers makes lists of: a config that asks for more than any model has would be obeyed for days.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_nextn_predict_layers", "num_mtp_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 100_000),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 100_000),
}

_MOST_ANGLES = 1 << 20  # of rotary embeddings, which are computed as soon as a model is opened

_NO_WIDTHS = ("vocab", "position", "token", "theta", "context", "length")
"""Parts of names of a configuration's numbers that are large and no head's size."""


def accepted_family(
    file: Path, config: Mapping[str, Any], undescribed: Callable[[Mapping[str, Any]], Family]
) -> Family:
    """The family of a config.json (`file`): described by a file or, where there is none, what `undescribed` finds.

    Raises `BadInput` for a `model_type` that neither knows (`undescribed` raises `Unfit`), for compressed weights, for
    quantized ones in a format that is not read, and for counts beyond any model's.
    """
    kind, inner = config.get("model_type"), config.get("text_config")
    if kind == "mistral" and "layer_types" in config:
        kind = "ministral"  # as transformers takes it
    family = find_family(kind)
    if family is None and isinstance(inner, Mapping):
        kind = inner.get("model_type", kind)
        family = find_family(kind)
    for key in ("sparsity_config", "compression_config", "compression"):
        if config.get(key) is not None:
            raise BadInput(
                f"{file}: {key} is set, so the weights are compressed, or would be taken for it; prune the model "
                "that it was made from, or remove the key if the weights are plain"
            )
    if (unread := unread_format(config)) is not None:
        raise BadInput(
            f"{file}: the weights are quantized ({unread}); of quantized weights only {READ} are read; prune the bf16 "
            "model"
        )
    for key, most in _MOST.items():
        counts = [each.get(key) for each in (config, inner) if isinstance(each, Mapping)]
        if any(isinstance(count, int) and count > most for count in counts):
            raise BadInput(f"{file}: {key} is more than {most:,}, which no model has; the file is not to be trusted")
    if family is not None:
        return family
    try:
        return undescribed(_with_floats(config))
    except Unfit as unfit:
        raise BadInput(
            f"{file}: model_type {kind!r} is not known; known are {', '.join(known_families())}; nor could it be "
            f"traced: {unfit} (docs/families.md says how to add one)"
        ) from unfit


@contextmanager
def transformers_errors(file: Path) -> Iterator[None]:
    """Turn whatever transformers finds wrong with a config.json (`file`) into `BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{file}: transformers refuses it: {type(error).__name__}: {reason}") from error


def loading_config(config: Mapping[str, Any]) -> Any:
    """The configuration of a config.json with a `model_type` that transformers does not know; None if it knows it."""
    family = find_family(config.get("model_type"))
    if family is None or family.config_type is None:
        return None
    return _made_by_transformers(family, config)


def _made_by_transformers(family: Family, config: Mapping[str, Any]) -> Any:
    """The configuration object of a config.json.

    It has the name that transformers knows: by the object's `model_type` it finds how tensors are renamed on loading.
    """
    name = _known_to_transformers(family, config)
    # A copy all through: transformers writes into what it is given, rope_scaling among the rest.
    return CONFIG_MAPPING[name].from_dict({**_with_floats(config), "model_type": name})


def _known_to_transformers(family: Family, config: Mapping[str, Any]) -> str:
    """The `model_type` that transformers has a class for."""
    return str(config["model_type"]) if "text_config" in config else family.config_type or family.model_type


def _with_floats(value: Any) -> Any:
    """A copy of a part of a config.json with transformers' own form of floats that JSON lacks read as such."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(part) for key, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


def _is_modest(value: Any, name: str = "") -> bool:
    """Whether no number of a configuration could be the size of a huge head, or make one of a small size."""
    if isinstance(value, Mapping):
        return all(_is_modest(part, str(key)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_modest(part, name) for part in value)
    if isinstance(value, float):
        return value <= 1 or not any(part in name for part in ("rotary", "rope_pct", "dim"))
    return not isinstance(value, int) or value <= _MOST_ANGLES or any(part in name for part in _NO_WIDTHS)


def parse_config(file: Path, family: Family, config: Mapping[str, Any]) -> Any:
    """The configuration object that transformers makes of a config.json (`file`), for our packed attention.

    Raises `BadInput` for a model that is not causal, for what the family is not described for, and for heads beyond any
    model's, and whatever transformers raises.
    """
    if (name := _known_to_transformers(family, config)) not in CONFIG_MAPPING:
        raise BadInput(f"{file}: transformers {transformers.__version__} has no {name} models; a newer one may have")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    whole = _made_by_transformers(family, plain)
    parsed = whole.get_text_config(decoder=True)
    parsed.tie_word_embeddings = whole.tie_word_embeddings  # the whole model's is what counts where there are two
    parsed._attn_implementation = PACKED_ATTENTION
    if getattr(parsed, "use_bidirectional_attention", False):
        raise BadInput(f"{file}: use_bidirectional_attention is set; only causal models are pruned")
    if (reason := family.unfit(parsed)) is not None:
        raise BadInput(f"{file}: {reason}")
    # Arithmetic on the meta device takes torch's compiler, which is large: only where the sizes are not to be trusted.
    with torch.device("cpu" if _is_modest(parsed.to_dict()) else "meta"):
        rotary = None if family.rotary is None else family.make(family.rotary, parsed)
    angles = 0 if rotary is None else sum(buffer.numel() for buffer in rotary.buffers())
    if angles > _MOST_ANGLES:
        raise BadInput(
            f"{file}: heads of more than {_MOST_ANGLES:,} elements, which no model has; the file is not to be trusted"
        )
    return parsed
