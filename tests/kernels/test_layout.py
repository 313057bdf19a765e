"""Where things lie: nothing shadows Hugging Face's `kernels`, and imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    for file in (ROOT / "kernels" / "rac_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("rac_engine", "transformers"), f"{file.name} imports {name}"
