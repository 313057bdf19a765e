"""What the job and its layers share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PruneReport:
    """What a job made. `run`, `matrices` and `end` are the lines of `out`/rac/metrics.jsonl."""

    out: Path
    run: dict[str, Any]
    matrices: list[dict[str, Any]]
    end: dict[str, Any]
    resumed: int
    """Layers that were found finished by an earlier, interrupted job."""
