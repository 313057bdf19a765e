"""csrc/cuda compiled by the host's compiler under tests/cuda/shim, and run with arrays in and out."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# With products and sums fused as nvcc fuses them.
FLAGS = "-std=c++20 -O1 -g -march=native -ffp-contract=fast -pthread -fno-strict-aliasing -Wall -Wextra -Werror"
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "races": ["-fsanitize=thread"],
}


@dataclass(frozen=True)
class Program:
    """tests/cuda/run.cpp with the kernels."""

    path: Path

    def run(self, *arguments: int | str, arrays: list[Tensor], processors: int = 2) -> tuple[bytes, str]:
        """What it wrote, and what the sanitizers said."""
        done = subprocess.run(
            [self.path, *map(str, arguments)],
            input=b"".join(array.numpy().tobytes() for array in arrays),
            capture_output=True,
            env=os.environ | {"SHIM_MULTIPROCESSORS": str(processors)},
            timeout=300,
        )
        said = done.stderr.decode()
        assert done.returncode == 0 or said, "the launch was refused"
        return done.stdout, said


def build(folder: Path, sanitizer: str, changed: Path | None = None, rest: Path | None = None) -> Program:
    """Compiles the kernels with one of the SANITIZERS; or only a changed source, the others' objects lie in `rest`."""
    command = ["g++", *FLAGS.split(), "-Wno-unknown-pragmas", *SANITIZERS[sanitizer]]
    command += [f"-I{ROOT / 'tests' / 'cuda' / 'shim'}", f"-I{ROOT / 'csrc'}"]
    sources = [changed] if changed else [ROOT / "tests" / "cuda" / "run.cpp", *SOURCES]
    jobs = [
        subprocess.Popen(
            [*command, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o"], stderr=subprocess.PIPE, text=True
        )
        for source in sources
    ]
    for job in jobs:
        assert job.wait() == 0, job.communicate()[1]
    objects = {path.name: path for place in (rest, folder) if place for path in place.glob("*.o")}
    subprocess.run([*command, *objects.values(), "-o", folder / sanitizer], check=True)
    return Program(folder / sanitizer)


@dataclass(frozen=True)
class Factored:
    H: Tensor
    inverse: Tensor
    status: list[int]
    said: str


def factor_corner(
    program: Program, H: Tensor, lo: int, hi: int, status: list[int] | None = None, pulls: Tensor | None = None
) -> Factored:
    """`rac_cuda_factor_corner` on H [matrices, n, n or more], its inverses amid NaN."""
    matrices, size = len(H), hi - lo
    pulls = torch.empty(matrices, 0, hi, size) if pulls is None else pulls
    inverse = torch.full((matrices, size + 1, size + 3), torch.nan)
    before = torch.tensor(status or [0] * matrices, dtype=torch.int32)
    layout = [H.numel(), H.stride(1), H.stride(0), lo, size]
    layout += [pulls.numel(), pulls.shape[1], pulls.stride(1), pulls.stride(2), pulls.stride(0)]
    layout += [inverse.numel(), inverse.stride(1), inverse.stride(0)]
    out, said = program.run("factor", *layout, matrices, arrays=[H, pulls, inverse, before])
    if not out:
        return Factored(H, inverse, [], said)
    floats = torch.frombuffer(bytearray(out[: -4 * matrices]), dtype=torch.float32)
    after = torch.frombuffer(bytearray(out[-4 * matrices :]), dtype=torch.int32)
    return Factored(
        floats[: H.numel()].view_as(H), floats[H.numel() :].view_as(inverse), [int(some) for some in after], said
    )


@dataclass(frozen=True)
class Selected:
    thresholds: list[float]
    last: list[int]
    said: str


def select(
    program: Program, scores: Tensor, counts: list[int], ks: list[int], processors: int = 2, times: int = 2
) -> list[Selected]:
    """`rac_cuda_select`, as often on the same state."""
    groups = [number for pair in zip(counts, ks, strict=True) for number in pair]
    out, said = program.run("select", times, scores.numel(), *groups, arrays=[scores], processors=processors)
    found = []
    for first in range(0, len(out), 12 * len(counts)):
        one = bytearray(out[first : first + 12 * len(counts)])
        thresholds = torch.frombuffer(one, dtype=torch.float32, count=len(counts))
        last = torch.frombuffer(one[4 * len(counts) :], dtype=torch.int64)
        found.append(Selected(thresholds.tolist(), last.tolist(), said))
    return found or [Selected([], [], said)]
