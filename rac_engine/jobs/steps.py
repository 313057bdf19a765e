"""The steps of a `rac run`, read back from its journal."""

from __future__ import annotations

from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import loads
from rac_engine.jobs.layout import RUN_JOURNAL


def step_times(out: Path) -> dict[str, float]:
    """Seconds of the finished steps of a `rac run`, from its journal; nothing for a folder that `rac prune` made."""
    path = out / RUN_JOURNAL
    lines = path.read_bytes().splitlines()[1:] if path.is_file() else []
    try:
        records = [loads(line.partition(b" ")[2]) for line in lines]
        return {str(record["step"]): float(record["seconds"]) for record in records}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: not the journal of a run ({error!r})") from None
