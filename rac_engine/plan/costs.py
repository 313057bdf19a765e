"""Bytes of what exists while inputs are observed, matrices solved and blocks tuned."""

from __future__ import annotations

import math

import torch

from rac_engine.calibrate import BATCH, STEPS
from rac_engine.plan.shapes import Input, Shape, Stage
from rac_engine.recipe import PruneSettings
from rac_engine.solve import TOGETHER, find_method
from rac_engine.solve.methods import admm
from rac_kernels.backends import native
from rac_kernels.ops.factor import EXACT as FACTORED_IN_FP64
from rac_kernels.ops.inverse import side_of
from rac_kernels.ops.objective import COLUMNS
from rac_kernels.ops.objective import ROWS_BYTES as OBJECTIVE_BYTES
from rac_kernels.solvers.refine import ELEMENTS, EXACT_ELEMENTS, ROWS, solves_exactly

# Measured as resident memory: Python, torch and transformers with nothing to do; what libraries and the heap keep for
# themselves as soon as they compute, and for each thread up to eight, with linear algebra and without it, and how much
# less of it where oneDNN multiplies nothing; what CUDA's libraries keep on the device, and its context and libraries of
# the host.
PROGRAM_BYTES = 560 << 20

WORKSPACE_BYTES = {True: (33 << 20, 2 << 20), False: (18 << 20, 1 << 19)}

UNUSED_BYTES = {True: 16 << 20, False: 10 << 20}

FILE_BYTES = 40 << 20  # of libraries' files, as many more pages as the system happens to map at a time

CUDA_WORKSPACE_BYTES = 96 << 20

CUDA_HOST_BYTES = 2 << 30

TOKEN_BYTES = 24  # id as it was read and as it is packed, a weight, and a checksum

SCORES = 6  # fp64 copies of the rows whose scores are counted in the first pass

PACKED_BYTES = 8 << 20  # of tokens as the CPU's sums take them, at a time, but a run of them at least:

PACKED_RUN = 1024  # bytes a column

MATCHED_ROWS = 4096  # of the weights that match, made at a time

# Bytes a weight in fp32 and bf16, all that a solver holds at a time: the sweep's and ADMM's on a CPU and on a GPU, what
# ADMM leaves beside the refined ones, and in the refinement of some rows, by torch and in native code; of mask and
# scores alone.
SWEEPING = {False: 10, True: 8}

COPIES = {"admm": {False: 23, True: 20}, "alps": {False: 32, True: 32}}

REFINED, REFINING, REFINING_NATIVE, REFINING_EXACTLY = 12, 58, 28, 40

SCORING, MEASURING = 16, 10

EXACT = 20  # of H's elements, where a CPU factors in fp64

EIGENSOLVER = 12  # of H's elements, beside H, scaled H and the vectors, that an eigendecomposition asks for

# Of a block that is tuned: bytes a weight (in fp32 itself, its gradient, two means and more), and fp32 copies of a
# token's hidden states, of queries, keys and values, and of scores where they are in the open.
TUNED_WEIGHTS, TUNED_HIDDEN, TUNED_QUERIES, TUNED_SCORES = 20, 8, 2, 4

GATHERED = {"hessian": "Hessian", "norms": "norms", "nothing": "nothing"}


def gathered_bytes(stage: Stage, method: str, tied: bool, together: int | None) -> int:
    """Bytes of what is gathered in one pass over the tokens, at most."""
    shared = [found for found in stage.inputs if found.count == 1]
    sizes = [found.tied(method) if tied else found.statistic(method) for found in shared]
    total = sum(sizes)
    for experts in (found for found in stage.inputs if found.count > 1):
        own = experts.tied(method) if tied else experts.statistic(method)
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
    if found.attention:
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


def solving_bytes(found: Input, settings: PruneSettings, size: int, tied: bool, on_gpu: bool) -> dict[str, int]:
    """Bytes of what exists while the matrices of an input are pruned."""
    rows, n, largest = found.rows, found.columns, found.largest * found.columns
    # Solved together; `prune_matrices` takes larger ones one after the other.
    some = min(rows * n, max(largest, TOGETHER))
    stacked = some * size if some > largest else 0
    moved = rows * n * size if on_gpu else 0
    if find_method(settings.method).needs != "hessian":
        scoring = SCORING * some if find_method(settings.method).needs == "norms" else MEASURING * largest
        solving = stacked + max(scoring, some * (size + 1))
        return {"fp32 working copies": moved + (rows * n - some) * size + solving}
    one, work = 4 * some, dict[str, int]()
    exactly = not on_gpu and n <= FACTORED_IN_FP64 and (tied or settings.method != "admm")
    exact = EXACT * n * n if exactly else 0
    if settings.method in COPIES:
        solving = COPIES[settings.method][on_gpu] * some
        if settings.method == "admm":
            solving += 2 * n * n + 12 * side_of(n) * n  # what the steps multiply by, and bands of it
        solving = max(solving, REFINED * some + _refining(found, settings, some // n, on_gpu))
    else:
        solving = SWEEPING[on_gpu] * some
    if settings.method == "alps":
        work["H, scaled, its eigenvectors and an inverse"] = 16 * n * n
        solving = max(solving, EIGENSOLVER * n * n)
    matching = chosen = cross = 0
    if tied:
        chosen, cross = one, 0 if found.by_outputs else 4 * largest
        shared = 0 if found.by_outputs else one
        matching = stacked + shared + max(shared, chosen + 3 * 4 * min(some, MATCHED_ROWS * n))
    measuring = rows * n * size + cross
    together = min(found.largest, max(OBJECTIVE_BYTES // (8 * n), 1))  # rows in fp64, times some of H's columns
    products = 8 * together * n + 8 * COLUMNS * (3 * together + 2 * min(COLUMNS, n) + n)
    measuring += max(cross, MEASURING * largest, 24 * together * n, products)
    # One after the other: factor, match, solve, round, and measure what was solved.
    solving = max(exact + stacked, matching, stacked + chosen + solving, chosen + one + some * size)
    by_runs = found.matrices == 1 and found.largest < rows  # of its rows, joined in the end
    joining = 2 * rows * n * size if by_runs else 0
    work["fp32 working copies"] = moved + max((rows * n - some) * size + solving, measuring, joining)
    return work


def tuning_bytes(shape: Shape, stage: Stage, tokens: int, chunk: int, longest: int) -> dict[str, int]:
    """Bytes of what exists while the block that a stage ends is tuned, all in fp32."""
    last, attention = stage.inputs[-1], shape.attention
    weights = stage.before + sum(found.weights for found in stage.inputs)
    batch = min(max(BATCH, tokens // STEPS, longest), chunk)
    between = last.inner * last.columns
    if last.attention:
        between = TUNED_QUERIES * (attention.queries + attention.key_values)
        if attention.open or attention.window is not None:
            between += TUNED_SCORES * min(longest, chunk) * attention.queries // attention.head
    kept = 4 * batch * (TUNED_HIDDEN * shape.hidden + between)
    return {
        "weights in fp32, gradients and their means": TUNED_WEIGHTS * weights,
        "activations of a batch and their gradients": kept,
    }


def _refining(found: Input, settings: PruneSettings, rows: int, on_gpu: bool) -> int:
    """Bytes that the refinement of some rows takes beside what it is given and returns."""
    n = found.columns
    device = torch.device("cuda" if on_gpu else "cpu")
    some = min(rows, ROWS, max(ELEMENTS[device.type] // n, 1)) * n
    kept = math.ceil((1 - settings.sparsity) * n)  # in the mean; the row that keeps most has half as many again
    exactly = REFINING_EXACTLY * min(EXACT_ELEMENTS, some // n * (3 * kept // 2) ** 2)
    in_torch = on_gpu or not native.available()
    each = REFINING * some if in_torch else REFINING_NATIVE * some + 2 * n * n  # and what the steps multiply by
    return each + (exactly if solves_exactly(kept, n, admm.REFINING_STEPS, device) else 0)
