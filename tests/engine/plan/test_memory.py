"""Memory does not grow with depth: a decoder layer's weights are resident, and the next one's that are being read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_engine.checkpoint.reader import INDEX
from rac_engine.plan.costs import FILE_BYTES
from tests import tiny

JOB = """
from rac_engine.base.process import prepare_process
prepare_process()
import sys, torch
from pathlib import Path
from rac_engine.engine import prune
from rac_engine.recipe import PruneSettings
from tests import tiny

torch.set_num_threads(1)
report = prune(Path(sys.argv[1]), Path(sys.argv[2]), PruneSettings(method="sparsegpt"), tiny.calibration([64] * 4))
print(report.end["peak_memory"])
"""


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(
        tmp_path_factory.mktemp("four"),
        shard_size="1GB",
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        initializer_range=0.02,
        dtype=torch.bfloat16,
    )


def deepened(source: Path, folder: Path, times: int) -> Path:
    """The same model with its row of layers repeated, a shard for each repetition."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    layers, weight_map = config["num_hidden_layers"], {}
    for shard in range(times):
        part = {} if shard else {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
        for name, tensor in tensors.items():
            if ".layers." in name:
                before, number, after = name.partition(".layers.")[0], name.split(".")[2], name.split(".", 3)[3]
                part[f"{before}.layers.{int(number) + shard * layers}.{after}"] = tensor
        file = f"model-{shard + 1:05d}-of-{times:05d}.safetensors"
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config |= {"num_hidden_layers": layers * times, "layer_types": config["layer_types"] * times}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LONG = """
import sys, torch
from pathlib import Path
from rac_engine.calibrate import Packing, Statistic, Storage, Stream
from rac_engine.checkpoint import Checkpoint
from rac_engine.base.process import peak_memory
from rac_engine.models import Model
from tests import tiny

torch.set_num_threads(1)
model = Model.open(Checkpoint.open(sys.argv[1]))
blocks = model.build_layer(0, {name: model.checkpoint.read(name) for name in model.tensor_names(0)}, model.dtype, "cpu")
with torch.inference_mode():
    for length in (512, 4096):
        packing = Packing.of(tiny.calibration([length]), 512)
        peak_memory(reset=True)
        before = peak_memory()
        stream = Stream(model, packing, model.dtype, Storage("cpu", "disk", Path(sys.argv[2])), keep_bytes=0)
        for block in blocks:
            stream.advance(block, stream.observe(block, {block.last: Statistic(block.width, False, "cpu")}))
        print(peak_memory() - before)
"""


def test_a_long_trace_takes_no_more_than_its_keys_and_values(tmp_path: Path) -> None:
    """4096 tokens in one sequence through a layer in parts of 512: an MLP's inner of them all would be 25 MB."""
    source = tiny.save(
        tmp_path / "model",
        hidden_size=96,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.02,
    )
    short, long_ = (int(line) for line in run(LONG, source, tmp_path).split())
    keys_and_values = 2 * 4096 * 48 * 2
    # DenseReference them: masks of queries by keys, as bool and as what the attention kernel makes of it.
    masks = 512 * 4096 * (1 + 4)
    assert long_ - short < keys_and_values + masks + (4 << 20), (short, long_)


def run(code: str, *words: Path | str, limited: bool = False) -> str:
    """What a process that runs `code` prints.

    glibc keeps freed memory for later, more or less of it as threads happen to meet. Here it is told to give it back at
    once, so that the peak is what was held; a job with a limit sees to that itself.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **({} if limited else {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}),
    }
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak(source: Path, out: Path) -> int:
    """Most bytes resident in a process that prunes `source`."""
    return int(run(JOB, source, out))


LIMITED = """
from rac_engine.base import process
process.prepare_process()
process.give_back_freed()
import sys, torch
from pathlib import Path
from rac_engine.engine import limits, prune
from rac_engine.checkpoint import Checkpoint
from dataclasses import replace
from rac_engine.plan.memory import plan_memory
from rac_engine.plan.phases import Tokens
from rac_engine.plan.shapes import Shape
from rac_engine.models import Model
from rac_engine.recipe import PruneSettings
from tests import tiny

torch.set_num_threads(1)
settings = PruneSettings(method="wanda", chunk_tokens=512)
calibration = tiny.calibration([2048] * 8 + [128] * 64)
shape = Shape.of(Model.open(Checkpoint.open(sys.argv[1])), settings, on_gpu=False)
machine = limits.machine_limits("cpu", None, None, process.resident())
ample = plan_memory(shape, settings, Tokens(calibration.tokens, 2048), replace(machine, host_limit=1 << 40))
assert ample.choice.place == "host"
limit = ample.host_peak - (20 << 20)
report = prune(Path(sys.argv[1]), Path(sys.argv[2]), settings, calibration, host_memory=limit)
memory = report.end["memory"]
print(report.end["plan"]["place"], limit, report.end["peak_memory"], memory["host_planned"], memory["host_measured"])
"""


def test_a_job_keeps_to_its_limit_with_activations_on_disk(
    four_layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, *figures = run(LIMITED, four_layers, tmp_path / "out", limited=True).split()
    limit, peak, planned, measured = map(int, figures)
    with capsys.disabled():
        print(f"\nlimit {limit:,}, peak {peak:,}; beyond the program planned {planned:,}, measured {measured:,} bytes")
    assert place == "disk"
    assert peak <= limit
    assert measured <= planned


def test_memory_does_not_grow_with_depth(four_layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(four_layers / "model.safetensors")
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    shallow = peak(four_layers, tmp_path / "4")
    deep = peak(deepened(four_layers, tmp_path / "deep", times=6), tmp_path / "24")
    with capsys.disabled():
        print(f"\npeak with 4 layers {shallow:,}, with 24 {deep:,} bytes; the weights of a layer are {layer:,} bytes")
    assert layer > 5_000_000
    assert abs(deep - shallow) < 2 * layer


KEPT = """
import sys, torch
from rac_engine.base import process

torch.set_num_threads(1)
if sys.argv[1] == "told":
    process.give_back_freed()
torch.ones(3 << 17)  # once one was freed, pieces of this size come from the heap
held = [(torch.ones(3 << 17), torch.ones(25_000)) for _ in range(107)]
before = process.resident()
held = [small for _, small in held]
print(before - process.resident())
"""


def test_a_job_with_a_limit_has_freed_memory_given_back() -> None:
    """160 MiB in pieces of 1.5: glibc keeps those that something small lies behind."""
    assert int(run(KEPT, "told", limited=True)) > 150 << 20
    assert int(run(KEPT, "not told", limited=True)) < 50 << 20


PLANNED = """
from rac_engine.base.process import prepare_process
prepare_process()
import json, sys, torch
from pathlib import Path
from rac_engine.engine import prune
from rac_engine.recipe import PruneSettings
from tests import tiny

torch.set_num_threads(1)
settings = PruneSettings(**{"chunk_tokens": 1024, **json.loads(sys.argv[3])})
lengths = json.loads(sys.argv[4])
report = prune(Path(sys.argv[1]), Path(sys.argv[2]), settings, tiny.calibration(lengths))
print(report.end["memory"]["host_planned"], report.end["memory"]["host_measured"])
"""

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 2}
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sparsegpt": ("qwen2", {}, {"method": "sparsegpt"}),
    "admm": ("qwen2", {}, {"method": "admm", "overrides": [{"modules": ".*up_proj", "damping": 0.1}]}),
    "tuned": ("qwen2", {}, {"method": "admm", "pattern": "1:4", "tune": 1}),
    "wanda": ("qwen2", {}, {"method": "wanda"}),
    "layer": ("qwen2", {}, {"method": "sparsegpt", "order": "layer"}),
    "experts": ("mixtral", {"intermediate_size": 1024, "num_local_experts": 8}, {"method": "sparsegpt"}),
    "matched experts": (
        "mixtral",
        {"intermediate_size": 1024, "num_local_experts": 8},
        {"method": "sparsegpt", "reconstruct": "dense"},
    ),
    "linear attention": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        {"method": "sparsegpt"},
    ),
    "state space": (
        "nemotron_h",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mlp", "linear_attention", "mlp"],
            "intermediate_size": 512,
            "mamba_num_heads": 32,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "chunk_size": 128,
        },
        {"method": "sparsegpt"},
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_what_is_planned_is_what_it_takes(tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond the program never more, and the plan no more than a tenth above, but for what is mapped of files."""
    family, sizes, changes = JOBS[job]
    source = tiny.save(tmp_path / "model", family, shard_size="1GB", initializer_range=0.02, **{**SIZES, **sizes})
    found = run(PLANNED, source, tmp_path / "out", json.dumps(changes), json.dumps([1200, 700, 200]))
    planned, measured = map(int, found.split())
    with capsys.disabled():
        print(f"\n{job}: planned {planned:,}, measured {measured:,} bytes")
    assert measured <= planned <= 1.1 * measured + FILE_BYTES


OPEN = """
from rac_engine.base.process import prepare_process
prepare_process()
import sys, torch
from pathlib import Path
from rac_engine.base.process import peak_memory, resident
from rac_engine.engine import prune
from rac_engine.recipe import PruneSettings
from rac_kernels import Scoring, packed_attention
from rac_kernels.ops.attention import AttentionShape, workspace
from tests import tiny

torch.set_num_threads(1)
tokens, window = 32768, 256
settings = PruneSettings(method="wanda", chunk_tokens=8192)
memory = prune(Path(sys.argv[1]), Path(sys.argv[2]), settings, tiny.calibration([tokens])).end["memory"]
print(memory["host_planned"], memory["host_measured"])
torch.manual_seed(0)
q, k, v = (torch.randn(1, tokens, 8) for _ in range(3))
for seen in (window, None):
    peak_memory(reset=True)
    before = resident()
    out = packed_attention(q, k, v, [tokens], Scoring(0.4, seen, 2.0))
    taken = peak_memory() - before
    print(taken, workspace(AttentionShape(tokens, tokens, 1, 16, seen), False) + 2 * out.nbytes)
    for row in (0, 1, window - 1, window, 12345, tokens - 1):
        first = max(row + 1 - (seen or tokens), 0)
        scores = 2.0 * (0.4 * k[0, first : row + 1].double() @ q[0, row].double() / 2.0).tanh()
        torch.testing.assert_close(out[row, 0].double(), scores.softmax(0) @ v[0, first : row + 1].double())
"""


def test_32k_tokens_in_one_sequence_with_soft_caps_take_what_is_planned(tmp_path: Path) -> None:
    """Gemma 2's layers, with a sliding window and without: all scores of one head together would be 4 GiB."""
    source = tiny.save(
        tmp_path / "model",
        "gemma2",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=256,
    )
    figures = [tuple(map(int, line.split())) for line in run(OPEN, source, tmp_path / "out").splitlines()]
    (planned, measured), *attended = figures
    assert measured <= planned < 300 << 20
    for taken, most in attended:
        assert taken <= most + (4 << 20) < 200 << 20
