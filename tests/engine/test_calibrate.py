"""What is gathered from packed tokens is what transformers' own layers see, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rac_engine import calibrate
from rac_engine.calibrate import Packing, Statistic, Stream
from rac_engine.checkpoint import Checkpoint
from rac_engine.models import Block, Model
from rac_engine.traces import Calibration, Part
from tests import tiny

Make = Callable[..., Path]

INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def opened(folder: Path) -> tuple[Model, list[list[Block]]]:
    model = Model.open(Checkpoint.open(folder))
    layers = []
    for layer in range(model.layers):
        tensors = {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}
        layers.append(model.build_layer(layer, tensors, model.dtype, "cpu"))
    return model, layers


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
    """The same from the packed stream, either in stages or in one pass through the layer."""
    model, layers = opened(folder)
    stream = Stream(model, Packing.of(calibration, chunk_tokens), model.dtype, "cpu")
    for blocks in layers[:layer]:
        for block in blocks:
            stream.advance(block)
    columns = {matrix.module: matrix.columns for matrix in model.matrices(layer)}
    statistics = [Statistic(columns[name], full=True, device="cpu") for name in INPUTS]
    if way == "layer":
        before = stream.hidden.clone()
        stream.observe_layer(layers[layer], dict(enumerate(statistics)))
        assert torch.equal(stream.hidden, before)
    else:
        for number, block in enumerate(layers[layer]):
            stream.observe_inputs(block, statistics[2 * number])
            stream.advance(block, stream.observe_inner(block, statistics[2 * number + 1]))
    return {
        name: statistic.value.triu() + statistic.value.triu(1).T
        for name, statistic in zip(INPUTS, statistics, strict=True)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name in INPUTS:
        scale = expected[name].diagonal().max()
        assert (found[name].double() - expected[name].double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("part", ["all", "completion"])
@pytest.mark.parametrize("way", ["staged", "layer"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
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


@torch.inference_mode()
def test_kept_activations_change_no_bit(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed job computes again what the first one kept: the hidden states must be the same bytes."""
    model, layers = opened(checkpoint("qwen2"))
    hidden = []
    for keep_bytes, kept_expected in ((1 << 30, True), (0, False)):
        monkeypatch.setattr(calibrate, "KEEP_BYTES", keep_bytes)
        stream = Stream(model, Packing.of(tiny.calibration(), 50), model.dtype, "cpu")
        for block in layers[0]:
            kept = stream.observe_inner(block, Statistic(block.width, full=False, device="cpu"))
            assert (kept is not None) == (kept_expected or block.plan.attention)
            stream.advance(block, kept)
        hidden.append(stream.hidden)
    replayed = Stream(model, Packing.of(tiny.calibration(), 50), model.dtype, "cpu")
    for block in layers[0]:
        replayed.advance(block)
    assert torch.equal(hidden[0], replayed.hidden)
    assert torch.equal(hidden[1], replayed.hidden)


def test_packing() -> None:
    calibration = tiny.calibration([3, 10, 4, 4, 0, 25, 1], part="completion")
    packing = Packing.of(calibration, chunk_tokens=9)
    assert [(chunk.start, chunk.stop, chunk.lengths) for chunk in packing.chunks] == [
        (0, 25, (25,)),
        (25, 35, (10,)),
        (35, 43, (4, 4)),
        (43, 47, (3, 1)),
    ]
    assert [(piece.start, piece.stop) for piece in packing.chunks[0].pieces()] == [(0, 9), (9, 18), (18, 25)]
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
