"""A whole job on a GPU: what it has allocated at most is what was planned, and never more than it may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tests.gpu.engine")  # skips where one of the engine's packages is missing

from rac_engine.base.errors import BadInput
from rac_engine.engine.pruning import prune
from rac_engine.engine.verify import verify
from rac_engine.recipe.settings import PruneSettings
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(
        tmp_path_factory.mktemp("gpu") / "model",
        shard_size="1GB",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        initializer_range=0.02,
    )


@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize(
    ("method", "reconstruct"), [("sparsegpt", "layer"), ("admm", "residual"), ("wanda", "layer"), ("alps", "layer")]
)
def test_a_job_allocates_no_more_than_planned_and_allowed(
    source: Path, tmp_path: Path, method: str, reconstruct: str, share: float
) -> None:
    """One sequence is longer than a chunk. `share` is the limit, of what the job takes if nothing binds it."""
    settings = PruneSettings.model_validate({"method": method, "reconstruct": reconstruct, "chunk_tokens": 8192})
    calibration = tiny.calibration([20_000, 3000, 3000, 500])
    free = prune(source, tmp_path / "free", settings, calibration, device="cuda").end["memory"]
    assert free["device_measured"] <= free["device_planned"]
    limit = int(share * free["device_planned"])
    report = prune(source, tmp_path / "out", settings, calibration, device="cuda", device_memory=limit)
    memory = report.end["memory"]
    assert memory["device_measured"] <= memory["device_planned"] <= limit
    assert verify(tmp_path / "out", source).problems == []
    # What comes after the job in this process is not bound by its limit.
    assert torch.empty(2 * limit, dtype=torch.uint8, device="cuda").nbytes > limit


def test_a_limit_too_small_is_refused_before_anything_is_done(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--device-memory 64 MiB: at least .* is needed \("):
        prune(source, tmp_path / "out", PruneSettings(), tiny.calibration(), device="cuda", device_memory=64 << 20)
    assert [*tmp_path.iterdir()] == []
