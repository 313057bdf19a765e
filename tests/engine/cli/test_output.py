"""Standard output that is full, closed, or of few characters, and signals: a job that is published is done."""

from __future__ import annotations

import ast
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rac_engine.cli import app, output
from rac_engine.cli.app import main
from rac_engine.cli.commands import prune

ROOT = Path(app.__file__).parents[2]


@pytest.fixture
def words(checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A job that is done in no time."""
    return ["prune", str(checkpoint()), str(tmp_path / "out"), "--method", "magnitude"]


def stream(kind: str) -> io.TextIOWrapper | None:
    """A standard output of that kind."""
    if kind == "closed":
        return None
    if kind == "full":
        return open("/dev/full", "w")
    if kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        return os.fdopen(writer, "w")
    return io.TextIOWrapper(io.BytesIO(), encoding=kind)


@pytest.mark.parametrize("kind", ["full", "broken", "closed", "ascii", "latin-1"])
def test_a_published_job_is_done_whatever_becomes_of_its_result(
    words: list[str],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = stream(kind)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["-q", *words]) == 0
    said = capsys.readouterr().err
    lost = "rac: done, but the result could not be printed: standard output: No space left on device\n"
    assert said == (lost if kind == "full" else "")
    assert (tmp_path / "out/rac/report.html").is_file()
    if out is not None and kind in ("ascii", "latin-1"):
        assert isinstance(out.buffer, io.BytesIO)
        shown = out.buffer.getvalue().decode(kind)
        assert "50% zeros in 21 matrices, mean relative error -, " in shown and out.errors == "strict"


@pytest.mark.parametrize(("kind", "code"), [("full", 1), ("broken", 1), ("closed", 0), ("ascii", 0)])
def test_a_command_that_only_prints_fails_where_it_cannot(
    checkpoint: Callable[..., Path],
    kind: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", stream(kind))
    assert main(["plan", str(checkpoint())]) == code
    said = capsys.readouterr().err
    assert said == ("rac: failed: standard output: No space left on device\n" if kind == "full" else "")


def test_characters_that_an_encoding_lacks_are_replaced_by_plain_ones() -> None:
    assert "– × ✓ · ٣".encode("ascii", "rac_engine.plain") == b"- x + - \\u0663"
    assert "– × ✓ · \udcff".encode("utf-8", "rac_engine.plain") == "– × ✓ · \\udcff".encode()


def test_results_are_printed_by_emit_alone() -> None:
    for file in (ROOT / "rac_engine/cli").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        named = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert not named or file.name == "output.py", file


PROGRAM = """\
import atexit, os, signal, sys
from rac_engine.cli import app
from rac_engine.cli.options import Command
def work(args):
    fd = os.open("/dev/null", os.O_RDONLY)
    sys.stderr.write(str(fd > 2))
    return 3
app.COMMANDS["plan"] = Command("say nothing", [], lambda parser: None, work)
for number in (signal.SIGTERM, signal.SIGINT):
    atexit.register(os.kill, os.getpid(), number)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["rac", "plan"]
sys.exit(app.main())
"""


def test_signals_behind_the_command_change_no_exit_code_and_closed_streams_have_their_numbers() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    shell = ["sh", "-c", 'exec "$@" >&- <&-', "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (3, "True")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_behind_publication_is_too_late(
    words: list[str],
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def late(text: str) -> None:
        os.kill(os.getpid(), number)
        output.emit(text)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(prune, "emit", late)
    try:
        assert main(["-q", *words]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.count("\n") == 2 and (tmp_path / "out").is_dir()
