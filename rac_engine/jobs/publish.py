"""A finished folder appears by one rename, with a manifest of checksums in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rac_engine.base import faults
from rac_engine.base.errors import BadInput
from rac_engine.base.files import disk_errors, sha256_files, sync, write_file
from rac_engine.jobs.layout import MANIFEST, NOT_IN_MANIFEST, RAC


def write_manifest(folder: Path) -> None:
    """Write rac/manifest.json: SHA-256 and size of every file in `folder` that is final."""
    every = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [name for name in every if not name.startswith(NOT_IN_MANIFEST)]
    files = {
        name: {"sha256": digest, "size": (folder / name).stat().st_size}
        for name, digest in sha256_files(folder, names).items()
    }
    with disk_errors(folder):
        write_file(folder / RAC / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())


def is_published(partial: Path, out: Path) -> bool:
    """Whether the folder `partial` has become `out`."""
    return out.exists() and not partial.exists()


def publish(partial: Path, out: Path) -> None:
    """Let the finished folder `partial` appear as `out`, by one rename, once all its bytes are on the disk.

    An interruption that comes once it has appeared comes too late: the job is done.
    """
    try:
        _publish(partial, out)
    except KeyboardInterrupt:
        if not is_published(partial, out):
            raise
        sync(out.absolute().parent)


def _publish(partial: Path, out: Path) -> None:
    with disk_errors(out):
        for base, _, files in os.walk(partial, topdown=False):
            for name in files:
                sync(Path(base) / name)
            sync(Path(base))
        if os.path.lexists(out):
            raise BadInput(f"{out}: appeared meanwhile; the finished result is in {partial}")
        faults.rename(partial, out)
        sync(out.absolute().parent)
