"""The CUDA kernels compiled for the host, once a session for each sanitizer."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.cuda.host import Program, build


def _built(factory: pytest.TempPathFactory, sanitizer: str) -> Program:
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs g++ and its sanitizers")
    return build(factory.mktemp(sanitizer), sanitizer)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return _built(tmp_path_factory, "memory")


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Under ThreadSanitizer."""
    return _built(tmp_path_factory, "races")
