"""Where a checkpoint comes from, as may be published: a name, a revision, and what its card declares."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rac_engine import prune
from rac_engine.checkpoint.origin import origin_of
from rac_engine.recipe.settings import PruneSettings
from tests import tiny

CARD = """---
license: other
license_name: tongyi
license_link: LICENSE
language: [en, no]
tags:
- reasoning
- text: 1
- math
datasets: [secret]
base_model: org/parent
---

# A model
"""


def front(card: str) -> dict[str, object]:
    """The front matter of a card."""
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_snapshot_of_the_hubs_cache_has_its_name_and_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert (origin_of(folder).name, origin_of(folder).revision) == ("Qwen/Qwen3-8B", "0123abcd")
    assert (origin_of(tmp_path).name, origin_of(tmp_path).revision) == (tmp_path.name, None)


def test_the_card_keeps_licence_language_and_tags_and_names_the_base(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--small"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "card").write_text(CARD)
    snapshot = tiny.save(cache / "snapshots" / "0123abcd", "llama")
    (snapshot / "README.md").symlink_to("../../blobs/card")
    prune(snapshot, tmp_path / "out", PruneSettings(method="magnitude", sparsity=0.5))
    card = (tmp_path / "out" / "README.md").read_text()
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/small",
        "license": "other",
        "license_name": "tongyi",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["rac-engine", "pruned", "sparse", "reasoning", "math"],
    }
    assert "# org/small, pruned (50% unstructured)" in card and "`org/small`, revision `0123abcd`" in card
    published = [(tmp_path / "out" / name).read_text() for name in ("README.md", "rac/metrics.jsonl")]
    assert not any(str(tmp_path) in text for text in published)


@pytest.mark.parametrize(
    "text",
    ["", "# none", "---\nlicense: mit", "---\n- mit\n---\n", "---\nlicense: {a: b}\n---\n", "---\n&a [*a\n---\n"],
)
def test_a_card_without_front_matter_declares_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert origin_of(tmp_path).declared == {}
