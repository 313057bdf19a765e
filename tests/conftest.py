"""What all tests share: no network, no progress bars, no chance, and tiny checkpoints made once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

with suppress(ImportError):
    import triton  # noqa: F401 - before the kernels, which are then compiled and interpreted without a GPU

from hypothesis import settings
from transformers.utils import logging

from tests import tiny

logging.disable_progress_bar()
# The same cases every time, so that a failure is of the change at hand; `make soak` explores. How long one takes says
# nothing where tests share the cores.
settings.register_profile("steady", derandomize=not os.environ.get("RAC_SOAK"), deadline=None)
settings.load_profile("steady")

TESTS = Path(__file__).parent
TOGETHER = ["triton", "cuda", "faults"]
"""Folders of tests that share what takes long to make. They begin, so that none is left when all else is done."""
APART = TESTS / "engine" / "plan" / "test_memory.py"
"""Long tests that share next to nothing. They end, wherever there is room."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def when(item: pytest.Item) -> int:
        folder = item.path.relative_to(TESTS).parts[0]
        return TOGETHER.index(folder) if folder in TOGETHER else len(TOGETHER) + (item.path == APART)

    items.sort(key=when)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests among the workers of `pytest -n`: by files, but for those named above."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file == APART.relative_to(TESTS.parent).as_posix():
                return nodeid
            folder = file.split("/")[1]
            return folder if folder in TOGETHER else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test's numbers depend on which ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("llama", hidden_size=32)`: the folder of a tiny checkpoint by `tiny.save`, not to be written to."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2", **changes: Any) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = tiny.save(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make
