"""The files beside the weights of a packed folder: config.json, model card, and the folder `rac`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rac_engine.base.files import copy_file, disk_errors, write_file
from rac_engine.base.jsonfiles import read_json
from rac_engine.base.sizes import format_bytes
from rac_engine.checkpoint import METHOD, VERSION, Checkpoint, inside
from rac_engine.jobs.journal import Journal, records_of
from rac_engine.jobs.layout import CARD, MANIFEST, METRICS, PACK, PACK_JOURNAL, PRUNE_JOURNAL, RAC
from rac_engine.pack.sizes import PackReport

CONFIG = "config.json"

_BEGIN, _END = "<!-- packed: begin -->\n", "<!-- packed: end -->\n\n"
_BEFORE = "## Use\n"  # the part of a card that the packed form's own stands before


def packed_config(text: str, values: str) -> str:
    """A config.json that says that matrices are packed, with all else as it is, byte for byte."""
    return text.replace("{", "{" + _section(values), 1)


def plain_config(checkpoint: Checkpoint, values: str) -> bytes:
    """The config.json from which a packed one was made; where it was edited, one of the same content."""
    text = inside(checkpoint.path, CONFIG).read_text()
    section = _section(values)
    return text.replace(section, "", 1).encode() if section in text else checkpoint.copied_file(CONFIG)


def _section(values: str) -> str:
    said = json.dumps({"quant_method": METHOD, "version": VERSION, "values": values})
    return f'\n  "quantization_config": {said},'


def packed_card(card: str, report: PackReport) -> str:
    """A model card with a part on the packed form."""
    how = "the numbers are the same, bit for bit" if report.exact else "kept values are rounded"
    part = f"""{_BEGIN}## Packed

Pruned matrices are packed: a bit a weight says which are kept, and only those are stored
({report.values}, {report.bits:.2f} bits a weight; {how}). {format_bytes(report.packed)} instead of
{format_bytes(report.dense)}. transformers reads this folder after `import rac_engine`, and `rac unpack` writes the
plain form, of which what is said below of zeros stored in place holds.

{_END}"""
    return card.replace(_BEFORE, part + _BEFORE, 1) if _BEFORE in card else f"{card.rstrip()}\n\n{part}"


def plain_card(card: str) -> str:
    """The model card without the part on the packed form."""
    begin, end = card.find(_BEGIN), card.find(_END)
    return card if begin < 0 or end < begin else card[:begin] + card[end + len(_END) :]


def copy_records(source: Path, folder: Path) -> None:
    """Copy the folder `rac` of a checkpoint, which `folder` may lie in, but for what is made anew."""
    home = source / RAC
    with disk_errors(folder):
        for file in sorted(home.rglob("*")):
            name = str(file.relative_to(source))
            made_anew = name in (f"{RAC}/{MANIFEST}", f"{RAC}/{PACK}", PACK_JOURNAL) or file.is_relative_to(folder)
            if file.is_file() and not made_anew:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(inside(source, name), folder / name)


def rewrite_records(folder: Path, digests: dict[str, str], recount: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Let journal and metrics of a folder tell of rounded matrices.

    digests: SHA-256 of the numbers of each tensor that was rounded. recount: gives a matrix's row of metrics.jsonl as
    it is now.
    """
    journal = folder / PRUNE_JOURNAL
    if journal.is_file() and (records := records_of(journal)):
        journal.unlink()
        again = Journal(journal)
        for record in records:
            if "tensors" in record:
                record["tensors"] |= {name: digests[name] for name in record["tensors"] if name in digests}
            again.append(record)
    metrics = folder / RAC / METRICS
    if metrics.is_file():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        rows = [recount(row) if row.get("type") == "matrix" else row for row in rows]
        with disk_errors(folder):
            write_file(metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())


def values_of(checkpoint: Checkpoint) -> str:
    """How the kept values of a packed checkpoint are stored, by its config.json."""
    said = read_json(inside(checkpoint.path, CONFIG)).get("quantization_config")
    return str(said.get("values")) if isinstance(said, dict) else ""


def write_card(source: Path, folder: Path, change: Callable[[str], str]) -> None:
    """Write the model card of `source` to `folder`, changed, where there is one."""
    if (source / CARD).is_file():
        with disk_errors(folder):
            write_file(folder / CARD, change(inside(source, CARD).read_text()).encode())
