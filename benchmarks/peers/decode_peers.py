"""The parts of `decode.py` that load a model and generate: one form of it a process, in the environment of its engine.

python benchmarks/peers/decode_peers.py transformers MODEL --given settings.json --found times.json
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer_process import answer

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
    for tensor in loaded.parameters():  # what is mapped from a file is in memory once it has been read
        tensor.detach().reshape(-1).view(torch.uint8)[::1024].sum()
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


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""llama.cpp's names of the tensors of a layer."""


def checkpoint(model: Path) -> Iterator[tuple[str, Any]]:
    """Names and values, fp32 [...], of a checkpoint's bf16 tensors; without torch, which llama.cpp does not need."""
    import numpy as np

    for file in sorted(model.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        size = int(raw[:8].view(np.uint64)[0])
        for name, told in json.loads(bytes(raw[8 : 8 + size])).items():
            if name != "__metadata__":
                first, to = (8 + size + at for at in told["data_offsets"])
                wide = np.array(raw[first:to]).view(np.uint16).astype(np.uint32) << 16
                yield name, wide.view(np.float32).reshape(told["shape"])


def write_gguf(model: Path, out: Path, values: str) -> None:
    """Write a model of the Qwen2 or Llama family for llama.cpp, with stand-ins for the words of its vocabulary.

    Rows of q and k stay in the checkpoint's order, which for Llama is not llama.cpp's: nothing is to be read from what
    such a file generates but its speed.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = [f"w{number}" for number in range(config["vocab_size"])]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([f"{left} {right}" for left, right in pairwise(words[:2])])
    kind = gguf.GGMLQuantizationType[values.upper()]
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in checkpoint(model):
        stem, _, last = name.rpartition(".")
        if name.startswith("model.layers."):
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            named = f"blk.{number}.{GGUF_NAMES[inner]}.{last}"
        else:
            named = f"{outer[stem]}.{last}"
        if tensor.ndim == 2:
            writer.add_tensor(named, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(named, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(model: Path, given: Given) -> Any:
    """Greedy decoding by llama.cpp's server, in this process, all sequences of a batch at once."""
    import random

    import xllamacpp

    out = Path(given["gguf"])
    if not out.exists():
        staged = out.with_suffix(".tmp")
        write_gguf(model, staged, given["values"])
        staged.rename(out)
    gc.collect()
    largest = max(given["batches"])
    before = resident()
    settings = xllamacpp.CommonParams()
    settings.model.path = str(out)
    settings.n_parallel = largest
    settings.n_ctx = largest * (given["prompt"] + given["tokens"] + 8)
    settings.n_batch = settings.n_ubatch = 512
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = given["threads"]
    settings.cache_prompt, settings.warmup, settings.port = False, False, 0
    server = xllamacpp.Server(settings)
    found: dict[str, Any] = {"file": out.stat().st_size, "loaded": resident() - before, "batches": []}
    source = random.Random(0)

    def generated(tokens: int) -> dict[str, float]:
        asked = {
            "prompt": [source.randrange(given["vocabulary"]) for _ in range(given["prompt"])],
            **{"n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False},
        }
        answer = server.handle_completions(asked)
        if "timings" not in answer:
            raise RuntimeError(str(answer)[:300])
        times: dict[str, float] = answer["timings"]
        return times

    generated(2)
    for batch in given["batches"]:
        with ThreadPoolExecutor(batch) as pool:
            times = list(pool.map(generated, [given["tokens"]] * batch))
        found["batches"].append(
            {
                "batch": batch,
                "first": max(each["prompt_ms"] for each in times) / 1e3,
                # Of the one that began last: others generated while prompts were read.
                "step": min(each["predicted_per_token_ms"] for each in times) / 1e3,
            }
        )
    return found | {"used": resident() - before, "build": str(xllamacpp.get_system_info())}


def vllm(model: Path, given: Given) -> Any:
    """Greedy decoding by vLLM in this process, without its compiler; memory is with its cache of 1 GiB."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import random

    from vllm import LLM, SamplingParams

    if given["packed"]:
        from rac_engine.serve.vllm import register

        register()
    gc.collect()
    before = resident()
    longest = given["prompt"] + given["tokens"] + 8
    engine = LLM(
        model=str(model),
        max_model_len=longest,
        max_num_seqs=max(given["batches"]),
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    found: dict[str, Any] = {"loaded": resident() - before, "batches": []}
    source = random.Random(0)

    def seconds(batch: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [source.randrange(given["vocabulary"]) for _ in range(given["prompt"])]}
            for _ in range(batch)
        ]
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - began

    for batch in given["batches"]:
        seconds(batch, 2)
        first = seconds(batch, 1)
        step = (seconds(batch, given["tokens"]) - first) / (given["tokens"] - 1)
        found["batches"].append({"batch": batch, "first": first, "step": step})
    return found | {"used": resident() - before}


ENGINES: dict[str, Callable[[Path, Given], Any]] = {"transformers": transformers, "llama.cpp": llama, "vllm": vllm}


if __name__ == "__main__":
    answer(__doc__.splitlines()[0], "engine", ENGINES)
