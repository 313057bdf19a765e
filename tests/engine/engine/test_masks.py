"""Zeros after pruning: kept while a model is trained on, and put back into a checkpoint that has lost them."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import rac_engine
from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.cli.app import main
from rac_engine.engine.masks import apply_masks
from rac_engine.engine.verify import verify
from rac_engine.recipe.settings import PruneSettings
from rac_engine.report.page import render
from tests import tiny

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
}


def network() -> nn.Sequential:
    """Two matrices, half of each zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[torch.rand_like(parameter) < 0.5] = 0.0
    return model


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_kept_whatever_the_optimizer_does(name: str) -> None:
    """With a state from before, which goes on moving the weights whatever the gradients are."""
    model, other = network(), network()
    optimizer, free = OPTIMIZERS[name](matrices(model)), OPTIMIZERS[name](matrices(other))
    masks = [parameter == 0 for parameter in matrices(model)]
    step(model, optimizer)  # fills the state
    with torch.no_grad():
        for parameter, mask in zip(matrices(model), masks, strict=True):
            parameter[mask] = 0.0
    before = [parameter.clone() for parameter in matrices(model)]
    kept = rac_engine.keep_zeros(model)
    assert kept.zeros == sum(int(mask.sum()) for mask in masks) and kept.names == ["0.weight", "2.weight"]
    for _ in range(3):
        step(model, optimizer)
        step(other, free)
    for parameter, mask, old in zip(matrices(model), masks, before, strict=True):
        assert torch.equal(parameter == 0, mask) and not parameter[mask].signbit().any()
        assert parameter.grad is not None and not parameter.grad[mask].any()
        assert (parameter != old)[~mask].all()
    assert all((parameter != 0).any() for parameter in matrices(other))
    assert any(not parameter[mask].eq(0).all() for parameter, mask in zip(matrices(other), masks, strict=True))
    kept.remove()
    step(model, optimizer)
    assert not all(parameter[mask].eq(0).all() for parameter, mask in zip(matrices(model), masks, strict=True))
    kept.apply()
    assert all(torch.equal(parameter == 0, mask) for parameter, mask in zip(matrices(model), masks, strict=True))


def test_what_is_not_pruned_is_free_and_a_model_that_is_gone_leaves_nothing() -> None:
    model = network()
    last = nn.Linear(4, 3)
    nn.init.zeros_(last.weight)  # as LoRA's B begins
    model.append(last)
    hooks = importlib.import_module("torch.optim.optimizer")._global_optimizer_post_hooks
    before = len(hooks)
    with rac_engine.keep_zeros(model) as kept:
        assert kept.names == ["0.weight", "2.weight"]
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert last.weight.count_nonzero()
    assert len(hooks) == before
    rac_engine.keep_zeros(model)
    del model, kept
    gc.collect()
    assert len(hooks) == before
    with pytest.raises(BadInput, match="no matrix of the model has zeros"):
        rac_engine.keep_zeros(nn.Linear(3, 3))
    with pytest.raises(BadInput, match="meta device"):
        rac_engine.keep_zeros(nn.Linear(3, 3, device="meta"))


def tuned(source: Path, folder: Path) -> Path:
    """The checkpoint `source`, loaded by transformers, every weight moved, and saved in one file."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", PruneSettings(method="magnitude", sparsity=0.6, dense=[".*layers.0.mlp.down_proj"])),
        ("qwen3", PruneSettings(method="magnitude", pattern="2:4", also=["embeddings"])),
        ("qwen3_moe", PruneSettings(method="magnitude", sparsity=0.5)),
        ("gpt_oss", PruneSettings(method="magnitude", sparsity=0.5)),
    ],
)
def test_zeros_are_put_back_and_all_else_is_as_trained(
    tmp_path: Path, family: str, settings: PruneSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = rac_engine.prune(tiny.save(tmp_path / "model", family), tmp_path / "pruned", settings).out
    target, out = tuned(pruned, tmp_path / "tuned"), tmp_path / "out"
    assert main(["mask", "apply", str(pruned), str(target), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: ") and "put back" in said
    source, trained, made = Checkpoint.open(pruned), Checkpoint.open(target), Checkpoint.open(out)
    assert made.tensors.keys() == trained.tensors.keys()
    rows = [json.loads(line) for line in (out / "rac" / "metrics.jsonl").read_text().splitlines()]
    names = {row.get("tensor", row["name"]) for row in rows if row["type"] == "matrix" and "skipped" not in row}
    assert names and all("relative_error" not in row for row in rows)
    for name in made.tensors:
        there = trained.read(name)
        if name in names:
            there[source.read(name) == 0] = 0.0
        assert torch.equal(made.read(name).view(torch.uint8), there.view(torch.uint8)), name
    assert verify(out, target).problems == [] and "put back" in render(out)
    assert (out / "README.md").read_text() == "mine" and not (tmp_path / "out.partial").exists()
    assert apply_masks(out, target, tmp_path / "again").zeros == sum(
        row.get("zeros", 0) for row in rows if "lost" in row
    )


def _without(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _wider(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def _broken(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize(("change", "words"), [(_without, "has no "), (_wider, " in "), (_broken, "holds NaN or Inf")])
def test_another_checkpoint_is_refused_in_a_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, torch.Tensor], str], None],
    words: str,
) -> None:
    settings = PruneSettings(method="magnitude", sparsity=0.5)
    pruned = rac_engine.prune(tiny.save(tmp_path / "model"), tmp_path / "pruned", settings).out
    target = tuned(pruned, tmp_path / "tuned")
    tensors, name = load_file(target / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    change(tensors, name)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    assert main(["-q", "mask", "apply", str(pruned), str(target), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and words in line
    assert main(["-q", "mask", "apply", str(target), str(target), str(tmp_path / "out")]) == 2
    assert "output folder of `rac prune`" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_an_unfinished_job_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    settings = PruneSettings(method="magnitude", sparsity=0.5)
    pruned = rac_engine.prune(tiny.save(tmp_path / "model"), tmp_path / "pruned", settings).out
    (tmp_path / "out.partial" / "rac").mkdir(parents=True)
    (tmp_path / "out.partial" / "rac" / "journal.jsonl").write_bytes((pruned / "rac" / "journal.jsonl").read_bytes())
    with pytest.raises(BadInput, match="unfinished job"):
        apply_masks(pruned, pruned, tmp_path / "out")
    assert (tmp_path / "out.partial" / "rac" / "journal.jsonl").exists()
    made = apply_masks(pruned, pruned, tmp_path / "out", restart=True)
    assert made.lost == 0 and verify(made.out, pruned).problems == []
