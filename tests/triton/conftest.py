"""The interpreter has a process of its own and takes a minute: it runs beside the tests here that compile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What is no Triton: the CUDA kernels, which tests/cuda runs on the host, and what the engine does on a GPU.
OTHER = {"test_cuda", "test_activations", "test_prune"}
FILES = sorted(file for file in (ROOT / "tests" / "gpu").glob("test_*.py") if file.stem not in OTHER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == "test_interpreted")  # last


@pytest.fixture(scope="session", autouse=True)
def interpreted(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[int, str]]]:
    """Starts the tests of tests/gpu in Triton's interpreter, which is chosen before triton is imported; to be asked how
    they ended and what they said. Not where nobody is going to ask."""
    asked = any(item.name == "test_interpreted" for item in request.session.items)
    if not asked or torch.cuda.is_available():
        yield lambda: (1, "")
        return
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", str(ROOT / "tests" / "gpu")]
    command = [sys.executable, "-m", "pytest", *options, *map(str, FILES)]
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)

        def ended() -> tuple[int, str]:
            code = process.wait(1800)
            said.seek(0)
            return code, said.read()

        try:
            yield ended
        finally:
            process.kill()
            process.wait()
