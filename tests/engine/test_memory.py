"""Memory does not grow with depth: a decoder layer's weights are resident, and the next one's that are being read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_engine.checkpoint import INDEX
from tests import tiny

JOB = """
import sys, torch
from pathlib import Path
from rac_engine.engine import prune
from rac_engine.recipe import PruneSettings
from tests import tiny

torch.set_num_threads(1)
report = prune(Path(sys.argv[1]), Path(sys.argv[2]), PruneSettings(), tiny.calibration([64] * 4))
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


def peak(source: Path, out: Path) -> int:
    """Most bytes resident in a process that prunes `source`.

    glibc keeps freed memory for later, more or less of it as threads happen to meet. Here it is told to give it back at
    once, so that the peak is what the job held.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
    }
    command = [sys.executable, "-c", JOB, str(source), str(out)]
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_memory_does_not_grow_with_depth(four_layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(four_layers / "model.safetensors")
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    shallow = peak(four_layers, tmp_path / "4")
    deep = peak(deepened(four_layers, tmp_path / "deep", times=6), tmp_path / "24")
    with capsys.disabled():
        print(f"\npeak with 4 layers {shallow:,}, with 24 {deep:,} bytes; the weights of a layer are {layer:,} bytes")
    assert layer > 5_000_000
    assert abs(deep - shallow) < 2 * layer
