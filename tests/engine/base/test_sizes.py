"""Sizes as people write and read them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes, format_count, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8192", 8192),
        (17, 17),
        ("8k", 8000),
        ("1M", 10**6),
        ("1.5M", 1_500_000),
        ("6GiB", 6 << 30),
        ("6 gib", 6 << 30),
        ("2GB", 2 * 10**9),
        ("0", 0),
        ("0.5KiB", 512),
        ("1Ti", 1 << 40),
    ],
)
def test_parse(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.0001k", "-1", -1, "1e6", "5ib", "1 2", True, None, "９", "1" * 30])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(BadInput):
        parse_size(text)


def test_format() -> None:
    assert [format_bytes(n) for n in (0, 12, 1023, 1536, 6 << 30, 1 << 45)] == [
        *("0 B", "12 B", "1023 B", "1.5 KiB", "6 GiB", "32 TiB")
    ]
    assert [format_count(n) for n in (950, 49_152, 999_700, 7.62e9)] == ["950", "49.2k", "1M", "7.62G"]
    assert [format_seconds(s) for s in (0.3512, 9.96, 59.6, 185, 7440)] == [
        *("0.35 s", "10 s", "1 min 00 s", "3 min 05 s", "2 h 04 min")
    ]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, rac_engine, rac_engine.base.errors as _"
    code += "; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
