"""What all tests share: no network, no progress bars, no chance, and tiny checkpoints made once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from tests import tiny

logging.disable_progress_bar()
# The same cases every time, so that a failure is of the change at hand; `make soak` explores.
settings.register_profile("steady", derandomize=not os.environ.get("RAC_SOAK"))
settings.load_profile("steady")


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
