"""The four kinds of problem that the Abacus model reasons about, and the split that keeps them apart.

Every kind gives a prompt of at most 37 characters, a worked solution that uses only small steps (so that a model of a
few million parameters can follow it), and an answer that a program can check. A problem belongs to exactly one split,
decided by a hash of its prompt alone, so problems for training, calibration and evaluation cannot overlap.

    python examples/problems.py --split calibration --count 400 --seed 1 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

SPLITS = ("train", "calibration", "evaluation")


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` as the user writes it, ``work`` as the model should think, ``answer`` as text."""

    kind: str
    prompt: str
    work: str
    answer: str


def multiply(rng: random.Random) -> Problem:
    """Three digits times two, long multiplication with carries, then a column addition."""
    a, b = rng.randint(100, 999), rng.randint(10, 99)
    lines, partials = [], []
    for digit in (b % 10, b // 10):
        carry, steps, low = 0, [], ""
        for d in (a % 10, a // 10 % 10, a // 100):
            total = d * digit + carry
            steps.append(f"{d}*{digit}+{carry}={total:02d}")
            carry, low = total // 10, str(total % 10) + low
        partials.append(f"{carry}{low}")
        lines.append(f"{a}*{digit}: {' '.join(steps)} >{partials[-1]}")
    top, bottom = "0" + partials[0], partials[1] + "0"
    carry, steps = 0, []
    for x, y in zip(reversed(top), reversed(bottom), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    lines.append(f"{top}+{bottom}: {' '.join(steps)} >{a * b:05d}")
    return Problem("multiply", f"Multiply {a} by {b}.", "\n".join(lines), str(a * b))


def iterate(rng: random.Random) -> Problem:
    """A linear map repeated modulo a small prime, one line a step."""
    p = rng.choice((7, 11, 13))
    a, b, x, times = rng.randint(2, p - 1), rng.randint(1, p - 1), rng.randint(1, p - 1), rng.randint(7, 11)
    prompt = f"From {x} do {a}x+{b} mod {p}, {times} times."
    lines = []
    for i in range(1, times + 1):
        product = a * x
        total = product + b
        lines.append(f"{i}: {a}*{x}={product}+{b}={total}-{total // p * p}={total % p}")
        x = total % p
    return Problem("iterate", prompt, "\n".join(lines), str(x))


def binary(rng: random.Random) -> Problem:
    """To binary by repeated halving; the remainders are read from the last to the first."""
    start = n = rng.randint(1000, 29999)
    lines = []
    while n:
        lines.append(f"{n}/2={n // 2} r{n % 2}")
        n //= 2
    return Problem("binary", f"Write {start} in binary.", "\n".join(lines), f"{start:b}")


def sort(rng: random.Random) -> Problem:
    """Distinct letters in order by selection: take the first, write down the rest, again."""
    rest = "".join(rng.sample(string.ascii_lowercase, rng.randint(12, 15)))
    prompt, lines, done = f"Sort the letters {rest}.", [], ""
    while rest:
        first = min(rest)
        rest = rest.replace(first, "")
        done += first
        lines.append(f"{first} {rest}" if rest else first)
    return Problem("sort", prompt, "\n".join(lines), done)


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "multiply": multiply,
    "iterate": iterate,
    "binary": binary,
    "sort": sort,
}


def split_of(prompt: str) -> str:
    """The one split a prompt belongs to: 80% train, 10% calibration, 10% evaluation."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "train" if bucket < 205 else "calibration" if bucket < 231 else "evaluation"


def problems(split: str, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Problem]:
    """An endless stream of the split's problems, the kinds in turn (with repeats once a kind is used up)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"{split}-{seed}")
    while True:
        for kind in kinds:
            while split_of((problem := KINDS[kind](rng)).prompt) != split:
                pass
            yield problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--count", type=int, required=True, help="distinct problems to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--out", required=True, help="JSONL file to write: problem, answer, kind a line")
    args = parser.parse_args()
    seen: set[str] = set()
    with open(args.out, "w", encoding="utf-8") as file:
        for problem in problems(args.split, args.seed, tuple(args.kinds)):
            if len(seen) == args.count:
                break
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                record = asdict(problem)
                del record["work"]
                record["problem"] = record.pop("prompt")
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
