"""The packed form of a finished job, in the place of the plain one.

It is made in a folder of its own in OUT.partial. Once it is whole and on the disk, that folder gets another name by one
rename: from then on the job is done but for moving its files to the places of the plain ones, which goes on after a
kill wherever it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rac_engine.base import faults
from rac_engine.base.files import disk_errors
from rac_engine.jobs.layout import PACK, PACKED, PACKING, RAC
from rac_engine.jobs.publish import publish
from rac_kernels import Values

Packer = Callable[[Path, Path, Path, Values, Callable[[str], None]], bool]
"""`rac_engine.pack.pack_output`: packs a folder into another one, and says whether that made it smaller."""


def new_packing(partial: Path) -> Path:
    """An empty folder in `partial` to pack its content into."""
    folder = partial / PACKING
    with disk_errors(folder):
        drop_packing(partial)
        folder.mkdir(parents=True)
    return folder


def drop_packing(partial: Path) -> None:
    """Remove the folder of an unfinished packing, if there is one."""
    shutil.rmtree(partial / PACKING, ignore_errors=True)


def is_packed_whole(partial: Path) -> bool:
    """Whether the packed form was finished, and its files have begun to take the places of the plain ones."""
    return (partial / PACKED).exists() or (partial / RAC / PACK).exists()


def take_place(partial: Path) -> None:
    """Let the files of the packed form take the places of the plain ones; can be done again after a crash."""
    if (partial / PACKING).exists():
        publish(partial / PACKING, partial / PACKED)
    made = partial / PACKED
    # The report of the packing goes first: where it lies in its place, the plain form is gone in part.
    files = sorted((file for file in made.rglob("*") if file.is_file()), key=lambda file: (file.name != PACK, file))
    with disk_errors(partial):
        for file in files:
            place = partial / file.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            faults.rename(file, place)
        if made.exists():
            shutil.rmtree(made)


def drop_packed(partial: Path) -> None:
    """Give up a packed form that is damaged; the plain one is made again where it is gone."""
    shutil.rmtree(partial / PACKED, ignore_errors=True)
    (partial / RAC / PACK).unlink(missing_ok=True)
