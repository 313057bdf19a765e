"""Inputs of the matrices of a model, from forward hooks on transformers' own pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def inputs_of(folder: Path, ids: list[Tensor]) -> dict[str, Tensor]:
    """Inputs of every linear layer and norm of a model, all sequences behind one another, in fp64.

    "… experts: chosen" [tokens, k] are the experts that each token goes to.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]).double())

        module.register_forward_pre_hook(hook)

    def watch_experts(name: str, experts: Any) -> None:
        """Experts, by what they are called on disk: transformers has their matrices fused."""
        disk = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        first, last = ("w1", "w3"), "w2"
        if not mixtral:
            first, last = ("gate_proj", "up_proj"), "down_proj"

        def hook(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.setdefault(disk, []).append(given[0].double())
            seen.setdefault(f"{disk}: chosen", []).append(given[1])
            for expert in range(experts.num_experts):
                x = given[0][(given[1] == expert).any(dim=1)]
                if hasattr(experts, "gate_up_proj_bias"):  # stacked on disk too
                    made = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    seen.setdefault(f"{disk}.gate_up_proj[{expert}]", []).append(x.double())
                    inner = experts._apply_gate(made).double()
                    seen.setdefault(f"{disk}.down_proj[{expert}]", []).append(inner)
                    continue
                if not hasattr(experts, "gate_up_proj"):
                    seen.setdefault(f"{disk}.{expert}.up_proj", []).append(x.double())
                    inner = experts.act_fn(x @ experts.up_proj[expert].T).double()
                    seen.setdefault(f"{disk}.{expert}.down_proj", []).append(inner)
                    continue
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
                for part in first:
                    seen.setdefault(f"{disk}.{expert}.{part}", []).append(x.double())
                seen.setdefault(f"{disk}.{expert}.{last}", []).append((experts.act_fn(gate) * up).double())

        experts.register_forward_pre_hook(hook)

    mixtral = model.config.model_type == "mixtral"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("layernorm"):
            watch(name, module)
        elif name.endswith(".experts"):
            watch_experts(name, module)
    for sequence in ids:
        model(sequence[None])
    root = "backbone." if model.config.model_type == "nemotron_h" else "model."
    return {name.replace("model.", root, 1): torch.cat(parts) for name, parts in seen.items()}
