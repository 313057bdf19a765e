"""Sampling with decoder layers that come and go: the same tokens as with the whole model, and no more memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rac_engine.base.errors import BadInput, Damaged
from rac_engine.checkpoint import Checkpoint
from rac_engine.jobs.journal import Journal
from rac_engine.models import Model
from rac_engine.traces.cache import Cache, _copied
from rac_engine.traces.decoder import Decoder
from rac_engine.traces.layers import Layout, Placement
from rac_engine.traces.memory import Room, SamplingShape, Sequences, plan_sampling
from rac_engine.traces.sampling import Sampling
from rac_engine.traces.snapshot import Snapshots
from tests.engine.traces.test_decode import requests, save

SAMPLED = Sampling(max_new_tokens=6, temperature=0.8)
GREEDY = Sampling(max_new_tokens=4, temperature=0)
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", TIED), ("qwen3_moe", {}), ("gpt_oss", {}), ("qwen3_5_text", {}), ("nemotron_h", {}), ("gemma2", {})],
    ids=["tied", "experts", "stacked experts", "linear attention", "state space", "windows"],
)
def test_tokens_are_those_of_the_whole_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """In bf16, bit for bit, greedy and sampled, with layers that stay and without."""
    whole = Decoder(save(tmp_path, family, **changes))
    expected = [whole.decode(requests(), sampling, 3) for sampling in (SAMPLED, GREEDY)]
    for placement in (Placement(0), Placement(1, ahead=False)):
        streamed = Decoder(tmp_path, placement=placement)
        made = [streamed.decode(requests(), sampling, 3) for sampling in (SAMPLED, GREEDY)]
        assert made == expected
        layers = streamed.model.get_decoder().layers
        resident = [not any(parameter.is_meta for parameter in layer.parameters()) for layer in layers]
        assert resident == [number < placement.kept for number in range(len(layers))]
        streamed.close()


def test_numbers_are_widened_as_in_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    expected = Decoder(save(tmp_path)).decode(requests(), SAMPLED, 3)
    streamed = Decoder(tmp_path, placement=Placement(1))
    assert streamed.decode(requests(), SAMPLED, 3) == expected


def test_a_layer_that_changes_on_disk_is_found(tmp_path: Path) -> None:
    decoder = Decoder(save(tmp_path, shard_size="1GB"), placement=Placement(0))
    info = Checkpoint.open(tmp_path).tensors["model.layers.2.mlp.up_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\x01\x02")
    with pytest.raises(Damaged, match=r"layers\.2\.mlp\.up_proj\.weight' was read twice"):
        decoder.decode(requests(), SAMPLED, 3)


QWEN_7B = {
    **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16"},
    **{"tie_word_embeddings": False, "max_position_embeddings": 131072},
}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> SamplingShape:
    return SamplingShape.of(Model.of_config(tmp_path_factory.mktemp("config"), QWEN_7B), torch.bfloat16)


def test_a_shape_is_that_of_the_tensors(seven_b: SamplingShape) -> None:
    layer = 2 * (3584 * (3584 + 1024) + 4608 + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584)
    assert seven_b.layers == (layer,) * 28
    assert seven_b.around == 2 * 2 * 152064 * 3584
    assert seven_b.cached == 28 * 2 * (512 + 512)


def test_on_a_cpu_a_limit_is_kept_to_by_streaming(seven_b: SamplingShape) -> None:
    asked = Sequences(64, 4096)
    ample = plan_sampling(seven_b, Room(), asked, on_gpu=False)
    assert not ample.streamed and ample.rows == 64
    plans = [plan_sampling(seven_b, Room(host_limit=limit << 30), asked, on_gpu=False) for limit in (24, 12, 6)]
    for plan, limit in zip(plans, (24, 12, 6), strict=True):
        assert plan.streamed and plan.host_peak <= limit << 30
        assert plan.read == sum(seven_b.layers[plan.placement.kept :])
        assert "layers are streamed, as 14.2 GiB of weights and what they work on do not fit" in plan.describe()
    assert plans[0].rate > plans[1].rate > plans[2].rate
    with pytest.raises(BadInput, match=r"^--host-memory 2 GiB: at least [\d.]+ GiB is needed to sample one sequence"):
        plan_sampling(seven_b, Room(host_limit=2 << 30), asked, on_gpu=False)


def test_on_a_small_gpu_weights_come_over_the_link(seven_b: SamplingShape) -> None:
    asked = Sequences(64, 4096)
    plan = plan_sampling(seven_b, Room(6 << 30, 32 << 30), asked, on_gpu=True)
    assert plan.streamed and plan.read == 0
    assert plan.placement.kept + plan.placement.host == 28
    assert plan.linked == sum(seven_b.layers[plan.placement.kept :])
    assert plan.device_peak <= 6 << 30 and plan.host_peak <= 32 << 30
    tight = plan_sampling(seven_b, Room(6 << 30, 8 << 30), asked, on_gpu=True)
    assert tight.read == sum(seven_b.layers[tight.placement.kept + tight.placement.host :]) > 0
    assert tight.rate < plan.rate
    with pytest.raises(BadInput, match=r"^--device-memory 1 GiB: at least [\d.]+ GiB is needed"):
        plan_sampling(seven_b, Room(1 << 30, 32 << 30), asked, on_gpu=True)


def test_fewer_sequences_are_in_flight_where_they_may_become_long(tmp_path: Path) -> None:
    save(tmp_path)
    decoder = Decoder(tmp_path, room=Room(host_limit=1 << 30), asked=Sequences(8, 60))
    assert decoder.plan is not None and not decoder.plan.streamed
    assert any("8 sequences of up to 60 tokens in flight" in note for note in decoder.notes)
    expected = Decoder(tmp_path).decode(requests(), SAMPLED, 2)
    longest = 30 + SAMPLED.max_new_tokens
    decoder._budget = 2 * longest * decoder._shape.cached  # the longest prompt has 30 tokens
    assert decoder.decode(requests(), SAMPLED, 8) == expected
    decoder._budget = 1
    decoder._room = Room(host_limit=10 << 20)
    with pytest.raises(BadInput, match=r"at least .* is needed to sample one sequence of 36 tokens"):
        decoder.decode(requests(), SAMPLED, 8)


def test_a_job_that_goes_on_has_as_many_sequences_in_flight_as_before(tmp_path: Path) -> None:
    room, asked = Room(host_limit=1 << 30), Sequences(8, 60)
    decoder = Decoder(save(tmp_path), room=room, asked=asked)
    begun = decoder.choose_threads(tmp_path / "journal", 8)
    earlier = begun["cache_bytes"] - 100
    Journal(tmp_path / "journal").identify({}, {**begun, "cache_bytes": earlier})
    assert decoder.choose_threads(tmp_path / "journal", 8, restart=True) == begun
    assert decoder.choose_threads(tmp_path / "journal", 8)["cache_bytes"] == decoder._budget == earlier


def test_keys_and_values_on_the_host_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(save(tmp_path, "qwen3_5_text"), placement=Placement(1))
    expected = decoder.decode(requests(), SAMPLED, 3)

    class OnHost(Cache):
        def __init__(self, rows: int, longest: int | None = None, on_host: bool = False) -> None:
            super().__init__(rows, longest, True)

        def read(self, layer: int, lengths: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (held[: len(lengths), : max(lengths)] for held in self.layers[layer])
            return _copied(keys, lengths, device), _copied(values, lengths, device)

    monkeypatch.setattr("rac_engine.traces.decoder.Cache", OnHost)
    assert decoder.decode(requests(), SAMPLED, 3) == expected


def test_a_batch_goes_on_from_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(save(tmp_path, "nemotron_h"), placement=Placement(1))
    expected = decoder.decode(requests(), SAMPLED, 3)
    monkeypatch.setattr("rac_engine.traces.snapshot.EVERY", 0)
    monkeypatch.setattr("rac_engine.traces.snapshot.SHARE", 1e9)
    decoder.snapshots = Snapshots(tmp_path / "batch", {"job": 1})
    steps = 0

    def stop(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.decode(requests(), SAMPLED, 3, stop)
    told: list[Any] = []
    again = Decoder(tmp_path, placement=Placement(0))
    again.snapshots = decoder.snapshots
    assert again.decode(requests(), SAMPLED, 3, told.append) == expected
    assert told[0].tokens > 10  # it did not begin anew


def test_a_layer_in_one_piece_of_memory_has_the_same_tensors() -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor(2.5), torch.arange(3)]
    layout = Layout([(tensor.shape, tensor.dtype) for tensor in tensors])
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack(tensors, memory)
    for tensor, view in zip(tensors, layout.views(memory), strict=True):
        assert torch.equal(tensor, view) and view.data_ptr() % 256 == memory.data_ptr() % 256
