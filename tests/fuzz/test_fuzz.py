"""Files from strangers end in success or in one line: a few hundred inputs here, a hundred thousand in `make soak`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rac_engine.cli.app import main
from tests.fuzz.targets import MEMORY, Target, attempt, install_watch, make_targets, mutate, peak_memory

SOAK = bool(os.environ.get("RAC_SOAK"))
CORPUS = Path(__file__).parent / "corpus"
READ = ("index", "config", "header", "quantized", "parquet", "jsonl", "recipe", "problems")
NAMES = (*READ, "journal", "metrics", "manifest", "answers")
FOUND = Path(os.environ.get("RAC_FOUND", Path(__file__).parents[2] / "build/found"))
"""Where inputs that a soak found wrong are kept, until they are mended and go into the corpus."""
TRIES = 5_000 if SOAK else 40
COVERED = 8_000
"""Inputs of a soak that atheris looks for, guided by coverage, for each target."""


def share(name: str, count: int) -> int:
    """How many of `count` inputs are tried: of what a job left, whose reader goes through the whole output, a part."""
    return count if name in (*READ, "journal") else max(count // 5, 40)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    install_watch()
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def target(targets: dict[str, Target], name: str):
    chosen = targets[name]
    before = chosen.file.read_bytes() if chosen.file.exists() else None
    yield chosen
    chosen.file.unlink(missing_ok=True)
    if before is not None:
        chosen.file.write_bytes(before)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_taken(target: Target) -> None:
    """So that what is near them goes deep into the reader."""
    assert all(attempt(target, seed) for seed in target.seeds)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_once_stays_mended(target: Target, name: str) -> None:
    files = sorted((CORPUS / name).glob("*"))
    assert files
    for file in files:
        attempt(target, file.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_near_the_seeds(target: Target, name: str) -> None:
    draw, taken, before, tries = random.Random(1), 0, peak_memory(), share(name, TRIES)
    for _ in range(tries):
        data = mutate(draw, target)
        try:
            taken += attempt(target, data)
        except BaseException:
            FOUND.mkdir(parents=True, exist_ok=True)
            (FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            print(f"\n{name}: {data[:3000]!r}")
            raise
    print(f"\n{name}: {taken} of {tries} inputs taken, the others refused")
    assert 0 < taken < tries or name == "journal"  # whose damaged records are left out
    assert peak_memory() - before < MEMORY


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes(target: Target) -> None:
    @settings(max_examples=1000 if SOAK else 25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=300))
    def check(data: bytes) -> None:
        attempt(target, data)

    check()


@pytest.mark.parametrize("name", READ)
def test_the_command_says_one_line_and_exits_with_2(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, refused = random.Random(2), 0
    folder = target.file.parent
    for _ in range(200 if SOAK else 4):
        data = mutate(draw, target)
        target.file.write_bytes(data)
        before = sorted(folder.rglob("*"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(target.command)
        said = [line for line in err.getvalue().splitlines() if line.startswith("rac: ")]
        assert code in (0, 2), (data, err.getvalue())
        assert len(said) == (code == 2) and "Traceback" not in err.getvalue(), (data, err.getvalue())
        assert sorted(folder.rglob("*")) == before
        refused += code == 2
    assert refused


@pytest.mark.skipif(not SOAK, reason="coverage-guided fuzzing is for `make soak`")
@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_coverage_leads_to(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no build for this Python")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *(path for path in sys.path if path)])}
    command = [sys.executable, "-m", "tests.fuzz.drive", name, str(share(name, COVERED)), str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600)
    for found in tmp_path.glob("found-*"):
        FOUND.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, FOUND / f"{name}-{found.name}")
    said = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
    print(f"\natheris, {said}")
    assert done.returncode == 0 and said, (done.stdout + done.stderr)[-3000:]
