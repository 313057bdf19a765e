"""One target under atheris, in a process of its own: python -m tests.fuzz.drive TARGET RUNS FOLDER"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rac_engine", "json", "yaml"]):
    from rac_engine import checkpoint, recipe, traces  # noqa: F401
    from rac_engine.base import jsonfiles  # noqa: F401
    from rac_engine.jobs import journal  # noqa: F401
from tests.fuzz.targets import MEMORY, attempt, install_watch, make_targets, mutate, peak_memory


def main() -> None:
    name, runs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    files = folder / "files"
    files.mkdir(parents=True)
    target = make_targets(files)[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    install_watch()
    counts, before = {True: 0, False: 0}, peak_memory()

    def one(data: bytes) -> None:
        counts[attempt(target, data)] += 1
        if sum(counts.values()) == runs:  # libFuzzer would end the process without another word
            grown = peak_memory() - before
            print(
                f"{name}: {counts[True]} taken, {counts[False]} refused, {grown >> 20} MiB more at its peak", flush=True
            )
            os._exit(0 if grown < MEMORY else 3)

    def other(data: bytes, size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return bytes(atheris.Mutate(data, size)) if draw.random() < 0.5 else mutate(draw, target)[:size]

    options = ["-max_len=8192", "-rss_limit_mb=4096", "-verbosity=0", f"-artifact_prefix={folder}/found-"]
    atheris.Setup(["fuzz", *options, str(corpus)], one, custom_mutator=other)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
