"""Prompts for a small general chat model: arithmetic, general questions and short instructions, in two splits.

A prompt is a template with its places filled; the same seed gives the same prompts. A prompt belongs to exactly one
split, decided by a hash of its text, so that what is measured on was never calibrated on.

    python benchmarks/real_prompts.py --split calibration --count 300 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

SPLITS = ("calibration", "held-out")

TRIES = 10_000  # without a new prompt, after which there are no more

PEOPLE = ("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena")

THINGS = ("apples", "books", "pencils", "stamps", "marbles", "tickets", "eggs", "cards", "shells", "bottles")

TOPICS = (
    "photosynthesis", "gravity", "inflation", "the water cycle", "evolution", "electricity", "vaccines", "volcanoes",
    "the French Revolution", "black holes", "supply and demand", "the Roman Empire", "plate tectonics", "sound waves",
    "the immune system", "democracy", "rainbows", "the printing press", "magnetism", "the Silk Road", "fermentation",
    "glaciers", "the human heart", "computer memory", "bridges", "tides", "the stock market", "sleep", "bees", "steel",
    "prime numbers", "coral reefs", "the Moon", "paper", "earthquakes", "compilers", "the alphabet", "batteries",
)  # fmt: skip

ACTIVITIES = (
    "bake bread", "plant tomatoes", "learn to swim", "write a short story", "change a bicycle tyre", "paint a room",
    "prepare for an exam", "train a puppy", "make a budget", "clean a window", "brew tea", "start running",
    "take better photographs", "read a map", "mend a shirt", "cook rice", "learn a language", "build a kite",
)  # fmt: skip

PLACES = (
    "Brazil", "Japan", "Kenya", "Norway", "India", "Canada", "Egypt", "Peru", "Turkey", "Vietnam", "Portugal", "Poland",
    "New Zealand", "Morocco", "Mexico", "Greece", "Ireland", "Thailand", "Chile", "Hungary",
)  # fmt: skip

OBJECTS = (
    "an umbrella", "a lighthouse", "an old clock", "a violin", "a garden", "a train station", "a lost key", "a kitchen",
    "a mountain lake", "a library", "a sailing boat", "a winter morning", "a market", "a desert", "a telescope",
)  # fmt: skip


def arithmetic(rng: random.Random) -> str:
    """A sum, a product, or a problem in words."""
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 12)
    who, other = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    return rng.choice(
        (
            f"What is {a} + {b}?",
            f"Calculate {a} * {c} and explain each step.",
            f"{who} has {a} {thing} and buys {b} more. How many {thing} does {who} have now?",
            f"{who} has {a + b} {thing} and gives {a} of them to {other}. How many are left?",
            f"A box holds {c} {thing}. How many {thing} are in {a} boxes? Think step by step.",
            f"{who} shares {a * c} {thing} equally among {c} friends. How many does each friend get?",
            f"What is {c * 5}% of {a * 10}?",
            f"A train travels {a} km in an hour. How far does it travel in {c} hours? Show your work.",
            f"Which is larger, {a}/{b} or {b}/{a + c}? Explain why.",
            f"Solve for x: {c}x + {a} = {a + b * c}.",
        )
    )


def question(rng: random.Random) -> str:
    """A question of general knowledge."""
    topic, place, other = rng.choice(TOPICS), *rng.sample(PLACES, 2)
    return rng.choice(
        (
            f"What is {topic}?" if not topic.endswith("s") else f"What are the most important facts about {topic}?",
            f"Explain {topic} to a ten-year-old.",
            f"Why does {topic} matter in daily life?",
            f"What are three common mistakes people make about {topic}?",
            f"How did people find out about {topic}?",
            f"What is the capital of {place}, and what is it known for?",
            f"What food is typical of {place}?",
            f"How do the climates of {place} and {other} differ?",
            f"What should a visitor to {place} know before the journey?",
            f"Which languages are spoken in {place}?",
        )
    )


def instruction(rng: random.Random) -> str:
    """A short task of writing."""
    activity, thing, who = rng.choice(ACTIVITIES), rng.choice(OBJECTS), rng.choice(PEOPLE)
    topic, place = rng.choice(TOPICS), rng.choice(PLACES)
    return rng.choice(
        (
            f"List five steps to {activity}.",
            f"Give me three tips for someone who wants to {activity}.",
            f"Write a short poem about {thing}.",
            f"Describe {thing} in four sentences.",
            f"Write a polite email in which {who} asks a colleague for help with a report on {topic}.",
            f"Write a short story about {who} and {thing}.",
            f"Summarize what you know about {topic} in two sentences.",
            f"Write a dialogue between {who} and a teacher about {topic}.",
            f"Make a packing list for a week in {place}.",
            f"Suggest a title and a first sentence for an article about {topic}.",
        )
    )


KINDS: dict[str, Callable[[random.Random], str]] = {
    "arithmetic": arithmetic,
    "question": question,
    "instruction": instruction,
}


def split_of(prompt: str) -> str:
    """The split of a prompt: one in four is held out."""
    return SPLITS[hashlib.sha256(prompt.encode()).digest()[0] < 64]


def prompts(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different prompts of a split, the kinds in turn, each with an `id` and its `kind`.

    Raises `ValueError` where there are not so many.
    """
    rng, found, tries = random.Random(seed), dict[str, str](), 0
    while len(found) < count:
        kind = list(KINDS)[len(found) % len(KINDS)]
        prompt, tries = KINDS[kind](rng), tries + 1
        if split_of(prompt) == split and prompt not in found:
            found[prompt], tries = kind, 0
        if tries == TRIES:
            raise ValueError(f"{split}: only {len(found)} different prompts were found")
    return [{"id": f"{split}-{n}", "kind": kind, "prompt": text} for n, (text, kind) in enumerate(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--count", type=int, default=300, help="prompts (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    args = parser.parse_args()
    lines = [json.dumps(prompt) for prompt in prompts(args.split, args.count, args.seed)]
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
