"""Statistics of packed tokens are those of what transformers' own layers see, sequence by sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rac_engine.calibrate.activations import Place, Storage
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import Statistic
from rac_engine.calibrate.stream import Stream
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.models.block import Block
from rac_engine.models.model import Model
from rac_engine.traces.calibration import Calibration, Part
from tests import tiny

Make = Callable[..., Path]

INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def opened(folder: Path, dtype: torch.dtype | None = None) -> tuple[Model, list[list[Block]]]:
    model = Model.open(Checkpoint.open(folder))
    layers = []
    for layer in range(model.layers):
        tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
        layers.append(model.build_layer(layer, tensors, dtype or model.dtype, "cpu"))
    return model, layers


def whole(stream: Stream) -> Tensor:
    """All hidden states."""
    return stream.hidden.read(0, len(stream.hidden))


@torch.inference_mode()
def hooked_hessians(folder: Path, calibration: Calibration, layer: int) -> dict[str, Tensor]:
    """H in fp64 of a layer's four inputs, from forward hooks on transformers' model, a sequence at a time."""
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").model
    found: dict[str, Tensor] = {}
    weights = torch.empty(0)

    def watch(name: str) -> None:
        def hook(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0][0].double()
            found[name] = found.get(name, torch.zeros(())) + (x * weights[:, None]).T @ x

        whole.layers[layer].get_submodule(name).register_forward_pre_hook(hook)

    for name in INPUTS:
        watch(name)
    for sequence in calibration.sequences:
        ids = torch.as_tensor(sequence.token_ids)
        weights = torch.ones(len(ids)) if sequence.weights is None else torch.as_tensor(sequence.weights)
        weights = weights.double()
        whole(ids[None])
    return found


@torch.inference_mode()
def packed_hessians(
    folder: Path, calibration: Calibration, layer: int, chunk_tokens: int, way: str
) -> dict[str, Tensor]:
    """Statistics from the packed stream, either in stages or in one pass through the layer."""
    model, layers = opened(folder)
    stream = Stream(model, Packing.of(calibration, chunk_tokens), model.dtype)
    for blocks in layers[:layer]:
        for block in blocks:
            stream.advance(block)
    columns = {matrix.module: matrix.columns for matrix in model.matrices(layer)}
    statistics = {name: Statistic(columns[name], full=True, device="cpu") for name in INPUTS}
    if way == "layer":
        before = whole(stream).clone()
        stream.observe_layer(layers[layer], statistics)
        assert torch.equal(whole(stream), before)
    else:
        for block in layers[layer]:
            assert block.last is not None
            stream.observe(block, {block.first: statistics[block.first]})
            stream.advance(block, stream.observe(block, {block.last: statistics[block.last]}))
    assert {statistic.tokens for statistic in statistics.values()} == {stream.packing.counted}
    return {name: statistic.value.triu() + statistic.value.triu(1).T for name, statistic in statistics.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name in INPUTS:
        scale = expected[name].diagonal().max()
        assert (found[name].double() - expected[name].double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("part", ["all", "completion"])
@pytest.mark.parametrize("way", ["staged", "layer"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_hessians_are_those_of_transformers(checkpoint: Make, family: str, way: str, part: Part) -> None:
    folder, calibration = checkpoint(family, dtype=torch.float32), tiny.calibration(part=part)
    expected = hooked_hessians(folder, calibration, layer=1)
    assert_same(packed_hessians(folder, calibration, 1, 64, way), expected)


@pytest.mark.parametrize("way", ["staged", "layer"])
def test_hessians_do_not_depend_on_the_chunks(checkpoint: Make, way: str) -> None:
    """Also not where a sequence is longer than a chunk, and goes through the MLP in pieces."""
    folder, calibration = checkpoint("llama", dtype=torch.float32), tiny.calibration()
    expected = packed_hessians(folder, calibration, 1, 10_000, way)
    for chunk_tokens in (7, 40, 100):
        assert_same(packed_hessians(folder, calibration, 1, chunk_tokens, way), expected)


class Exact:
    """A `Statistic` in fp64."""

    def __init__(self, columns: int) -> None:
        self.value = torch.zeros(columns, columns, dtype=torch.float64)

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        self.value += x.T @ (x if weights is None else x * weights[:, None].double())


@torch.inference_mode()
def exact_hessians(folder: Path, calibration: Calibration, chunk_tokens: int) -> list[Tensor]:
    """H in fp64 of a layer's inputs, behind a layer that was gone through, from activations in fp64."""
    model, layers = opened(folder, torch.float64)
    stream: Any = Stream(model, Packing.of(calibration, chunk_tokens), torch.float64)
    for block in layers[0]:
        stream.advance(block)
    found = []
    columns = {matrix.module: matrix.columns for matrix in model.matrices(1)}
    for block in layers[1]:
        kept = None
        for _, stage in itertools.groupby(block.groups, key=lambda group: group.stage):
            exact = {group.input: Exact(columns[group.input]) for group in stage}
            kept = stream.observe(block, exact)
            found += [one.value for one in exact.values()]
        stream.advance(block, kept)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_chunked_and_packed_is_sequence_by_sequence(checkpoint: Make, family: str) -> None:
    """The sum over sequences that went through alone is the H of all, in fp64: in parts, packed, or both."""
    folder, calibration = checkpoint(family, dtype=torch.float32), tiny.calibration((33, 20, 20, 7, 1, 9))
    alone = [exact_hessians(folder, replace(calibration, sequences=[one]), 1000) for one in calibration.sequences]
    expected = [sum(parts) for parts in zip(*alone, strict=True)]
    for chunk_tokens in (8, 21, 1000):
        for found, exact in zip(exact_hessians(folder, calibration, chunk_tokens), expected, strict=True):
            # Norms and rotary embeddings are computed in fp32 by transformers itself, whatever goes in, and so is all
            # of a recurrent mixer.
            bound = 1e-4 if family in ("qwen3_5_text", "nemotron_h") else 1e-6
            assert (found - exact).abs().max() <= bound * max(exact.diagonal().max(), 1)


@torch.inference_mode()
@pytest.mark.parametrize("place", ["host", "disk"])
def test_kept_activations_change_no_bit(checkpoint: Make, tmp_path: Path, place: Place) -> None:
    """A resumed job computes again what the first one kept: the hidden states must be the same bytes."""
    model, layers = opened(checkpoint("qwen2"))
    hidden = []
    for keep_bytes, kept_expected in ((1 << 30, True), (0, False)):
        packing = Packing.of(tiny.calibration(), 50)
        stream = Stream(model, packing, model.dtype, Storage("cpu", place, tmp_path), keep_bytes)
        for block in layers[0]:
            assert block.last is not None
            kept = stream.observe(block, {block.last: Statistic(block.width, full=False, device="cpu")})
            assert (kept is not None) == (kept_expected or block.plan.attention)
            stream.advance(block, kept)
        hidden.append(whole(stream))
    replayed = Stream(model, Packing.of(tiny.calibration(), 50), model.dtype)
    for block in layers[0]:
        replayed.advance(block)
    assert torch.equal(hidden[0], whole(replayed))
    assert torch.equal(hidden[1], whole(replayed))


@torch.inference_mode()
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_moving_on_with_the_next_pass_changes_no_bit(
    checkpoint: Make, tmp_path: Path, place: Place, keep_bytes: int
) -> None:
    """Statistics and hidden states are the same whether the tokens go through a block at once or on the next pass."""
    model, layers = opened(checkpoint("qwen2"))
    found: list[list[Tensor]] = []
    for later in (False, True):
        packing = Packing.of(tiny.calibration(), 50)
        stream = Stream(model, packing, model.dtype, Storage("cpu", place, tmp_path), keep_bytes)
        gathered = list[Tensor]()
        for blocks in layers:
            for block in blocks:
                assert block.last is not None
                kept = None
                for name in (block.first, block.last):
                    columns = block.linears[name].get_parameter("weight").shape[1]
                    statistic = Statistic(columns, full=True, device="cpu")
                    kept = stream.observe(block, {name: statistic})
                    gathered.append(statistic.value)
                before = whole(stream).clone()
                (stream.advance_later if later else stream.advance)(block, kept)
                assert torch.equal(whole(stream), before) == later
        stream.flush()
        found.append([*gathered, whole(stream).clone()])
        stream.close()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_packing() -> None:
    calibration = tiny.calibration([3, 10, 4, 4, 0, 25, 1], part="completion")
    packing = Packing.of(calibration, chunk_tokens=9)
    assert [(chunk.start, chunk.stop, chunk.lengths) for chunk in packing.chunks] == [
        *((0, 9, (25,)), (9, 18, (25,)), (18, 25, (25,))),
        *((25, 34, (10,)), (34, 35, (10,))),
        (35, 43, (4, 4)),
        (43, 47, (3, 1)),
    ]
    assert [(chunk.offset, chunk.is_part) for chunk in packing.chunks] == [
        *((0, True), (9, True), (18, True)),
        *((0, True), (9, True)),
        *((0, False), (0, False)),
    ]
    longest = calibration.sequences[5]
    assert packing.token_ids[:25].tolist() == list(longest.token_ids)
    assert packing.weights is not None
    assert longest.weights is not None
    assert packing.weights[:25].tolist() == list(longest.weights)
    assert packing.counted == 13 + 5 + 2 + 2 + 2 + 1
    assert Packing.of(tiny.calibration([3, 4]), 9).weights is None
    assert Packing.of(tiny.calibration([]), 9).chunks == []


def test_statistics_weigh_tokens() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(20, 6), torch.tensor([0.0, 0.5, 1.0, 2.0] * 5)
    full, norms = Statistic(6, full=True, device="cpu"), Statistic(6, full=False, device="cpu")
    for statistic in (full, norms):
        statistic.add(x[:8], weights[:8])
        statistic.add(x[8:], weights[8:])
        statistic.add(x, torch.zeros(20))
    expected = (x * weights[:, None]).T @ x
    torch.testing.assert_close(full.value.triu(), expected.triu())
    torch.testing.assert_close(norms.value, expected.diagonal())


@pytest.mark.parametrize("way", ["staged", "layer"])
def test_tokens_count_with_their_weights(checkpoint: Make, way: str) -> None:
    folder, calibration = checkpoint("qwen2", dtype=torch.float32), tiny.weighted()
    assert_same(packed_hessians(folder, calibration, 1, 64, way), hooked_hessians(folder, calibration, layer=1))
