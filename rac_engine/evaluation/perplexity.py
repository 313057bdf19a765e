"""Perplexity: how well a model predicts the tokens of completions or text, found a decoder layer at a time.

Every layer's weights are read once, and all sequences go through it before the next one comes, as in pruning. So it
takes the memory of one layer and of the tokens' activations, which go to disk where they have to, and a model that does
not fit is judged too. A packed checkpoint is judged by what its weights stand for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rac_engine.base.errors import BadInput
from rac_engine.base.process import resident
from rac_engine.base.sizes import format_bytes
from rac_engine.calibrate import Packing, Storage, Stream, next_token_weights
from rac_engine.engine import device_name, limited_gpu, machine_limits
from rac_engine.evaluation.statistics import mean_of
from rac_engine.models import Model
from rac_engine.plan import MemoryPlan, Tokens, dtype_of, plan_forward
from rac_engine.recipe import TEXT_PREFIX, EvalSettings, PruneSettings
from rac_engine.traces import Calibration, load_calibration, load_tokenizer, require_embedding


def load_sources(model: Model, settings: EvalSettings) -> list[Calibration]:
    """The tokens of each of the `settings`' files: completions behind their prompts, or all tokens of text.

    Raises `BadInput` for a file that is missing, broken or empty, and for tokens that the model lacks.
    """
    found = list[Calibration]()
    if not settings.perplexity:
        return found
    tokenizer = load_tokenizer(model.checkpoint.path)
    embedded = model.checkpoint.tensors[model.family.embedding].shape[0]
    for source in settings.perplexity:
        calibration = load_calibration(
            source,
            part="all" if source.startswith(TEXT_PREFIX) else "completion",
            tokens=settings.perplexity_tokens,
            tokenizer=tokenizer,
            columns=settings.column,
            template_arguments=settings.template_arguments,
            role="perplexity",
        )
        highest = max(int(sequence.token_ids.max()) for sequence in calibration.sequences)
        require_embedding(highest, embedded, f"perplexity {source}")
        if not any(len(each.token_ids) > max(each.prompt_length, 1) for each in calibration.sequences):
            raise BadInput(f"perplexity {source}: holds no token that follows another")
        found.append(calibration)
    return found


def measure(
    model: Model,
    sources: Sequence[Calibration],
    device: str,
    device_memory: int | None,
    host_memory: int | None,
    folder: Path,
    progress: Callable[[Any], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Mean loss and perplexity on each of `sources`, as they stand in results, and notes on how they were found.

    It keeps to `device_memory` and `host_memory`, in bytes; activations that fit in neither lie in `folder`. Raises
    `BadInput` where that is too little, and for a model whose loss is not finite.
    """
    device, begun = device_name(device), resident()
    machine = machine_limits(device, device_memory, host_memory, begun)
    sequences = [
        replace(sequence, source=number) for number, source in enumerate(sources) for sequence in source.sequences
    ]
    lengths = [len(sequence.token_ids) for sequence in sequences]
    plan = plan_forward(model, Tokens(sum(lengths), max(lengths), weighted=True), machine)
    packing = Packing.of(Calibration("", "sequences", "all", sequences), plan.choice.chunk_tokens)
    with limited_gpu(device, device_memory), torch.inference_mode():
        losses = _losses(model, packing, plan, Storage(device, plan.choice.place, folder), progress)
    rows = _by_source(sources, packing, losses)
    for row in rows:
        if not math.isfinite(row["mean_loss"]):
            raise BadInput(
                f"perplexity {row['source']}: {model.checkpoint.path} gives a loss that is no number; its weights, or "
                "what it computes of them, are not finite"
            )
    limits = (("--device-memory", device_memory), ("--host-memory", host_memory))
    kept = [f"{name} {format_bytes(limit)}" for name, limit in limits if limit is not None]
    where = {"device": "on the device", "host": "in memory", "disk": "on disk"}[plan.choice.place]
    note = f"perplexity was found a layer at a time within {' and '.join(kept)}, with activations {where}"
    return rows, [note] if kept else []


def _losses(
    model: Model, packing: Packing, plan: MemoryPlan, storage: Storage, progress: Callable[[Any], None]
) -> Tensor:
    """The loss [tokens] fp32 of each token's next one, in nats; 0 where it has none or that does not count."""
    dtype = dtype_of(model, PruneSettings(), plan.on_gpu)
    stream = Stream(model, packing, dtype, storage)
    for layer, tensors in enumerate(_layers(model, plan.choice.overlap)):
        progress(f"perplexity: layer {layer + 1} of {model.layers}")
        stream.advance_layer(model.build_layer(layer, tensors, dtype, storage.device))
    progress("perplexity: logits")
    counted = next_token_weights(packing) > 0
    found = torch.zeros(len(counted))
    readout = model.readout(dtype, storage.device)
    for chunk, hidden in stream.chunks():
        places = chunk.start + counted[chunk.start : chunk.stop].nonzero()[:, 0]
        wanted = packing.token_ids[places + 1].to(storage.device) if len(places) else places
        for at, logits in readout.logits(hidden[(places - chunk.start).to(storage.device)]):
            some = slice(at, at + len(logits))
            found[places[some]] = functional.cross_entropy(logits, wanted[some], reduction="none").cpu()
    stream.close()
    return found


def _layers(model: Model, ahead: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors of each decoder layer in turn; with `ahead` the next one's are read meanwhile."""

    def read(layer: int) -> dict[str, Tensor]:
        return {name: model.checkpoint.read(name) for name in model.tensor_names(layer)}

    if not ahead:
        yield from map(read, range(model.layers))
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read, 0)
        for layer in range(model.layers):
            tensors = coming.result()
            if layer + 1 < model.layers:
                coming = thread.submit(read, layer + 1)
            yield tensors


def _by_source(sources: Sequence[Calibration], packing: Packing, losses: Tensor) -> list[dict[str, Any]]:
    """The results of each source from the losses [tokens] of all."""
    weights = next_token_weights(packing).numpy() > 0
    values = losses.double().numpy()
    every = [(number, sequence) for number, source in enumerate(sources) for sequence in source.sequences]
    lengths = [len(sequence.token_ids) for _, sequence in every]
    order = sorted(range(len(every)), key=lambda at: -lengths[at])  # as Packing puts them
    starts = itertools.accumulate((lengths[at] for at in order), initial=0)
    spans = {at: slice(start, start + lengths[at]) for at, start in zip(order, starts, strict=False)}
    rows = []
    for number, source in enumerate(sources):
        own = [spans[at] for at, (origin, _) in enumerate(every) if origin == number]
        sums = [(int(weights[span].sum()), float(values[span].sum())) for span in own]
        mean, error = mean_of([(loss, tokens) for tokens, loss in sums])
        rows.append(
            {
                "source": source.source,
                "kind": source.kind,
                "sha256": source.sha256,
                "sequences": len(sums),
                "tokens": sum(tokens for tokens, _ in sums),
                "mean_loss": mean,
                "standard_error": error,
                "perplexity": perplexity(mean),
                "by_sequence": [{"tokens": tokens, "loss": loss} for tokens, loss in sums],
            }
        )
    return rows


def perplexity(mean_loss: float) -> float:
    """e to the power of a mean loss in nats, or the largest number there is."""
    return math.exp(min(mean_loss, math.log(np.finfo(np.float64).max)))


def require_same(sources: Sequence[Calibration], earlier: dict[str, Any], baseline: str) -> None:
    """`BadInput` unless `earlier` results hold the losses on the very tokens of all `sources`."""
    known = {(row["sha256"], len(row["by_sequence"])) for row in earlier.get("perplexity", [])}
    for source in sources:
        if (source.sha256, len(source.sequences)) not in known:
            raise BadInput(
                f"{baseline}: has no perplexity on these tokens of {source.source}; measure both models on the same "
                "file, with the same --perplexity-tokens and tokenizer"
            )


def against(rows: Sequence[dict[str, Any]], earlier: dict[str, Any], baseline: str) -> list[dict[str, Any]]:
    """These rows, each with what it is `against` the earlier results on the same tokens, sequence by sequence."""
    known = {row["sha256"]: row for row in earlier.get("perplexity", [])}
    compared = []
    for row in rows:
        other = known[row["sha256"]]
        pairs = zip(row["by_sequence"], other["by_sequence"], strict=True)
        difference, error = mean_of([(new["loss"] - old["loss"], new["tokens"]) for new, old in pairs])
        compared.append(
            row
            | {
                "against": {
                    "baseline": baseline,
                    "perplexity": other["perplexity"],
                    "loss_difference": difference,
                    "standard_error": error,
                }
            }
        )
    return compared


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of results as aligned text for a terminal, with units."""
    compared = any("against" in row for row in rows)
    head = ["perplexity of", "tokens", "sequences", "mean loss, nats/token", "perplexity"]
    head += ["baseline's", "loss above it, nats/token"] if compared else []
    lines = [head]
    for row in rows:
        line = [Path(row["source"]).name, f"{row['tokens']:,}", f"{row['sequences']:,}"]
        line += [_with_error(f"{row['mean_loss']:.4f}", row["standard_error"]), f"{row['perplexity']:.5g}"]
        if compared:
            other = row["against"]
            line += [f"{other['perplexity']:.5g}"]
            line += [_with_error(f"{other['loss_difference']:+.4f}", other["standard_error"])]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _with_error(shown: str, error: float | None) -> str:
    return shown if error is None else f"{shown} ± {error:.4f}"
