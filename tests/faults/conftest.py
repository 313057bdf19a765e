"""A fork server, a folder of inputs, and what every job gives if nothing goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import Job, contents, make_world

SOAK = bool(os.environ.get("RAC_SOAK"))
"""Every point, instead of a selection."""


class Bench:
    """Runs jobs in a world, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = {job.name: job for job in make_world(folder)}
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), *(path for path in sys.path if path)]),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=root,
        )
        assert self.server.stdout and self.server.stdout.readline() == "ready\n"
        self.expected: dict[str, dict[str, bytes]] = {}
        self.points: dict[str, list[str]] = {}
        """The operations of a job in their order, all but reads, as "OPERATION NAME"."""
        self.reads: dict[str, int] = {}
        for job in self.jobs.values():
            log = folder / f"{job.name}.log"
            assert self.run(job, f"log:{log}") == 0, self.said
            lines = log.read_text().splitlines()
            self.points[job.name] = [line for line in lines if not line.startswith("read ")]
            self.reads[job.name] = len(lines) - len(self.points[job.name])
            self.expected[job.name] = contents(folder / job.out)
            self.clean(job)

    def run(self, job: Job, plans: str = "", *more: str, **order: Any) -> int:
        """The exit status of a job run under `plans`; what it printed is in `said`."""
        assert self.server.stdin and self.server.stdout
        output = self.folder / "said"
        order |= {"argv": [*job.argv, *more], "cwd": str(self.folder), "output": str(output), "plans": plans}
        order |= {"disk": job.disk}
        print(json.dumps(order), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        self.said = output.read_text()
        return status

    def clean(self, job: Job) -> None:
        """Remove the job's output, finished or not."""
        for path in (self.folder / job.out, self.folder / f"{job.out}.partial", self.folder / f"{job.out}.tmp"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def problem(self, job: Job) -> str:
        """What is wrong with the output, which is to be absent or whole; nothing for one that is."""
        out = self.folder / job.out
        if not out.exists():
            return ""
        made, wanted = contents(out), self.expected[job.name]
        if made.keys() != wanted.keys():
            return f"other files: {sorted(made.keys() ^ wanted.keys())}"
        return ", ".join(name for name in wanted if made[name] != wanted[name])

    def mended(self, job: Job) -> str:
        """What is wrong once the job, whatever it was stopped by, is run again: nothing if it ends as it should."""
        if problem := self.problem(job):
            return f"published though not whole: {problem}"
        if not (self.folder / job.out).exists() and (code := self.run(job)):
            return f"does not go on: {code} {self.said}"
        if problem := self.problem(job):
            return f"ends otherwise: {problem}"
        left = [path.name for path in self.folder.glob(f"{job.out}.*")]
        # Of an evaluation killed between its last two steps the journal stays behind, the results being whole.
        return f"left behind: {left}" if left and left != ["answers.json.partial"] else ""

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.kill()
        self.server.wait()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def clean(bench: Bench) -> Iterator[None]:
    yield
    for job in bench.jobs.values():
        bench.clean(job)
