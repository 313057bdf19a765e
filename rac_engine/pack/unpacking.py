"""A packed checkpoint, written with plain weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, write_file
from rac_engine.checkpoint import Checkpoint, CheckpointWriter, is_packed
from rac_engine.jobs.job import FolderJob
from rac_engine.jobs.layout import PACK_JOURNAL
from rac_engine.jobs.publish import write_manifest
from rac_engine.pack.beside import CONFIG, copy_records, plain_card, plain_config, values_of, write_card


@dataclass(frozen=True)
class UnpackReport:
    """What `unpack` made; sizes in bytes of tensors."""

    out: Path
    tensors: int
    """Those that were packed."""
    packed: int
    dense: int


def unpack(
    source: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> UnpackReport:
    """Write the packed checkpoint `source` to the new folder `out` with plain weights.

    What was packed without loss comes back byte for byte, config.json and model card included. Some rows after the
    other are in memory. `out` appears by one rename; a stopped call leaves nothing.

    Raises `BadInput` for a folder that is not packed, and for one whose packed matrices contradict themselves.
    """
    source, out = Path(source), Path(out)
    with FolderJob(out, model=source) as job:
        checkpoint = Checkpoint.open(source)
        if not is_packed(checkpoint.config):
            raise BadInput(f"{source}: is not packed: its config.json names no quant_method of RAC's")
        job.open_journal(
            PACK_JOURNAL,
            {"model": str(source), "values": None},
            restart=restart,
            stopped=lambda: "stopped",
            worthwhile=lambda: False,
        )
        writer = CheckpointWriter(checkpoint, job.partial)
        for name in checkpoint.tensors:
            progress(name)
            writer.copy(name)
        writer.finish()
        with disk_errors(job.partial):
            write_file(job.partial / CONFIG, plain_config(checkpoint, values_of(checkpoint)))
        copy_records(source, job.partial)
        write_card(source, job.partial, plain_card)
        (job.partial / PACK_JOURNAL).unlink()
        write_manifest(job.partial)
        job.publish()
    packed = [info for info in checkpoint.tensors.values() if info.quantized is not None]
    stored = sum(part.nbytes for info in packed if info.quantized is not None for part in info.quantized.parts)
    return UnpackReport(out, len(packed), stored, sum(info.nbytes for info in packed))
