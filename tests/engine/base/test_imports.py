"""What is done after somebody imports a module."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rac_engine.base.imports import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "imported_later.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "imported_later", raising=False)
    return "imported_later"


def test_it_is_done_when_the_module_is_imported_and_once(module: str) -> None:
    found: list[int] = []
    after_import(module, lambda: found.append(sys.modules[module].VALUE))
    assert not found
    importlib.import_module(module)
    assert found == [1]
    importlib.reload(sys.modules[module])
    assert found == [1]
    del sys.modules[module]


def test_it_is_done_at_once_if_the_module_is_there(module: str) -> None:
    importlib.import_module(module)
    found: list[str] = []
    after_import(module, lambda: found.append("done"))
    assert found == ["done"]
    del sys.modules[module]


def test_the_module_keeps_its_own_loader(module: str) -> None:
    after_import(module, lambda: None)
    made = importlib.import_module(module)
    assert made.__spec__ is not None
    assert type(made.__loader__) is type(made.__spec__.loader) is importlib.machinery.SourceFileLoader
    del sys.modules[module]


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, rac_engine; print(*sorted({'torch', 'transformers', 'importlib.abc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
