"""Every family is a file, found by its name, and stands in the table for users."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rac_engine.models.families import find_family, known_families
from rac_engine.models.plans import Family
from tests import tiny

DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"


def test_every_family_is_tested_against_transformers() -> None:
    assert known_families() == sorted(tiny.FAMILIES)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_file_defines_the_family_of_its_name(name: str) -> None:
    family = find_family(name)
    assert isinstance(family, Family) and family.model_type == name


def test_the_table_for_users_names_every_family() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.M)) == known_families()


@pytest.mark.parametrize("kind", [None, 3, ["qwen2"], {}, "", "__init__", "plans", "../plans", "qwen2.x", "mamba"])
def test_what_is_no_family_is_none(kind: object) -> None:
    assert find_family(kind) is None
