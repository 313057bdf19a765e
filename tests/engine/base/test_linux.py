"""On another system than Linux: one clear line, from the command and from an import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SAID = "RAC Engine runs on Linux; on macOS and Windows use a container or WSL"

ELSEWHERE = """
import sys, sysconfig
sysconfig.get_config_vars()  # which would look for this Python's files by the other system's name
sys.platform = sys.argv[1]
sys.modules["fcntl"] = sys.modules["resource"] = None
"""


def run(system: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", ELSEWHERE + code, system]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("system", ["darwin", "win32"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["prune", "--help"]])
def test_the_command_explains_itself_anywhere(system: str, words: list[str]) -> None:
    done = run(system, f"import rac_engine\nfrom rac_engine.cli import main\nsys.exit(main({words}))")
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    "words", [["prune", "m", "out", "--method", "magnitude"], ["verify", "out"], ["doctor"], ["run", "r.yaml", "out"]]
)
def test_a_command_that_would_work_is_one_line_and_exit_code_2(words: list[str]) -> None:
    done = run("darwin", f"from rac_engine.cli import main\nsys.exit(main({words}))")
    assert (done.returncode, done.stderr) == (2, f"rac: error: {SAID}\n")


@pytest.mark.parametrize("module", ["base.files", "base.faults", "base.jsonfiles", "jobs.claim", "jobs.job"])
def test_an_import_of_what_needs_linux_says_so(module: str) -> None:
    code = f"""
try:
    import rac_engine.{module}
except ImportError as error:
    print(error)
"""
    done = run("win32", code)
    assert done.stdout == f"{SAID}\n", done.stderr
