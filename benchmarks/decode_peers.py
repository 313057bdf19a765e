"""The parts of `decode.py` that load a model and generate: one form of it a process, in the environment of its engine.

python -P benchmarks/decode_peers.py transformers MODEL --given settings.json --found times.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

Given = dict[str, Any]
"""What `decode.py` asks: batches, prompt and tokens (their numbers), threads, packed, vocabulary, warm (a folder)."""

PASSES = 7  # over all linear layers


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def transformers(model: Path, given: Given) -> Any:
    """Greedy decoding by `generate`, and the linear layers alone."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    if given["packed"]:
        import rac_engine  # noqa: F401, it tells transformers of packed folders

    class Clock(StoppingCriteria):
        """Notes when a token is there."""

        def __init__(self) -> None:
            self.began = time.perf_counter()
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter() - self.began)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    torch.set_num_threads(given["threads"])
    AutoModelForCausalLM.from_pretrained(given["warm"], dtype="auto")  # what loading itself brings into memory
    gc.collect()
    before = resident()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    gc.collect()
    found: dict[str, Any] = {"loaded": resident() - before, "batches": []}
    loaded.generation_config.eos_token_id = None  # every answer has all its tokens

    def generated(batch: int, tokens: int) -> list[float]:
        ids = torch.randint(given["vocabulary"], (batch, given["prompt"]), generator=torch.Generator().manual_seed(0))
        clock = Clock()
        ones = torch.ones_like(ids)
        loaded.generate(
            ids, attention_mask=ones, max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock], pad_token_id=0
        )
        return clock.times

    head = loaded.get_output_embeddings()
    kinds = "Linear", "PackedLinear"
    layers = [module for module in loaded.modules() if type(module).__name__ in kinds and module is not head]
    for batch in given["batches"]:
        generated(batch, 2)
        times = generated(batch, given["tokens"])
        steps = [later - earlier for earlier, later in pairwise(times)]
        inputs = {m.in_features: torch.randn(batch, 1, m.in_features).to(loaded.dtype) for m in layers}
        passes = []
        with torch.inference_mode():
            for _ in range(PASSES):
                began = time.perf_counter()
                for layer in layers:
                    layer(inputs[layer.in_features])
                passes.append(time.perf_counter() - began)
        found["batches"].append(
            {
                "batch": batch,
                "first": times[0],
                "step": statistics.median(steps),
                "linear": statistics.median(passes),
            }
        )
    return found | {"used": resident() - before}


ENGINES: dict[str, Callable[[Path, Given], Any]] = {"transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--given", type=Path, required=True, help="JSON file: what is asked")
    parser.add_argument("--found", type=Path, required=True, help="JSON file to write: what was found")
    args = parser.parse_args()
    found = ENGINES[args.engine](args.model.resolve(), json.loads(args.given.read_text()))
    args.found.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
