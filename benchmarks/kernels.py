"""The three hot steps against torch's own way, the published loop and llm-compressor, in one run.

    python benchmarks/kernels.py                      # all three, the shapes of a 1.5B model (Qwen2: 1536, 8960)
    python benchmarks/kernels.py sweep --shapes 8960x1536 --repeats 5

Competitors take turns on the same matrices. "Ours faster" is the median over the rounds of their time by ours; "of
limit" the arithmetic that the mathematics needs (`rac_kernels.roofline`) by the time and the peak measured in this run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import common
import published
import torch
from common import Measurement
from torch import Tensor

from rac_kernels import factor_, hessian_accumulate_, objective, roofline, sweep

Peer: TypeAlias = published.LLMCompressor | None

TOKENS = 8192
TARGETS = (("50%", 0.5, None), ("2:4", 0.5, (2, 4)))


def activations(tokens: int, columns: int, device: str) -> Tensor:
    """bf16 [tokens, columns] with a spectrum that falls as a power, scaled by column, as trace activations have."""
    generator = torch.Generator().manual_seed(columns)
    rank = min(columns, 512)
    basis = torch.randn(rank, columns, generator=generator) * torch.arange(1, rank + 1)[:, None] ** -0.5
    x = torch.randn(tokens, rank, generator=generator) @ basis + 0.3 * torch.randn(tokens, columns, generator=generator)
    return (x * torch.rand(columns, generator=generator).add(0.1)).to(device, torch.bfloat16)


def hessian(columns: int, args: argparse.Namespace, peer: Peer) -> list[Measurement]:
    X = activations(TOKENS, columns, args.device)
    H = torch.zeros(columns, columns, device=args.device)
    exact = (X.double().T @ X.double()).triu()
    scale = exact.abs().max().item()

    def error(full: Tensor) -> dict[str, str]:
        return {"error": f"{(full.double().triu() - exact).abs().max().item() / scale:.1e}"}

    extra = {
        "rac_kernels": error(hessian_accumulate_(H.clone(), X)),
        "torch, fp32, full": error(published.hessian_(H.clone(), X)),
    }
    cases: dict[str, common.Case] = {
        "rac_kernels": lambda: hessian_accumulate_(H, X),
        "torch, fp32, full": lambda: published.hessian_(H, X),
    }
    if peer:
        cases[peer.name] = lambda: peer.hessian(H, X)
    return common.measure(
        "hessian",
        f"{TOKENS} tokens, n={columns}",
        cases,
        ours="rac_kernels",
        flops=roofline.hessian_flops(TOKENS, columns),
        peak=args.peaks["bf16"],
        repeats=args.repeats,
        extra=extra,
    )


def factor(columns: int, args: argparse.Namespace, peer: Peer) -> list[Measurement]:
    H = hessian_accumulate_(
        torch.zeros(columns, columns, device=args.device), activations(TOKENS, columns, args.device)
    )
    full = H.triu() + H.triu(1).T
    work = torch.empty_like(H)
    cases: dict[str, common.Case] = {
        "rac_kernels": lambda: factor_(work, 0.01),
        "torch: cholesky, inverse, cholesky": lambda: published.inverse_factor(full),
        "torch: one cholesky": lambda: torch.linalg.cholesky_ex(full),
    }
    # llm-compressor's chain is the three torch calls above, inside its sparsify_weight.
    return common.measure(
        "factor",
        f"n={columns}",
        cases,
        ours="rac_kernels",
        flops=roofline.factor_flops(columns),
        peak=args.peaks["fp32"],
        repeats=args.repeats,
        setup=lambda: work.copy_(H),
    )


def sweeps(
    rows: int, columns: int, args: argparse.Namespace, peer: published.LLMCompressor | None
) -> list[Measurement]:
    X = activations(max(TOKENS, columns), columns, args.device)
    H = hessian_accumulate_(torch.zeros(columns, columns, device=args.device), X)
    generator = torch.Generator().manual_seed(rows)
    W = (torch.randn(rows, columns, generator=generator) * 0.02).to(args.device)
    full = H.triu() + H.triu(1).T
    R = published.inverse_factor(full)
    found: list[Measurement] = []
    factor = factor_(H, 0.01)
    for label, sparsity, pattern in TARGETS:
        ours = (lambda s, p: lambda: sweep(W, factor.U, s, p))(sparsity, pattern)
        plain = (lambda s, p: lambda: published.sweep(W, R, s, p))(sparsity, pattern)
        cases: dict[str, Callable[[], Tensor]] = {"rac_kernels": ours, "published loop": plain}
        if peer:
            cases[peer.name] = (lambda s, p: lambda: peer.sweep(W, R, s, p))(sparsity, pattern)
        results = {name: objective(W, case(), full) for name, case in cases.items()}
        extra = {name: {"objective": f"{value / results['published loop']:.6f}"} for name, value in results.items()}
        found += common.measure(
            "sweep",
            f"{rows}x{columns}, {label}",
            cases,
            ours="rac_kernels",
            flops=roofline.sweep_flops(rows, columns),
            peak=args.peaks["fp32"],
            repeats=args.repeats,
            extra=extra,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=["hessian", "factor", "sweep"], help="hessian, factor, sweep")
    parser.add_argument("--columns", type=int, nargs="+", default=[1536, 8960], help="n for hessian and factor")
    parser.add_argument("--shapes", nargs="+", default=["8960x1536", "1536x8960"], help="ROWSxCOLUMNS for sweep")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON record to write")
    args = parser.parse_args()
    args.peaks = roofline.measure_peaks(args.device)
    peer = published.LLMCompressor.load()
    if peer is None:
        print("llm-compressor is not installed here: left out (make bench installs it in a folder of its own)")
    print(f"measured peaks, {args.device}: " + ", ".join(f"{k} {v:.3g}" for k, v in args.peaks.items()))
    found: list[Measurement] = []
    for op in args.ops:
        before = len(found)
        if op == "hessian":
            for n in args.columns:
                found += hessian(n, args, peer)
        elif op == "factor":
            for n in args.columns:
                found += factor(n, args, peer)
        elif op == "sweep":
            for shape in args.shapes:
                rows, columns = map(int, shape.split("x"))
                found += sweeps(rows, columns, args, peer)
        else:
            parser.error(f"{op} is not one of hessian, factor, sweep")
        print(common.table(found[before:]), flush=True)
    if args.out:
        common.record(args.out, found, peaks=args.peaks)


if __name__ == "__main__":
    main()
