"""Selection's Triton and CUDA kernels, on a GPU or (Triton's) in the interpreter (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from rac_kernels import kth_smallest, mask_by_score
from rac_kernels.backends import cuda
from rac_kernels.ops.select import Selection

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
BACKENDS = ["triton", "cuda"] if cuda.usable(torch.device(DEVICE)) else ["triton"]
VALUES = ["random", "few", "zeros", "extremes", "signed"]


def some(count: int, values: str) -> Tensor:
    """With many ties, or of all magnitudes."""
    g = torch.Generator(DEVICE).manual_seed(count)
    scores = torch.rand(count, generator=g, device=DEVICE)
    if values == "few":
        scores = (scores * 5).floor()
    elif values == "zeros":
        scores = scores * (torch.rand(count, generator=g, device=DEVICE) < 0.1)
    elif values == "extremes":
        scores = 2.0 ** (scores * 277 - 149)
    elif values == "signed":
        scores = (scores * 9).floor() - 4
        scores = torch.where(scores < -3, -torch.inf, torch.where(scores == 0, scores.copysign(scores - 0.5), scores))
        scores[::5] = -(2.0 ** (scores[::5] - 140))
    return scores


def first(scores: Tensor, k: int) -> Tensor:
    """Mask of the k smallest of a vector, the earliest among equals."""
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.sort(stable=True).indices[:k], True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[1], [3000, 0, 9_000, 3]])
@pytest.mark.parametrize("values", VALUES)
def test_groups(counts: list[int], values: str, backend: str) -> None:
    parts = [some(count, values) for count in counts]
    scores = torch.cat(parts)
    selection = Selection(len(counts), torch.device(DEVICE), backend)
    for share in (0.0, 0.3, 1.0) if GPU or values == "signed" else (0.3,):
        ks = [int(share * count) for count in counts]
        selection.run(scores, counts, ks)
        found = zip(parts, ks, selection.thresholds.tolist(), selection.last.tolist(), strict=True)
        for part, k, threshold, last in found:
            goes = (part < threshold) | ((part == threshold) & (torch.arange(len(part), device=DEVICE) <= last))
            assert torch.equal(goes, first(part, k))
            assert k or (threshold, last) == (-torch.inf, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kth_smallest(dtype: torch.dtype, backend: str) -> None:
    scores = some(1_200, "signed").to(dtype)
    scores[7::100] = torch.nan
    scores[8::100] = -torch.nan
    ordered = scores.sort().values
    for k in (1, 400, 1_180, 1_200):
        found = kth_smallest(scores.view(40, 30).T, k, backend=backend)
        assert found.dtype == dtype and found.shape == ()
        assert torch.equal(found.isnan(), ordered[k - 1].isnan()) and (found.isnan() or found == ordered[k - 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700)] + ([(3584, 18_944), (4, 200_000)] if GPU else []))
def test_masks_of_a_matrix(shape: tuple[int, int], values: str, backend: str) -> None:
    scores = some(shape[0] * shape[1], values).view(shape)
    for sparsity in (0.0, 0.37, 1.0) if GPU or shape[0] < 3 else (0.37,):
        mask = mask_by_score(scores, sparsity, per="matrix", backend=backend)
        assert torch.equal(mask.flatten(), first(scores.flatten(), int(sparsity * scores.numel())))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1500), (5, 70)] + ([(3584, 18_944), (4, 200_000)] if GPU else []))
def test_masks_of_rows(shape: tuple[int, int], values: str) -> None:
    scores = some(shape[0] * shape[1], values).view(shape[1], shape[0]).T
    for sparsity in (0.0, 0.37, 1.0) if GPU or shape[0] < 3 else (0.37,):
        mask = mask_by_score(scores, sparsity, backend="triton")
        ends = torch.arange(shape[0] + 1, device=DEVICE) * int(sparsity * scores.numel()) // shape[0]
        rank = scores.sort(dim=1, stable=True).indices.argsort(dim=1)
        assert torch.equal(mask, rank < ends.diff()[:, None])


def test_nothing_around_is_touched() -> None:
    """Rows of a wider matrix, the last of them ending the memory."""
    whole = torch.full((12, 90), torch.nan, device=DEVICE)
    scores = whole[2:, 20:]
    scores.copy_(some(700, "few").view(10, 70))
    for per in ("row", "matrix"):
        alone = mask_by_score(scores.contiguous(), 0.5, per=per, backend="triton")
        assert torch.equal(mask_by_score(scores, 0.5, per=per, backend="triton"), alone)
    with pytest.raises(ValueError, match="NaN"):
        mask_by_score(whole, 0.5, backend="triton")
    assert mask_by_score(whole[:0], 0.5, backend="triton").shape == (0, 90)
    with pytest.raises(ValueError, match="no CUDA kernel"):
        mask_by_score(scores, 0.5, backend="cuda")
    with pytest.raises(ValueError, match="no Triton kernel"):
        mask_by_score(scores.double(), 0.5, backend="triton")


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_captured_in_a_cuda_graph() -> None:
    """So nothing waits for the device."""
    scores = torch.rand(300, 2000, device=DEVICE)
    for per in ("row", "matrix"):
        mask_by_score(scores, 0.4, per=per)  # compiles, and copies what says where the scores are
        kth_smallest(scores, 1000)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mask, bound = mask_by_score(scores, 0.4, per=per), kth_smallest(scores, 1000)
        scores.uniform_()
        graph.replay()
        assert torch.equal(mask, mask_by_score(scores, 0.4, per=per, backend="reference"))
        assert bound == scores.flatten().kthvalue(1000).values
