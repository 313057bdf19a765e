"""The command line of scripts that run in another tool's environment: JSON files for what is asked and found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def answer(description: str, what: str, choices: Mapping[str, Callable[[Path, dict[str, Any]], Any]]) -> None:
    """Run the one of `choices` that the command line names as `what`, on a model's folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(what, choices=choices)
    parser.add_argument("model", type=Path)
    parser.add_argument("--given", type=Path, required=True, help="JSON file: what is asked")
    parser.add_argument("--found", type=Path, required=True, help="JSON file to write: what was found")
    args = parser.parse_args()
    found = choices[getattr(args, what)](args.model.resolve(), json.loads(args.given.read_text()))
    args.found.write_text(json.dumps(found) + "\n")
