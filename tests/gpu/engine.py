"""The engine's packages, which `make gpu` can do without: tests of whole jobs are skipped where one is missing."""

from __future__ import annotations

import pytest

for _name in ("transformers", "tokenizers", "safetensors", "pyarrow", "pydantic", "yaml", "jinja2", "psutil"):
    pytest.importorskip(_name)
