"""Bytes of what exists while inputs are observed, matrices solved and blocks tuned, and of the program itself."""

from __future__ import annotations

import torch

from rac_engine.calibrate import (
    PIECE,
    attention_inner,
    batch_tokens,
    learning_bytes,
    learning_files,
    step_tokens,
    tuning_bytes,
)
from rac_engine.models import LOGIT_ROWS
from rac_engine.plan.shapes import Input, Shape, Stage
from rac_engine.recipe import PruneSettings
from rac_engine.solve import GroupShape, Needs, solving_bytes

# Measured as resident memory: Python, torch and transformers with nothing to do; what libraries and the heap keep for
# themselves as soon as they compute, and for each thread up to eight, with linear algebra and without it, and how much
# less of it where oneDNN multiplies nothing; what CUDA's libraries keep on the device, and its context and libraries of
# the host.
PROGRAM_BYTES = 560 << 20

WORKSPACE_BYTES = {True: (28 << 20, 2 << 20), False: (18 << 20, 1 << 19)}

UNUSED_BYTES = {True: 16 << 20, False: 10 << 20}

FILE_BYTES = 40 << 20  # of libraries' files, as many more pages as the system happens to map at a time

CUDA_WORKSPACE_BYTES = 96 << 20

CUDA_HOST_BYTES = 2 << 30


def device_of(on_gpu: bool) -> torch.device:
    """The kind of device that computes."""
    return torch.device("cuda" if on_gpu else "cpu")


def gathered_bytes(stage: Stage, needs: Needs, tied: bool, together: int | None) -> int:
    """Bytes of what is gathered in one pass over the tokens, at most."""
    sizes = [found.gathered(needs, tied) for found in stage.inputs if found.count == 1]
    total = sum(sizes)
    for experts in (found for found in stage.inputs if found.count > 1):
        own = experts.gathered(needs, tied)
        # That of all tokens may be with them: the shared experts', or at the entrance what scarce ones blend with.
        everyone = bool(sizes) or experts.entrance
        some = experts.count if together is None else min(experts.count, max(together - everyone, 1))
        total = max([own, *sizes]) * everyone + own * some
    return total


def observing_bytes(shape: Shape, found: Input, chunk: int, longest: int, tied: bool, on_gpu: bool) -> int:
    """Bytes of what exists of a chunk while an input is computed from the hidden states."""
    size, hidden = shape.size, shape.hidden
    own, norm = chunk * hidden * size, chunk * hidden * 8
    if found.entrance:
        return max(norm + own, 2 * own) if tied else max(norm, own)
    if found.recurrent:
        inside = shape.recurrent.passing(shape, chunk, found.columns)
    elif found.attention:
        inside = shape.attention.passing(shape, chunk, longest, on_gpu)
    else:
        inside = chunk * size * (hidden * (3 if found.count > 1 else 1) + found.inner * found.columns)
    if not tied:
        return max(norm, inside)
    kept = chunk * size * found.columns
    if not found.last:
        return max(norm + own, 2 * inside)
    # One model's after the other's, and then what the dense one gives and lacks, in fp32.
    return max(own + kept + inside, 4 * own + kept + 12 * chunk * hidden)


def pruning_bytes(
    found: Input, settings: PruneSettings, size: int, tied: bool, on_gpu: bool, judged: bool
) -> dict[str, int]:
    """Bytes by purpose of what exists while the matrices of an input are pruned, of `size` bytes a weight on disk."""
    group = GroupShape(
        rows=found.rows,
        columns=found.columns,
        largest=found.largest,
        by_runs=found.matrices == 1 and found.largest < found.rows,
        weight_size=size,
        sparsity=settings.sparsity,
        device=device_of(on_gpu),
        matched=tied,
        rounded=settings.values != "same",
        by_outputs=found.by_outputs,
        chooses=judged and chooses_damping(settings),
    )
    return solving_bytes(group, settings.solver)


def chooses_damping(settings: PruneSettings) -> bool:
    """Whether a damping is chosen wherever tokens are held out to choose it by."""
    return settings.damping is None and settings.solver.damped_by_error


def tuned_bytes(
    shape: Shape, stage: Stage, tokens: int, chunk: int, longest: int, on_grid: bool = False
) -> dict[str, int]:
    """Bytes by purpose of what exists while the block that a stage ends is tuned, all in fp32.

    `on_grid`: whether kept weights are to stay on a grid.
    """
    weights = stage.before + sum(found.weights for found in stage.inputs)
    size = min(max(step_tokens(tokens), longest), chunk)
    inner = _inner_elements(shape, stage.inputs[-1], chunk, longest)
    return tuning_bytes(weights, size, shape.hidden, inner, on_grid)


def recovery_bytes(shape: Shape, settings: PruneSettings, tokens: int, chunk: int, longest: int) -> dict[str, int]:
    """Bytes by purpose of what exists while the whole model learns, beside a layer and what is kept of the tokens."""
    size = min(max(batch_tokens(tokens), longest), max(chunk, PIECE))
    inner = sum(_inner_elements(shape, found, chunk, longest) for found in shape.inputs if _ends_block(found))
    own = shape.layer_bytes // shape.weight_size
    made = learning_bytes(own, 1 - settings.sparsity, shape.size, min(size, max(PIECE, longest)), shape.hidden, inner)
    table = shape.vocabulary * shape.hidden * shape.size
    return {
        **made,
        "embeddings and lm_head": shape.embedding_bytes + table,
        "logits": 16 * LOGIT_ROWS * shape.vocabulary,
    }


def recovery_files(shape: Shape, settings: PruneSettings) -> int:
    """Bytes of the files that hold the weights of a model that learns, at most."""
    return min(settings.recover, 3) * learning_files(shape.weights, 1 - settings.sparsity)


def _ends_block(found: Input) -> bool:
    return found.last or found.count > 1


def _inner_elements(shape: Shape, last: Input, chunk: int, longest: int) -> int:
    """Elements that a token has between the entrance of the block that an input ends and its exit, and gradients."""
    attention = shape.attention
    if last.recurrent:
        return shape.recurrent.token // 2  # of what is made, kept for the gradient, and the gradient's own
    if not last.attention:
        return last.inner * last.columns
    in_the_open = attention.open or attention.window is not None
    scores = min(longest, chunk) * attention.queries // attention.head if in_the_open else 0
    return attention_inner(attention.queries, attention.key_values, scores)
