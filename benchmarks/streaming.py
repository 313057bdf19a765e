"""A whole pruning job on the shapes of a 7B model with random weights: time, bytes, peaks of memory, overlap.

    python benchmarks/streaming.py --layers 2 --tokens 16k --length 16k --host-memory 8GiB
    python benchmarks/streaming.py --device cuda --tokens 1M --device-memory 6GiB

The checkpoint is made first, by another process, and can be kept (`--work`). Weights do not matter to the time, and no
claim about quality can be made from them. With `--slow-disk` every byte of a layer that is read or written costs time
at that rate (slept, not computed): a disk slow enough to matter, to see what is waited for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from safetensors.torch import save_file

from rac_engine.base import faults
from rac_engine.base.sizes import format_bytes, format_seconds, parse_size
from rac_engine.checkpoint import INDEX
from rac_engine.engine import PruneReport, prune
from rac_engine.jobs.timeline import LANES
from rac_engine.recipe import PruneSettings
from rac_engine.traces import Calibration, TokenSequence

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of these shapes, a layer a shard, so that no more than a layer is ever in memory."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        # By runs of rows: torch draws in fp32.
        made = torch.empty(*shape, dtype=torch.bfloat16)
        for rows in made.split(4096):
            rows.copy_(torch.randn(rows.shape, generator=draw).mul_(0.02))
        return made

    def table() -> torch.Tensor:
        return matrix(config["vocab_size"], hidden)

    def layer(number: int) -> dict[str, torch.Tensor]:
        parts = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.v_proj.weight": (narrow, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        ones = {name: torch.ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        biases = {"q_proj": hidden, "k_proj": narrow, "v_proj": narrow}
        tensors = {name: matrix(*shape) for name, shape in parts.items()}
        tensors |= {f"{name}.weight": tensor.bfloat16() for name, tensor in ones.items()}
        tensors |= {f"self_attn.{name}.bias": torch.zeros(n, dtype=torch.bfloat16) for name, n in biases.items()}
        return {f"model.layers.{number}.{name}": tensor for name, tensor in tensors.items()}

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 2:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    save(1, {"model.embed_tokens.weight": table(), "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for number in range(layers):
        save(number + 2, layer(number))
    save(layers + 2, {"lm_head.weight": table()})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def calibration(tokens: int, length: int, vocabulary: int) -> Calibration:
    """Traces of `length` random tokens, the last one of what is left."""
    draw = np.random.default_rng(0)
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    return Calibration(
        "random", "random tokens", "all", [TokenSequence(draw.integers(0, vocabulary, n), 0) for n in lengths]
    )


def slow_down(bytes_a_second: float) -> Callable[[str], None]:
    """Make reading and writing of tensors and activations cost time at that rate, from the first layer on.

    Returns what starts it.
    """
    preadv, pwrite, started = faults.preadv, faults.pwrite, list[str]()

    def slow_preadv(fd: int, buffers: list[Any], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        time.sleep(count / bytes_a_second if started else 0)
        return count

    def slow_pwrite(fd: int, data: Any, offset: int) -> int:
        count = pwrite(fd, data, offset)
        time.sleep(count / bytes_a_second if started else 0)
        return count

    vars(faults).update(preadv=slow_preadv, pwrite=slow_pwrite)
    return started.append


def overlap(report: PruneReport) -> dict[str, Any]:
    """Wall time of the layers against the longest of reading, moving, computing and writing."""
    rows, busy = report.end["timeline"], report.end["busy"]
    wall = max(row["end"] for row in rows) - min(row["start"] for row in rows)
    longest = max(LANES, key=lambda lane: busy.get(lane, 0.0))
    return {
        "wall_seconds": round(wall, 3),
        "busy_seconds": busy,
        "longest": longest,
        "wall_by_longest": round(wall / busy[longest], 4),
        "wall_by_sum": round(wall / sum(busy.values()), 4),
    }


def main() -> None:
    args = _arguments()
    config = _config(args)
    if args.make:
        make(args.make, config)
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="streaming-"))
    model, out = work / "model", work / "out"
    try:
        if not model.exists():
            subprocess.run([sys.executable, *sys.argv, "--make", str(model)], check=True)
        shutil.rmtree(out, ignore_errors=True)
        started = slow_down(args.slow_disk) if args.slow_disk else None

        def progress(line: str) -> None:
            print(line, flush=True)
            if started and line.startswith("layer"):
                started(line)

        began = time.monotonic()
        report = prune(
            model,
            out,
            PruneSettings(method=args.method, chunk_tokens=args.chunk_tokens),
            calibration(args.tokens, args.length, args.vocabulary),
            device=args.device,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            progress=progress,
        )
        seconds = time.monotonic() - began  # reading for the checksum before and reading back after, too
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    finally:
        shutil.rmtree(out if args.work else work, ignore_errors=True)
    made = _record(args, config, report, size, seconds)
    _show(made)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(made, indent=1) + "\n")
        print(f"record: {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=QWEN2_7B["hidden_size"])
    parser.add_argument("--intermediate", type=int, default=QWEN2_7B["intermediate_size"])
    parser.add_argument("--vocabulary", type=int, default=QWEN2_7B["vocab_size"])
    parser.add_argument("--tokens", type=parse_size, default=1_000_000)
    parser.add_argument("--length", type=parse_size, default=32_000, help="tokens of a trace")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--chunk-tokens", type=parse_size, default=PruneSettings().chunk_tokens)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-memory", type=parse_size)
    parser.add_argument("--host-memory", type=parse_size)
    parser.add_argument("--slow-disk", type=parse_size, metavar="BYTES", help="bytes a second")
    parser.add_argument("--work", type=Path, help="keep the checkpoint here, or take the one that is there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """The model's config, as config.json has it."""
    heads = max(args.hidden // 128, 1)
    return QWEN2_7B | {
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "vocab_size": args.vocabulary,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if heads % 4 == 0 else 1,
    }


def _record(
    args: argparse.Namespace, config: dict[str, Any], report: PruneReport, size: int, seconds: float
) -> dict[str, Any]:
    """The JSON record of a job on a checkpoint of `size` bytes that took `seconds` in all."""
    end = report.end
    return {
        "machine": machine(),
        "shapes": {name: config[name] for name in config if isinstance(config[name], int)},
        "job": {key: value for key, value in vars(args).items() if key not in ("out", "work", "make")},
        "checkpoint_bytes": size,
        "seconds": round(seconds, 2),
        "seconds_of_layers": round(end["seconds"], 2),
        "phases": {name: round(seconds, 2) for name, seconds in end["phases"].items()},
        "plan": end["plan"],
        "memory": end["memory"],
        "peak_memory": end["peak_memory"],
        "overlap": overlap(report),
        "timeline": end["timeline"],
    }


def _show(made: dict[str, Any]) -> None:
    """Print times, and memory as it was planned and measured."""
    memory = made["memory"]
    print(f"{format_seconds(made['seconds'])}; {made['overlap']}")
    for where in ("host", "device"):
        if f"{where}_measured" in memory:
            planned, measured = memory[f"{where}_planned"], memory[f"{where}_measured"]
            print(
                f"{where}: planned {format_bytes(planned)}, measured {format_bytes(measured)} "
                f"({measured / planned:.0%} of the plan)"
            )
    print(f"peak resident, the program included: {format_bytes(made['peak_memory'])}")


if __name__ == "__main__":
    main()
