"""Decoder layers of a causal LM that come when it is their turn and go again: sampling where a model does not fit.

The model is transformers' own, built on the meta device; only embeddings, final norm and lm_head stay. A layer's
tensors are read and converted by transformers' own loader, as when a whole model is loaded, and take their places for
one forward pass. So a token is made by the very same operations on the very same numbers. The first layers stay where
there is room for them. The next one is read, and on its way to a GPU, while one computes.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rac_engine.base.files import pages
from rac_engine.models import Model
from rac_engine.traces.loading import LazyTensor, put_fp32_back

_ALIGNED = 256  # bytes: where a tensor begins in a layer's memory


_NOWHERE = "nowhere"  # no module's name


@dataclass(frozen=True)
class Placement:
    """Where the layers of a model are while it samples."""

    kept: int
    """The first layers, which stay where it is computed."""
    host: int = 0
    """Layers behind these that stay in the host's memory, page-locked, and are copied to the GPU every step."""
    ahead: bool = True
    """Whether the next layer is read while one computes."""


class Places:
    """The parameters and buffers of a decoder layer as places that tensors can take."""

    def __init__(self, layer: nn.Module) -> None:
        stored = {id(tensor) for tensor in layer.state_dict(keep_vars=True).values()}
        self._places: list[tuple[dict[str, Any], str, bool]] = []
        for module in layer.modules():
            for held, learned in ((module._parameters, True), (module._buffers, False)):
                names = [name for name, tensor in held.items() if tensor is not None and id(tensor) in stored]
                self._places += [(held, name, learned) for name in names]
        self.empty: list[Tensor] = [held[name] for held, name, _ in self._places]
        """What was in them at first, on the meta device."""

    def taken(self) -> list[Tensor]:
        """The tensors in them."""
        return [held[name].detach() for held, name, _ in self._places]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Put tensors in them, in the same order."""
        for (held, name, learned), tensor in zip(self._places, tensors, strict=True):
            held[name] = nn.Parameter(tensor, requires_grad=False) if learned else tensor

    def clear(self) -> None:
        """Put back what was there at first."""
        for (held, name, _), tensor in zip(self._places, self.empty, strict=True):
            held[name] = tensor


class LayerReader:
    """Reads decoder layers of a checkpoint as transformers' loader does. One thread at a time.

    `model` is one without its layers (see `load_causal_lm`), to be loaded in `dtype` and used in `working`.
    """

    def __init__(self, source: Model, model: Any, dtype: torch.dtype, working: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._source, self._changes = source, None if working == dtype else working
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._bare = copy.deepcopy(model, shared)  # other modules, the same tensors
        self._layers = self._bare.get_decoder().layers
        self._places = [Places(layer) for layer in self._layers]
        mapping: Any = get_model_conversion_mapping(self._bare)
        self._options = LoadStateDictConfig(
            dtype=dtype,
            # With a place on disk the loader reads on this thread, one tensor of the model after the other: threads of
            # its own would have all of a layer in memory twice.
            device_map={"": "cpu", _NOWHERE: "disk"},
            dtype_plan=self._bare._get_dtype_plan(dtype),
            weight_mapping=mapping,
        )
        self._verified = set[int]()

    def forms(self, number: int) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor that `read` gives."""
        return [(tensor.shape, self._dtype(tensor)) for tensor in self._places[number].empty]

    def nbytes(self, number: int) -> int:
        """Bytes of a layer."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.forms(number))

    def read(self, number: int) -> list[Tensor]:
        """The tensors of a layer, for its `Places`; compared with the checkpoint's checksums the first time."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        verify, checkpoint = number not in self._verified, self._source.checkpoint
        tensors = {name: LazyTensor(checkpoint, name, verify) for name in self._source.tensor_names(number)}
        places = self._places[number]
        try:
            with _no_bars():
                convert_and_load_state_dict_in_model(self._bare, tensors, self._options)
            put_fp32_back(self._layers[number], self._source, number, verify=verify)
            made = places.taken()
        finally:
            places.clear()
        if any(tensor.is_meta for tensor in made):  # the loader tells of what it could not read, and goes on
            raise ValueError(f"layer {number} of {checkpoint.path} could not be read by transformers")
        self._verified.add(number)
        return [tensor if (dtype := self._dtype(tensor)) == tensor.dtype else tensor.to(dtype) for tensor in made]

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        changes = self._changes is not None and tensor.is_floating_point()
        return self._changes if changes and self._changes is not None else tensor.dtype


@contextmanager
def _no_bars() -> Any:
    """Keep transformers from drawing a bar for each layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class StreamedLayers:
    """The layers of a `model` (one without them) during its forward passes, read by `reader` and placed by plan."""

    def __init__(self, model: Any, reader: LayerReader, placement: Placement, device: torch.device) -> None:
        layers = model.get_decoder().layers
        self._places = [Places(layer) for layer in layers]
        self._kept, self._ahead = placement.kept, placement.ahead
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Any]] | None = None
        streamed = range(placement.kept, len(layers))
        held = streamed[: placement.host]
        self._source: _FromDisk = (
            _FromDisk(reader) if device.type == "cpu" else _ThroughLink(reader, device, streamed, held)
        )
        for number in range(placement.kept):
            self._places[number].fill(self._source.resident(number))
        self._hooks = []
        for number in streamed:
            before, behind = functools.partial(self._enter, number), functools.partial(self._leave, number)
            self._hooks += [
                layers[number].register_forward_pre_hook(before),
                layers[number].register_forward_hook(behind, always_call=True),
            ]

    def close(self) -> None:
        """Let go of all layers. The model cannot compute any more."""
        for hook in self._hooks:
            hook.remove()
        self._thread.shutdown(cancel_futures=True)
        self._next = None
        for places in self._places:
            places.clear()
        self._source.close()

    def _enter(self, number: int, *_: Any) -> None:
        """Bring a layer, and begin to read the one behind it, the first one behind the last."""
        if self._next is None or self._next[0] != number:
            self._next = number, self._thread.submit(self._source.fetch, number)
        coming, self._next = self._next[1], None
        self._places[number].fill(self._source.arrived(coming.result()))
        if self._ahead:
            following = number + 1 if number + 1 < len(self._places) else self._kept
            self._next = following, self._thread.submit(self._source.fetch, following)

    def _leave(self, number: int, *_: Any) -> None:
        """Let a layer go."""
        self._places[number].clear()
        self._source.left()


class _FromDisk:
    """Layers for a CPU that computes, from the checkpoint."""

    def __init__(self, reader: LayerReader) -> None:
        self._reader = reader

    def resident(self, number: int) -> list[Tensor]:
        """A layer that stays."""
        return self._reader.read(number)

    def fetch(self, number: int) -> Any:
        """Begin to bring a layer, on a thread of its own."""
        return self._reader.read(number)

    def arrived(self, fetched: Any) -> list[Tensor]:
        """The tensors of a layer that was fetched."""
        made: list[Tensor] = fetched
        return made

    def left(self) -> None:
        """Note that the layer that arrived last has been computed with, or that this was ordered."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass(frozen=True)
class Layout:
    """The tensors of a layer behind one another in one piece of memory, which is moved in one copy."""

    forms: Sequence[tuple[torch.Size, torch.dtype]]

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return sum(self._sizes())

    def pack(self, tensors: Sequence[Tensor], memory: Tensor) -> None:
        """Copy tensors into memory [bytes] uint8."""
        for place, tensor in zip(self.views(memory), tensors, strict=True):
            place.copy_(tensor)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in memory [bytes] uint8."""
        found, at = [], 0
        for (shape, dtype), size in zip(self.forms, self._sizes(), strict=True):
            own = math.prod(shape) * dtype.itemsize
            found.append(memory[at : at + own].view(dtype).view(shape))
            at += size
        return found

    def _sizes(self) -> list[int]:
        """Bytes of each tensor, with what lies idle behind it."""
        return [-(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for shape, dtype in self.forms]


class _ThroughLink(_FromDisk):
    """Layers for a GPU, copied to it from page-locked memory on a stream of their own.

    Two pieces of the GPU's memory take turns: one is computed with while the next layer is copied into the other. Those
    in `held` are read from the checkpoint once, the other ones every time.
    """

    def __init__(self, reader: LayerReader, device: torch.device, streamed: range, held: range) -> None:
        super().__init__(reader)
        self._device = device
        self._layouts = {number: Layout(reader.forms(number)) for number in streamed}
        largest = max((layout.nbytes for layout in self._layouts.values()), default=0)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2 if streamed else 0)]
        self._stream = torch.cuda.Stream(device)
        self._copied: list[Any] = [None, None]
        """Events: the copy into a slot, and out of its piece of the host's memory, is done."""
        self._used: list[Any] = [None, None]
        """Events: what is computed with a slot is done."""
        self._turn, self._current = 0, 0
        self._held: dict[int, Tensor] = {}
        for number in held:
            layout = self._layouts[number]
            self._held[number] = _locked(layout.nbytes)
            layout.pack(reader.read(number), self._held[number])
        self._staged = [_locked(largest) for _ in range(2 if len(held) < len(streamed) else 0)]

    def resident(self, number: int) -> list[Tensor]:
        return [tensor.to(self._device) for tensor in self._reader.read(number)]

    def fetch(self, number: int) -> Any:
        slot, self._turn = self._turn, 1 - self._turn
        layout = self._layouts[number]
        memory = self._held.get(number)
        if memory is None:
            tensors = self._reader.read(number)
            if self._copied[slot] is not None:
                self._copied[slot].synchronize()  # what is staged there is still being copied
            memory = self._staged[slot]
            layout.pack(tensors, memory)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if self._used[slot] is not None:
                self._stream.wait_event(self._used[slot])
            self._slots[slot][: layout.nbytes].copy_(memory[: layout.nbytes], non_blocking=True)
            self._copied[slot] = self._stream.record_event()
        return number, slot

    def arrived(self, fetched: Any) -> list[Tensor]:
        number, self._current = fetched
        torch.cuda.current_stream(self._device).wait_event(self._copied[self._current])
        return self._layouts[number].views(self._slots[self._current])

    def left(self) -> None:
        self._used[self._current] = torch.cuda.current_stream(self._device).record_event()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._slots, self._staged = [], []
        self._held.clear()


def _locked(nbytes: int) -> Tensor:
    """Page-locked memory [nbytes] uint8."""
    return torch.frombuffer(pages(max(nbytes, 1), pin=True), dtype=torch.uint8)
