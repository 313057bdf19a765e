"""transformers' code of models, imported without what a job on one machine never uses.

That code imports torch's compiler and its distributed tensors, which are 1,300 modules: 2 s of a processor and 140 MB
in every process. Of the compiler it takes no more than marks on functions, for programs that compile them, and one
class; torch's own operations in Python take such a mark too. Here they are given those alone. Whatever else is asked of
the compiler loads it. And transformers takes torch for one that was built without distribution, which it knows.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MODELS = "transformers.modeling_utils"
"""The module that imports them."""
COMPILER = "torch._dynamo"
MASKING = f"{COMPILER}._trace_wrapped_higher_order_op"


def import_lean() -> None:
    """Let this process import transformers' models so, unless it has imported them already.

    For programs, as all of `rac_engine.base.process`: whoever shares the process finds a transformers that knows
    neither distributed models nor, of functions marked for the compiler, their marks.
    """
    if MODELS not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that module once, with another loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODELS:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module's code, which then finds the stand-ins and no distribution."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        _forget_distribution()
        if COMPILER not in sys.modules:
            marks = {"assume_constant_result": _marked_constant, "allow_in_graph": _unmarked, "disable": _unmarked}
            sys.modules[COMPILER] = _StandIn(COMPILER, **marks)
            sys.modules[MASKING] = _StandIn(MASKING, TransformGetItemToIndex=_index_transform)
        self._loader.exec_module(module)


def _forget_distribution() -> None:
    """Let transformers find, once and for all, that this torch has no distribution."""
    import torch.distributed
    from transformers.utils import import_utils

    own, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        import_utils.is_torch_distributed_available()  # which remembers it
    finally:
        torch.distributed.is_available = own


class _StandIn(ModuleType):
    """A module with a few names; asked for any other, or for a part of a package, it makes way for the real one."""

    def __init__(self, name: str, **names: Callable[..., Any]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name, self.__name__) != ("__path__", COMPILER):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    """The compiler's module of that name, itself."""
    for each in (COMPILER, MASKING):
        if isinstance(sys.modules.get(each), _StandIn):
            del sys.modules[each]
    return importlib.import_module(name)


def _marked_constant(function: Any) -> Any:
    """What the compiler's own function does."""
    function._dynamo_marked_constant = True
    return function


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with settings or without, that leaves a function as it is."""
    return _unmarked if function is None else function


def _index_transform() -> Any:
    """An instance of the compiler's class of that name, when one is wanted."""
    return _real(MASKING).TransformGetItemToIndex()
