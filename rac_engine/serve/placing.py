"""Which packed tensor of a checkpoint's files goes where in a model of transformers, and the layers it needs there."""

from __future__ import annotations

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from rac_engine.serve.modules import PackedExperts, PackedLinear, PackedSize, is_mixture
from rac_kernels import Packed, PackedLayout, unpack
from rac_kernels.ops.packed import HEADER, MAGIC

_NAMED = 3  # matrices that a warning names

_EXPERT = re.compile(r"^(.*)\.(\d+)\.(\w+)\.weight$")


def packed_tensors(files: Iterable[str]) -> tuple[dict[str, PackedSize], list[str]]:
    """The packed matrices of safetensors files by name, from their headers alone, and the names of all tensors.

    Raises ValueError for a header that is not of a known version.
    """
    found: dict[str, PackedSize] = {}
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                names.append(name)
                part = opened.get_slice(name)
                if part.get_dtype() != "U8" or len(shape := part.get_shape()) != 1 or shape[0] < HEADER:
                    continue
                header = part[:HEADER].numpy().tobytes()
                if header.startswith(MAGIC):
                    try:
                        found[name] = PackedSize(PackedLayout.from_header(header), shape[0])
                    except ValueError as why:
                        raise ValueError(f"{name}: {why}") from None
    return found, names


def place(model: Any, files: Iterable[str], conversions: Sequence[Any]) -> list[Any]:
    """Put packed layers into a model of transformers that has no weights yet, where the files have packed matrices.

    conversions: how transformers renames and merges the files' tensors for this model. Returns what it is to do:
    experts that have matrices of their own on disk keep them apart, and what no packed layer stands for is unpacked,
    with a warning. Raises ValueError, one line, for matrices that do not fit the model or are of an unknown version.
    """
    packed, names = packed_tensors(files)
    if not packed:
        return list(conversions)
    return _Placing(model, packed, conversions).place(names)


@dataclass(frozen=True)
class _Source:
    """A tensor on disk that a parameter of the model is made from."""

    name: str
    """On disk."""
    key: str
    """As transformers renames it, before it merges tensors."""
    converter: int | None = None
    """Which of the conversions merges it with others."""
    part: int = 0
    """The number of the converter's pattern that it has."""


class _Placing:
    """Puts packed layers into a model."""

    def __init__(self, model: Any, packed: Mapping[str, PackedSize], conversions: Sequence[Any]) -> None:
        self._model, self._packed, self._conversions = model, packed, list(conversions)
        self._dense: dict[str, list[_Source]] = {}
        """Sources of parameters that are to be unpacked."""
        self._apart: set[int] = set()
        """Conversions of experts that keep matrices of their own."""

    def place(self, names: Iterable[str]) -> list[Any]:
        """Put the layers in, for tensors of these names on disk."""
        by_module: dict[str, dict[str, list[_Source]]] = defaultdict(dict)
        for target, sources in self._sources(names).items():
            module, _, parameter = target.rpartition(".")
            by_module[module][parameter] = sources
        mixtures = {name: given for name, given in by_module.items() if is_mixture(self._model.get_submodule(name))}
        self._place_mixtures(mixtures)
        for name in by_module.keys() - mixtures.keys():
            if any(self._is_packed(sources) for sources in by_module[name].values()):
                self._place_linear(name, by_module[name])
        return self._converted()

    def _sources(self, names: Iterable[str]) -> dict[str, list[_Source]]:
        """Sources by parameter; tensors that the model has no place for are left out, for transformers to speak of."""
        conversions = copy.deepcopy(self._conversions)  # for those that were used are marked
        all_renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        all_converters = [each for each in conversions if isinstance(each, WeightConverter)]
        parts = {
            pattern: (number, part)
            for number, each in enumerate(conversions)
            if isinstance(each, WeightConverter)
            for part, pattern in enumerate(each.source_patterns)
        }
        parameters, prefix = self._model.state_dict(), self._model.base_model_prefix
        found: dict[str, list[_Source]] = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):
            renamings = all_renamings
            target, pattern = rename_source_key(name, renamings, all_converters, prefix, parameters)
            if target not in parameters and name in parameters:
                renamings = []
                target, pattern = rename_source_key(name, [], [], prefix, parameters)
            if target in parameters:
                converter = (None, 0) if pattern is None else parts[pattern]
                found[target].append(_Source(name, apply_renamings(name, renamings), *converter))
        return found

    def _is_packed(self, sources: Iterable[_Source]) -> bool:
        return any(source.name in self._packed for source in sources)

    def _replace(self, name: str, layer: nn.Module) -> None:
        self._model.set_submodule(name, layer)

    # ---- linear layers ----

    def _place_linear(self, name: str, given: Mapping[str, list[_Source]]) -> None:
        layer = self._model.get_submodule(name)
        tied = self._model.all_tied_weights_keys
        weights = given.get("weight", [])
        fits = (
            isinstance(layer, nn.Linear)
            and type(layer).forward is nn.Linear.forward
            and [source.converter for source in weights] == [None]
            and f"{name}.weight" not in {*tied, *tied.values()}
            and not self._is_packed(given.get("bias", []))
        )
        if not fits:
            self._unpack(name, given)
            return
        packed = self._packed[weights[0].name]
        if packed.layout.shape != layer.weight.shape:
            shapes = f"{list(packed.layout.shape)}, and the model's is {list(layer.weight.shape)}"
            raise ValueError(f"{weights[0].name}: the packed matrix is {shapes}")
        self._replace(name, PackedLinear(packed, layer.bias))

    def _unpack(self, name: str, given: Mapping[str, list[_Source]]) -> None:
        self._dense |= {f"{name}.{parameter}": each for parameter, each in given.items() if self._is_packed(each)}

    # ---- mixtures of experts ----

    def _place_mixtures(self, mixtures: Mapping[str, Mapping[str, list[_Source]]]) -> None:
        """Replace all mixtures of the model, or none: transformers merges experts in all layers or in none."""
        if not any(self._is_packed(sources) for given in mixtures.values() for sources in given.values()):
            return
        made = {name: self._experts(name, given) for name, given in mixtures.items()}
        for name, experts in made.items():
            if None in made.values():
                self._unpack(name, mixtures[name])
            elif experts is not None:
                self._replace(name, experts)
        if None not in made.values():
            every = (each for given in mixtures.values() for sources in given.values() for each in sources)
            self._apart = {each.converter for each in every if each.converter is not None}

    def _experts(self, name: str, given: Mapping[str, list[_Source]]) -> PackedExperts | None:
        """The mixture of that name with its matrices packed; None if they are not such as it could hold."""
        fused: Any = self._model.get_submodule(name)
        entrance, exit_ = ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"
        if given.keys() != {entrance, exit_}:
            return None
        names = {}
        for parameter, sources in given.items():
            found = self._own_names(name, sources) if sources[0].converter is not None else (parameter,)
            if found is None or (parameter == exit_ and len(found) != 1):
                return None
            names[parameter] = found
        experts = PackedExperts(fused, names[entrance], names[exit_][0])
        for parameter, sources in given.items():
            shape = fused.get_parameter(parameter).shape
            if sources[0].converter is None:
                packed = self._packed.get(sources[0].name)
                if packed is None:
                    experts.register_parameter(parameter, fused.get_parameter(parameter))
                elif packed.layout.shape != shape:
                    return None
                else:
                    experts.stack(parameter, packed)
                continue
            rows = shape[1] // len(names[parameter])
            for source in sources:
                experts.own(*self._own(source), self._layer(source, (rows, shape[2]), fused.get_parameter(parameter)))
        return experts

    def _own_names(self, name: str, sources: Sequence[_Source]) -> tuple[str, ...] | None:
        """Names of the matrices of each expert that become one, in their order; None if that is not how they do."""
        converter = self._conversions[sources[0].converter or 0]
        kinds = [
            (type(each), each.dim) for each in converter.operations if isinstance(each, (MergeModulelist, Concatenate))
        ]
        merges = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter.operations)]
        stems = [_EXPERT.match(source.key) for source in sources]
        if kinds != merges or any(stem is None or not _same_module(name, stem[1]) for stem in stems):
            return None
        names = {source.part: self._own(source)[1] for source in sources}
        experts = self._model.get_submodule(name).num_experts
        whole = {(number, part) for number in range(experts) for part in names.values()}
        if {self._own(source) for source in sources} != whole or len(sources) != len(whole):
            return None
        return tuple(names[part] for part in sorted(names))

    @staticmethod
    def _own(source: _Source) -> tuple[int, str]:
        """Number of the expert and name of the matrix."""
        found = _EXPERT.match(source.key)
        assert found is not None
        return int(found[2]), found[3]

    def _layer(self, source: _Source, shape: tuple[int, int], beside: Tensor) -> nn.Module:
        """A layer for an expert's own matrix, packed or dense."""
        packed = self._packed.get(source.name)
        if packed is None:
            return nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=beside.dtype)
        if packed.layout.shape != shape:
            shapes = f"{list(packed.layout.shape)}, and the model's is {list(shape)}"
            raise ValueError(f"{source.name}: the packed matrix is {shapes}")
        return PackedLinear(packed)

    # ---- what transformers is to do ----

    def _converted(self) -> list[Any]:
        kept = [each for number, each in enumerate(self._conversions) if number not in self._apart]
        if not self._dense:
            return kept
        unpack_op = _Unpack(self._dense.keys())
        merging = {source.converter for sources in self._dense.values() for source in sources}
        for number in merging:
            if number is None:
                continue
            converter = self._conversions[number]
            converter.operations = [unpack_op, *converter.operations]
        plain = {target.rpartition(".")[2] for target, each in self._dense.items() if each[0].converter is None}
        names = [source.name for sources in self._dense.values() for source in sources if source.name in self._packed]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"unpacked while loading, for no packed layer stands for them in {type(self._model).__name__}: "
            f"{', '.join(names[:_NAMED])}{more}",
            stacklevel=2,
        )
        return kept + [WeightConverter([name], [name], [unpack_op]) for name in sorted(plain)]


def _same_module(name: str, other: str) -> bool:
    """Whether two names are of one module; one of them may be without the beginning that the base model adds."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


class _Unpack(ConversionOps):
    """Unpacks matrices of the named parameters; what is not packed passes through."""

    def __init__(self, parameters: Iterable[str]) -> None:
        self._parameters = frozenset(parameters)

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", model: Any = None, **__: Any
    ) -> dict[str, Any]:
        if full_layer_name not in self._parameters:
            return input_dict
        dtype = model.get_parameter(full_layer_name).dtype
        return {
            name: [_dense(each, dtype) for each in given] if isinstance(given, list) else _dense(given, dtype)
            for name, given in input_dict.items()
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unpack(())


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype != torch.uint8 or bytes(tensor[: len(MAGIC)].tolist()) != MAGIC:
        return tensor
    return unpack(Packed.from_tensor(tensor)).to(dtype)
