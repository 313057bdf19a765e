"""Whether the default's masks can be made better: what exchanging weights and alternating steps still gain.

    python benchmarks/masks.py --model examples/abacus --traces TRACES --layers 2

Each matrix is pruned by the default's ADMM and its weights are made the best on the mask. From there on, on the same H,

- `swaps`: in each row, and with a pattern in some groups of each row, the exchange of a weight that stays for one that
  went which lowers the objective most before anything else moves (as SparseSwaps, from the Gram matrix): a new value at
  j takes (r_j + q_i H_ij)² / H_jj off, the loss of i costs q_i² H_ii. Then the weights are refined again.
- `alternate`: all weights take a gradient step scaled by H's diagonal, the largest by |q|·√H_jj stay, and the weights
  are refined again.

Rows (of `alternate`: matrices) for which that raises the objective stay as they were. What is printed is the objective
by that of the start, and the time by that of the ADMM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from solvers import of_model
from torch import Tensor

from rac_engine.solve.methods.admm import REFINING_STEPS, STEPS, TOLERANCE
from rac_kernels import admm_, factor_, mask_by_score, refine, symmetrize_
from rac_kernels.ops.objective import row_objectives
from rac_kernels.ops.pattern import Pattern, parse_pattern

ROUNDS = 10
ROWS = 64  # whose pairs are looked at together
GROUPS = 4  # of a row in which weights are exchanged together


def swapped(Q: Tensor, W: Tensor, H: Tensor, pattern: Pattern | None) -> Tensor:
    """The mask of Q [rows, n] with the best exchange in each row, with a pattern in each of up to GROUPS groups."""
    group = H.shape[0] if pattern is None else pattern[1]
    corners = torch.stack([H[lo : lo + group, lo : lo + group] for lo in range(0, len(H), group)])
    diagonal = H.diagonal().view(-1, group)
    left = ((W - Q) @ H).unflatten(1, (-1, group))
    values = Q.unflatten(1, (-1, group))
    keep = values != 0
    mask = keep.clone()
    for lo in range(0, len(Q), ROWS):
        q, r, kept = values[lo : lo + ROWS], left[lo : lo + ROWS], keep[lo : lo + ROWS]
        change = (q.square() * diagonal + 2 * q * r)[..., None] - (
            r[..., None, :] + q[..., None] * corners
        ).square() / diagonal[:, None]
        change.masked_fill_(~(kept[..., None] & ~kept[..., None, :]), torch.inf)
        least, pair = change.flatten(2).min(2)
        order = least.argsort(1)[:, :GROUPS]
        rows, places = torch.nonzero(least.gather(1, order) < 0, as_tuple=True)
        groups = order[rows, places]
        pairs = pair[rows, groups]
        mask[lo + rows, groups, pairs // group] = False
        mask[lo + rows, groups, pairs % group] = True
    return mask.flatten(1)


def alternated(Q: Tensor, W: Tensor, H: Tensor, sparsity: float, pattern: Pattern | None) -> Tensor:
    """The mask of the weights that are largest after a gradient step."""
    stepped = Q + (W - Q) @ H / H.diagonal()
    return ~mask_by_score((stepped * H.diagonal().sqrt()).abs_(), sparsity, pattern, per="matrix")


def improved(Q: Tensor, W: Tensor, H: Tensor, search: Callable[[Tensor], Tensor], whole: bool) -> tuple[float, float]:
    """The objective after ROUNDS of a search by that before, and the seconds it took."""
    began = time.process_time()
    costs = row_objectives(W, Q, H)
    before = float(costs.sum())
    for _ in range(ROUNDS):
        mask = search(Q)
        new, _ = refine(Q.masked_fill(~mask, 0), H, W, mask, iterations=REFINING_STEPS, tolerance=TOLERANCE)
        found = row_objectives(W, new, H)
        better = (found.sum() < costs.sum()).expand(len(Q)) if whole else found < costs
        Q = torch.where(better[:, None], new, Q)
        costs = torch.where(better, found, costs)
    return float(costs.sum()) / before, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--traces", required=True, help="what calibrates: a traces folder, .jsonl or text:FILE")
    parser.add_argument("--tokens", type=int, default=38_000)
    parser.add_argument("--layers", nargs="+", type=int, help="all by default")
    parser.add_argument("--sparsities", nargs="+", default=["0.7", "0.8", "2:4", "1:4"])
    args = parser.parse_args()
    print("| matrix | sparsity | swaps: objective, time | alternate: objective, time |")
    print("|---|---|---|---|")
    gains: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for name, W, H in of_model(args.model, args.traces, args.tokens):
            if args.layers and not any(f".{layer}." in name for layer in args.layers):
                continue
            W, H = W.float(), symmetrize_(H.clone())
            for asked in args.sparsities:
                pattern = parse_pattern(asked) if ":" in asked else None
                share = 0.0 if pattern else float(asked)
                factor = factor_(H.clone())
                began = time.process_time()
                found = admm_(W, factor, share, pattern, STEPS)
                taken = time.process_time() - began
                damped = H.clone()
                damped.diagonal().copy_(factor.damped)
                Q, _ = refine(found, damped, W, iterations=REFINING_STEPS, tolerance=TOLERANCE)
                cells = []
                for how, search in (
                    ("swaps", partial(swapped, W=W, H=damped, pattern=pattern)),
                    ("alternate", partial(alternated, W=W, H=damped, sparsity=share, pattern=pattern)),
                ):
                    ratio, seconds = improved(Q, W, damped, search, whole=how == "alternate")
                    gains.setdefault((asked, how), []).append(ratio)
                    cells.append(f"{ratio:.4f}, {seconds / taken:.1f}")
                print(f"| {name} | {asked} | {' | '.join(cells)} |", flush=True)
    for (asked, how), ratios in gains.items():
        print(f"{asked}, {how}: {statistics.geometric_mean(ratios):.4f} in the mean, {min(ratios):.4f} at best")


if __name__ == "__main__":
    main()
