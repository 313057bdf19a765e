"""How much text beside traces: shares of text in the same total of tokens, and what of traces and text is left.

    python benchmarks/shares.py --work build/real --record     # an hour on two cores; stopped, it goes on
    python benchmarks/shares.py --table benchmarks/results/shares-cpu-DATE.json --into benchmarks/README.md

SmolLM2-135M-Instruct and its own traces, as `real.py` makes them in WORK, pruned by the default method. The text is
Python's documentation (`examples/english.py`): its topics are split, and the text that is measured on has none of
those that are calibrated on. A cell is a file in WORK/parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import add_record_options, machine, record_file
from real import HERE, MEASURED, NAME, PACKAGE, Made, require_same_settings, show, zeros_in

from rac_engine.base.sizes import parse_size
from rac_engine.engine import load_metrics
from rac_engine.jobs.layout import RAC

BEGIN, END = "<!-- table of shares.py -->", "<!-- end of the table of shares.py -->"
"""Marks of the table in a page."""
LENGTH = 512
"""Tokens of a piece of text, so that there are enough pieces to hold some out."""


class Shares(Made):
    """Pruned models by their share of text, made part by part."""

    def cells(self) -> list[tuple[str, float]]:
        """Sparsity and share of text of each."""
        return [(sparsity, share) for sparsity in self.args.sparsities for share in self.args.shares]

    def parts(self) -> Iterator[str]:
        """Make everything that is not there, and tell of each part when it is."""
        yield from self.sources()
        self._part("quality-dense", partial(self._quality, self.model))
        for sparsity, share in self.cells():
            found = self._part(_name(sparsity, share), partial(self._cell, sparsity, share))
            yield f"{sparsity}, {share:.0%} text: " + ", ".join(
                f"KL {kind} {found['quality'][kind]['kl']:.3f}" for kind in MEASURED
            )

    def record(self) -> dict[str, Any]:
        """All cells that are there."""
        files = {name: self.work / "parts" / f"{name}.json" for name in (_name(*cell) for cell in self.cells())}
        return {
            "machine": {**machine(), "threads": self.args.threads},
            "model": {"name": NAME, "package": PACKAGE},
            "tokens": self.args.tokens,
            "text": {"sequence_length": LENGTH, "split": "train", "measured": "evaluation"},
            "measured": MEASURED,
            "dense": json.loads((self.work / "parts" / "quality-dense.json").read_text()),
            "cells": [json.loads(file.read_text()) for file in files.values() if file.exists()],
        }

    def _cell(self, sparsity: str, share: float) -> dict[str, Any]:
        """Prune with a share of text, and hold the result against the dense model."""
        text, out = self.work / "text.txt", self.work / "out" / _name(sparsity, share)
        script = [sys.executable, str(HERE.parent / "examples/english.py"), "--split", "train"]
        subprocess.run([*script, "--out", str(text)], check=True)
        out.parent.mkdir(exist_ok=True)
        given = [(str(self._traces("calibration")), 1 - share), (f"text:{text}", share)]
        words = ["--tokens", str(self.args.tokens), "--sequence-length", str(LENGTH)]
        for source, part in given:
            words += ["--calibration", f"{source}:{part:g}"] if part else []
        how = ["--pattern", sparsity] if ":" in sparsity else ["--sparsity", sparsity]
        if not out.exists():  # what is unfinished goes on
            self._run(self._ours("prune", str(self.model), str(out), *words, *how), out.name)
        metrics = load_metrics(out / RAC)
        found = {
            "sparsity": sparsity,
            "share": share,
            **zeros_in(out),
            "mean_error": metrics.mean_error,
            "held_out_error": metrics.held_out_error,
            "quality": self._quality(out),
        }
        shutil.rmtree(out)
        return found


def _name(sparsity: str, share: float) -> str:
    return f"share-{sparsity.replace(':', '-')}-{share:g}"


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a row for each sparsity and share of text."""
    lines = [
        "| sparsity | text | KL held-out traces | KL seen traces | KL text | perplexity held-out, seen, text "
        "| perplexity of text by that of text alone |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = list(MEASURED)
    said = ", ".join(f"{record['dense'][kind]['perplexity']:.2f}" for kind in kinds)
    lines.append(f"| dense | | | | | {said} | |")
    alone = {c["sparsity"]: c["quality"]["text"]["perplexity"] for c in record["cells"] if c["share"] == 1}
    for cell in sorted(record["cells"], key=lambda c: (c["sparsity"], c["share"])):
        quality, least = cell["quality"], alone.get(cell["sparsity"])
        kls = " | ".join(f"{quality[kind]['kl']:.3f} ± {quality[kind]['kl_error']:.3f}" for kind in kinds)
        said = ", ".join(f"{quality[kind]['perplexity']:.2f}" for kind in kinds)
        ratio = "" if least is None else f"{quality['text']['perplexity'] / least:.2f}"
        lines.append(f"| {cell['sparsity']} | {cell['share']:.0%} | {kls} | {said} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="folder of all parts (build/real)")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="environment that opens the GGUF file")
    parser.add_argument("--tokens", type=parse_size, default=29_000, help="calibration tokens (default 29k)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a job (default 2)")
    parser.add_argument("--sparsities", nargs="+", default=["0.6"], metavar="SHARE|N:M")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2, 0.5, 1], help="of text")
    add_record_options(parser)
    args = parser.parse_args()
    if args.table:
        show(table(json.loads(args.table.read_text())), args.into, BEGIN, END)
        return
    args.work, args.peers = args.work.resolve(), args.peers.absolute()
    out = record_file(args, "shares")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    require_same_settings(args)
    made = Shares(args)
    for what in made.parts():
        print(what, flush=True)
        if (args.work / "parts" / "quality-dense.json").exists():
            out.write_text(json.dumps(made.record(), indent=1) + "\n")
    print(table(made.record()))
    print(f"record: {out}")


if __name__ == "__main__":
    main()
