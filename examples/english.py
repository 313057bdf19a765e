"""English for the Abacus model: Python's own documentation topics (``pydoc_data``), in splits that share none.

python examples/english.py --split calibration --out english.txt
"""

from __future__ import annotations

import argparse
import hashlib
import pydoc_data.topics

SPLITS = ("train", "calibration", "evaluation")


def english(split: str) -> str:
    """The topics of one split, ASCII only: 80% train, 10% calibration, 10% evaluation by a hash of the topic's name."""
    texts = []
    for name, text in sorted(pydoc_data.topics.topics.items()):
        bucket = hashlib.sha256(name.encode()).digest()[0]
        if split == ("train" if bucket < 205 else "calibration" if bucket < 231 else "evaluation"):
            texts.append("".join(c for c in text if c == "\n" or " " <= c <= "~").strip())
    return "\n\n".join(texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--out", required=True, help="text file to write")
    args = parser.parse_args()
    with open(args.out, "w", encoding="ascii") as file:
        file.write(english(args.split))


if __name__ == "__main__":
    main()
