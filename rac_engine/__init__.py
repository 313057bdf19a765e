"""RAC Engine: prunes reasoning language models, calibrated on their own chains of thought.

`prune`, `trace` and `evaluate` are imported on first use, so that `import rac_engine` (and `rac --help`) stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac_engine.engine import prune
    from rac_engine.evaluate import evaluate
    from rac_engine.traces import generate as trace

__version__ = "0.1.0"
__all__ = ["evaluate", "prune", "trace"]

_HOMES = {"prune": ("run", "prune_and_report"), "evaluate": ("evaluate", "evaluate"), "trace": ("traces", "generate")}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
