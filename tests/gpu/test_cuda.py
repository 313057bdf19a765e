"""The CUDA kernels on a GPU; tests/cuda runs them without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels.backends import cuda
from rac_kernels.testing import assert_close, factor_error, gram

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
UNUSABLE = cuda.why_unusable(torch.device("cuda"))
pytestmark = pytest.mark.skipif(bool(UNUSABLE), reason=UNUSABLE or "usable")


def damped(kind: str, n: int) -> Tensor:
    H = gram(kind, n, device="cuda")
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return H


def blocked_(H: Tensor, status: Tensor) -> None:
    """H [matrices, n, n] = U Uᵀ by corners and plain products, all of it queued."""
    hi = H.shape[-1]
    while hi:
        lo = (hi - 1) // cuda.CORNER * cuda.CORNER
        inverse = H.new_empty(len(H), hi - lo, hi - lo)
        pulls = (H[:, :hi, hi:] @ H[:, lo:hi, hi:].mT)[:, None]
        cuda.factor_corner_(H, lo, hi, inverse, status, pulls)
        H[:, :lo, lo:hi] = (H[:, :lo, lo:hi] - pulls[:, 0, :lo]) @ inverse.mT
        hi = lo


@pytest.mark.parametrize("n", [1, 33, 128, 130, 700])
def test_factor(n: int) -> None:
    matrices = [damped(kind, n) for kind in ("plain", "correlated", "wide range")]
    H, status = torch.stack(matrices), torch.zeros(3, dtype=torch.int32, device="cuda")
    blocked_(H, status)
    assert status.tolist() == [0, 0, 0]
    for U, wanted in zip(H, matrices, strict=True):
        plain = torch.linalg.cholesky(wanted.flip(0, 1)).flip(0, 1)
        assert_close(U, wanted, plain, factor_error)


def test_not_positive_definite() -> None:
    good = damped("plain", 300)
    bad = good.clone()
    bad[200, 200] = -1
    H, status = torch.stack([bad, good]), torch.zeros(2, dtype=torch.int32, device="cuda")
    blocked_(H, status)
    assert status.tolist() == [201, 0]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("counts", [[1], [100, 0, 3], [458_752], [2_424_832, 65_537, 4_849_664], [999] * 300])
def test_select(counts: list[int], ties: bool) -> None:
    g = torch.Generator("cuda").manual_seed(len(counts))
    scores = torch.randn(sum(counts), device="cuda", generator=g).abs()
    if ties:
        scores = (scores * 50).round() / 50
    ks = [count // 2 for count in counts]
    state = cuda.selection_state(len(counts), scores.device)
    for _ in range(2):  # the second time needs a state that is as new
        thresholds, last = cuda.select_thresholds(scores, counts, ks, state)
        for group, k, threshold, end in zip(scores.split(counts), ks, thresholds, last, strict=True):
            goes = (group < threshold) | ((group == threshold) & (torch.arange(len(group), device="cuda") <= end))
            wanted = torch.zeros_like(goes)
            wanted[group.sort(stable=True).indices[:k]] = True
            assert torch.equal(goes, wanted)


def test_in_a_graph() -> None:
    """A factorization and a selection, captured once and replayed on other numbers."""
    H, status = damped("plain", 260)[None], torch.zeros(1, dtype=torch.int32, device="cuda")
    scores = torch.rand(100_000, device="cuda")
    state = cuda.selection_state(1, scores.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # what made H, scores and the state
    with torch.cuda.stream(side):  # loads the kernels
        blocked_(H.clone(), status)
        cuda.select_thresholds(scores, [100_000], [40_000], state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocked_(H, status)
        thresholds, _ = cuda.select_thresholds(scores, [100_000], [40_000], state)
    for seed in range(2):
        wanted = gram("plain", 260, seed, device="cuda")
        H.copy_(wanted)
        scores.uniform_()
        graph.replay()
        assert status.item() == 0 and factor_error(H[0], wanted) < 1e-5
        assert thresholds.item() == scores.kthvalue(40_000).values.item()
