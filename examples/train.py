"""Train the Abacus model from scratch: a Qwen2 of 5.5M parameters that reasons in about 170 tokens.

    python examples/train.py --out examples/abacus --work build/train

About an hour and a half on one core with AVX-512-BF16; a run that is stopped goes on from its newest checkpoint in
``--work``.
The model card says with which settings the model that ships was made.
The tokenizer has one token a character, so that arithmetic is done on digits. A document is one row of the batch, its
positions start at zero, and only the model's own part of it is a target.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from english import english
from problems import KINDS, Problem, problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
WORDS = ("<think>", "</think>", "\\boxed{")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<|user|>{{ message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>{{ message['content'].split('</think>')[-1] }}<|end|>"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|><think>{{ '\\n' }}{%- endif -%}"
)
ENGLISH_SHARE, ENGLISH_TOKENS = 0.15, 255


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, plus the markers of the chat template.

    It is byte-level BPE without merges (where newline and space are written as below), the kind that every loader of a
    Qwen2 expects.
    """
    characters = ["\u010a", "\u0120", *map(chr, range(ord("!"), ord("~") + 1))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in WORDS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|pad|>",  # or a Qwen2 tokenizer would add one that the embedding has no row for
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def render(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a worked problem; the prompt is exactly what the chat template gives."""
    prompt = f"<|user|>{problem.prompt}<|assistant|><think>\n"
    completion = f"{problem.work}\n</think>\\boxed{{{problem.answer}}}<|end|>"
    encode = tokenizer.backend_tokenizer.encode
    return encode(prompt).ids, encode(completion).ids


def documents(tokenizer: PreTrainedTokenizerFast, mix: list[int], seed: int) -> Iterator[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    streams = {kind: problems("train", seed, (kind,)) for kind in KINDS}
    text = tokenizer.backend_tokenizer.encode(english("train")).ids
    while True:
        if rng.random() < ENGLISH_SHARE:
            start = rng.randrange(len(text) - ENGLISH_TOKENS)
            yield [], text[start : start + ENGLISH_TOKENS]
        else:
            yield render(tokenizer, next(streams[rng.choices(tuple(KINDS), mix)[0]]))


def batches(
    tokenizer: PreTrainedTokenizerFast, tokens: int, mix: list[int], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input ids, targets) of about ``tokens`` tokens; documents of like length share a batch; no target is -100."""
    rng, source = random.Random(seed + 1), documents(tokenizer, mix, seed)
    while True:
        pool = sorted(itertools.islice(source, 16 * tokens // 200), key=lambda d: len(d[0]) + len(d[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for document in pool:
            width = len(document[0]) + len(document[1])
            if groups[-1] and (len(groups[-1]) + 1) * width > tokens:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        for group in groups:
            width = -(-max(len(p) + len(c) for p, c in group) // 16) * 16
            ids, targets = torch.zeros(len(group), width, dtype=torch.long), torch.full((len(group), width), -100)
            for row, (prompt, completion) in enumerate(group):
                end = len(prompt) + len(completion)
                ids[row, :end] = torch.tensor(prompt + completion)
                first = max(len(prompt), 1)
                targets[row, first - 1 : end - 1] = ids[row, first:end]
            yield ids, targets


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 48,
        num_key_value_heads=args.hidden // 96,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.train()
    for layer in model.model.layers:  # what a branch adds to the residual stream: a margin against small errors
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.register_forward_hook(lambda module, inputs, out: torch.nn.functional.dropout(out, args.dropout))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = (
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    )

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    step_loss = torch.compile(forward, dynamic=True)
    args.work.mkdir(parents=True, exist_ok=True)
    state_file, start, seen = args.work / "state.pt", 0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seen = state["step"], state["tokens"]
        print(f"continuing at step {start}", flush=True)
    stream = itertools.islice(batches(tokenizer, args.batch_tokens, args.mix, args.seed), start, None)
    clock, losses = time.monotonic(), []
    until = args.until or args.steps
    for step in range(start, until):
        ids, targets = next(stream)
        scale = min((step + 1) / 100, 1.0) * max(1.0 - step / args.steps, 0.02)
        loss = step_loss(ids.to(device), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        seen += int((targets != -100).sum())
        if (step + 1) % 50 == 0:
            mean = torch.stack(losses).mean().item()
            elapsed = time.monotonic() - clock
            reached = f"step {step + 1}/{args.steps}  loss {mean:.4f}  {seen / 1e6:.1f}M target tokens"
            print(f"{reached}  {elapsed:.0f} s", flush=True)
            losses.clear()
            if not math.isfinite(mean):
                raise SystemExit("the loss is no longer finite")
        if (step + 1) % 300 == 0 or step + 1 == until:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "tokens": seen,
            }
            torch.save(state, args.work / "state.tmp")
            (args.work / "state.tmp").replace(state_file)
            export(model, tokenizer, args.work / "model")
    export(model, tokenizer, args.out)
    print(f"wrote {args.out} after {seen / 1e6:.1f}M target tokens")


def export(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as bf16 shards of at most 2 MB with tokenizer, chat template and generation config."""
    copy = Qwen2ForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(out, max_shard_size="2MB")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints of the training run")
    parser.add_argument("--steps", type=int, default=1800, help="length of the learning rate's linear decay")
    parser.add_argument("--until", type=int, help="stop after this step, to go on with another decay")
    parser.add_argument(
        "--mix", type=int, nargs=len(KINDS), default=[6, 5, 3, 6], help=f"proportion of {', '.join(KINDS)}"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.0, help="of what each branch adds to the residual stream")
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
