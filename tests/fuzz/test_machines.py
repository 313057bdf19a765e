"""State machines: a journal, a checkpoint's folder and one of traces through any row of changes and damages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import save_file

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.reader import INDEX, Checkpoint
from rac_engine.jobs.journal import Journal, records_of
from rac_engine.jobs.layout import TRACES_SUMMARY
from rac_engine.traces.calibration import load_calibration

EXAMPLES = 500 if os.environ.get("RAC_SOAK") else 15
SETTINGS = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None, database=None)
SETTINGS = settings(SETTINGS, suppress_health_check=list(HealthCheck))


class JournalMachine(RuleBasedStateMachine):
    """What was appended and not cut or damaged is there again, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.journal = Journal(self.folder / "journal.jsonl")
        self.expected: list[dict[str, Any]] = []

    @rule(value=st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=3))
    def append(self, value: dict[str, Any]) -> None:
        self.journal.append(value)
        self.expected.append(value)

    @rule(at=st.integers(0, 10))
    def cut(self, at: int) -> None:
        at = min(at, len(self.expected))
        self.journal.cut(at)
        del self.expected[at:]

    @rule(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage(self, where: float, bit: int) -> None:
        data = bytearray(self.journal.path.read_bytes())
        if data:
            at = int(where * len(data))
            del self.expected[bytes(data[:at]).count(b"\n") :]
            data[at] ^= 1 << bit
            self.journal.path.write_bytes(data)
            self.journal = Journal(self.journal.path)

    @rule(where=st.floats(0, 1))
    def tear(self, where: float) -> None:
        data = self.journal.path.read_bytes()
        kept = data[: int(where * len(data))]
        del self.expected[kept.count(b"\n") :]
        self.journal.path.write_bytes(kept)
        self.journal = Journal(self.journal.path)

    @rule()
    def open_again(self) -> None:
        self.journal = Journal(self.journal.path)

    @invariant()
    def says_what_is_expected(self) -> None:
        assert self.journal.records == self.expected
        assert records_of(self.journal.path) == self.expected

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


class FolderMachine(RuleBasedStateMachine):
    """A checkpoint that opens has exactly its own tensors, whole; any other is refused in words."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
        self.restore()

    @rule()
    def restore(self) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()
        for name, tensor in self.tensors.items():
            save_file({name: tensor}, self.folder / f"{name}.safetensors")
        index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in self.tensors}}
        (self.folder / INDEX).write_text(json.dumps(index))
        (self.folder / "config.json").write_text("{}")

    @rule(
        file=st.sampled_from([INDEX, "config.json", "a.safetensors", "b.safetensors"]),
        where=st.floats(0, 1, exclude_max=True),
        bit=st.integers(0, 7),
    )
    def flip(self, file: str, where: float, bit: int) -> None:
        path = self.folder / file
        data = bytearray(path.read_bytes() if path.is_file() else b"")
        start = min(len(data), 8 + int.from_bytes(data[:8], "little")) if file.endswith(".safetensors") else len(data)
        if start:  # a flip in the values is for checksums to find, and there are none yet
            data[int(where * start)] ^= 1 << bit
            path.unlink()
            path.write_bytes(data)

    @rule(file=st.sampled_from([INDEX, "a.safetensors", "b.safetensors"]), where=st.floats(0, 1))
    def truncate(self, file: str, where: float) -> None:
        path = self.folder / file
        if path.is_file():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[: int(where * len(data))])

    @rule(name=st.sampled_from(["a", "b", "c"]), file=st.sampled_from(["a.safetensors", "../a.safetensors", "/b", ""]))
    def point(self, name: str, file: str) -> None:
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            index["weight_map"][name] = file
        except (ValueError, KeyError, TypeError):
            return
        (self.folder / INDEX).write_text(json.dumps(index))

    @rule(name=st.sampled_from(["a", "b"]), to=st.sampled_from(["b.safetensors", "/dev/zero", "/etc/passwd", ".."]))
    def link(self, name: str, to: str) -> None:
        path = self.folder / f"{name}.safetensors"
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    @invariant()
    def opens_or_is_refused(self) -> None:
        try:
            opened = Checkpoint.open(self.folder)
            found = {name: opened.read(name) for name in opened.tensors}
        except BadInput as error:
            assert str(error)
            return
        for name, tensor in found.items():
            assert tensor.numel() * tensor.element_size() in (24, 8)
            if name in self.tensors and tensor.dtype == self.tensors[name].dtype:
                assert tensor.numel() == self.tensors[name].numel()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


class TracesMachine(RuleBasedStateMachine):
    """A folder of traces gives the tokens that were put there, or is refused in words."""

    names = ("part-00000.parquet", "part-00001.parquet")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.restore()

    @rule()
    def restore(self) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()
        for number, name in enumerate(self.names):
            rows = {"prompt_token_ids": [[number, 1]], "completion_token_ids": [[2 + number, 3, 4]]}
            pq.write_table(pa.table(rows), self.folder / name)
        files = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in self.names}
        (self.folder / TRACES_SUMMARY).write_text(json.dumps({"tokens": 10, "files": files}))

    @rule(
        name=st.sampled_from([*names, TRACES_SUMMARY]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
    )
    def flip(self, name: str, where: float, bit: int) -> None:
        data = bytearray((self.folder / name).read_bytes() if (self.folder / name).exists() else b"")
        if data:
            data[int(where * len(data))] ^= 1 << bit
            (self.folder / name).write_bytes(data)

    @rule(name=st.sampled_from([*names, TRACES_SUMMARY]), where=st.floats(0, 1))
    def truncate(self, name: str, where: float) -> None:
        if (self.folder / name).exists():
            data = (self.folder / name).read_bytes()
            (self.folder / name).write_bytes(data[: int(where * len(data))])

    @rule(name=st.sampled_from(names))
    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    @rule(name=st.sampled_from([*names, "part-00002.parquet"]), other=st.sampled_from(names))
    def copy(self, name: str, other: str) -> None:
        if (self.folder / other).exists():
            (self.folder / name).write_bytes((self.folder / other).read_bytes())

    @invariant()
    def gives_its_tokens_or_is_refused(self) -> None:
        try:
            found = load_calibration(str(self.folder), tokenizer=range(5))
        except BadInput as error:
            assert str(error)
            return
        ids = [token for sequence in found.sequences for token in sequence.token_ids]
        assert ids == [0, 1, 2, 3, 4, 1, 1, 3, 3, 4]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestJournal = JournalMachine.TestCase
TestJournal.settings = SETTINGS
TestFolder = FolderMachine.TestCase
TestFolder.settings = SETTINGS
TestTraces = TracesMachine.TestCase
TestTraces.settings = SETTINGS
