"""The parts of `real.py` that run in the environment of llm-compressor: opening the GGUF file, and its own pruning.

python -P benchmarks/real_peer.py convert FILE.gguf MODEL
python -P benchmarks/real_peer.py prune MODEL OUT --ids ids.json --method sparsegpt --sparsity 0.5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def convert(file: Path, out: Path) -> None:
    """Save a GGUF file's weights in bf16 as a Hugging Face checkpoint, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are plain now, which transformers does not note. A tokenizer of GGUF has its end in the config only.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    ends = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.eos_token = tokenizer.pad_token = ends
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def prune(model: Path, out: Path, sequences: list[list[int]], method: str, sparsity: float, structure: str) -> None:
    """Prune with llm-compressor's one-shot entry point, as its examples call it, on sequences of token ids.

    Each sequence is a batch of its own: nothing is padded, cut or shuffled.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    shared: dict[str, Any] = {
        "sparsity": sparsity,
        "mask_structure": structure,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    if method == "sparsegpt":
        recipe: Any = SparseGPTModifier(**shared, block_size=128, dampening_frac=0.01)
    else:
        recipe = WandaPruningModifier(**shared)
    oneshot(
        model=str(model),
        dataset=data,
        recipe=recipe,
        output_dir=str(out),
        num_calibration_samples=len(sequences),
        max_seq_length=max(map(len, sequences)),
        shuffle_calibration_samples=False,
        batch_size=1,
        pipeline="sequential",
        save_compressed=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert")
    one.add_argument("file", type=Path)
    one.add_argument("out", type=Path)
    other = commands.add_parser("prune")
    other.add_argument("model", type=Path)
    other.add_argument("out", type=Path)
    other.add_argument("--ids", type=Path, required=True, help="JSON file: a list of token ids for each sequence")
    other.add_argument("--method", choices=("sparsegpt", "wanda"), required=True)
    other.add_argument("--sparsity", type=float, default=0.5)
    other.add_argument("--structure", default="0:0", help="N:M as llm-compressor means it; 0:0 is unstructured")
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.file, args.out)
    else:
        ids = json.loads(args.ids.read_text())
        prune(args.model, args.out, ids, args.method, args.sparsity, args.structure)


if __name__ == "__main__":
    main()
