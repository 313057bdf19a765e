"""Where things lie: nothing shadows Hugging Face's `kernels`, and imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = {
    "rac_engine": (
        "base",
        "jobs",
        "checkpoint",
        "solve",
        "recipe",
        "models",
        "traces",
        "calibrate",
        "plan",
        "engine",
        "pack",
        "serve",
        "evaluation",
        "report",
        "run",
        "cli",
    ),
    "rac_kernels": ("backends", "ops", "solvers", "measure"),
}
"""The rooms of each package: one imports only from itself and from those before it (docs/architecture.md)."""
HOMES = {"rac_engine": ROOT / "rac_engine", "rac_kernels": ROOT / "kernels/rac_kernels"}


def imported(file: Path) -> Iterator[str]:
    """What a file imports anywhere in it, by full names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root() -> None:
    """transformers looks for Hugging Face's `kernels` by name; our folder must not be taken for it."""
    code = (
        "import importlib.util, importlib.metadata as m\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "installed = any(d.name == 'kernels' for d in m.distributions())\n"
        "assert installed or spec is None or spec.origin is None, spec\n"
        "from transformers.utils import is_kernels_available\n"
        "assert is_kernels_available() == installed\n"
        "from transformers import Qwen2ForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_kernels_know_nothing_of_the_driver() -> None:
    for file in HOMES["rac_kernels"].rglob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] not in ("rac_engine", "transformers"), f"{file.name} imports {name}"


@pytest.mark.parametrize("package", HOUSES)
def test_every_folder_is_a_room_of_the_house(package: str) -> None:
    folders = {file.parent.name for file in HOMES[package].glob("*/*.py")}
    assert folders == set(HOUSES[package])


@pytest.mark.parametrize("package", HOUSES)
def test_rooms_import_from_those_before_them_only(package: str) -> None:
    rooms, home = HOUSES[package], HOMES[package]
    wrong = []
    for number, room in enumerate(rooms):
        for file in (home / room).rglob("*.py"):
            for name in imported(file):
                house, _, inside = name.partition(".")
                other = inside.partition(".")[0]
                if house == package and other in rooms and rooms.index(other) > number:
                    wrong.append(f"{file.relative_to(home)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", HOUSES)
def test_no_two_modules_import_each_other(package: str) -> None:
    """Within a room too, imports for types included: what stands in a circle is one piece cut in two."""
    home = HOMES[package]
    names = {".".join([package, *file.relative_to(home).with_suffix("").parts]): file for file in home.rglob("*.py")}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    needs = {
        name: {n for full in imported(file) for n in (full, full.rpartition(".")[0]) if n in names and n != name}
        for name, file in names.items()
        if file.name != "__init__.py"  # which hands on what its modules have
    }
    while free := [name for name in needs if not needs[name] & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"in a circle: {', '.join(sorted(needs))}"
