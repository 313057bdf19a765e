"""The sweep's Triton kernels on a GPU or in Triton's interpreter (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from rac_kernels import factor_, objective, sweep
from rac_kernels.testing import gram

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
UNSTRUCTURED: list[tuple[int, int, int, object]] = [(1, 1, 128, 0.5), (5, 40, 16, 0.3), (37, 70, 32, 0.8)]
PATTERNS: list[tuple[int, int, int, object]] = [(5, 40, 16, (2, 4)), (33, 48, 24, (4, 8)), (3, 30, 128, (1, 3))]
if GPU:
    UNSTRUCTURED += [(1000, 1537, 128, 0.5), (300, 4096, 64, 0.7), (4096, 1024, 128, 0.5)]
    PATTERNS += [(1000, 1536, 128, (2, 4)), (300, 4096, 64, (4, 8)), (77, 2000, 128, (1, 4))]


def weights(rows: int, n: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(rows + n)
    return torch.randn(rows, n, generator=generator, device=DEVICE)


@pytest.mark.parametrize("kind", ["correlated", "rank-deficient", "dead"])
@pytest.mark.parametrize(("rows", "n", "block", "how"), UNSTRUCTURED + PATTERNS, ids=str)
def test_as_good_as_the_reference(rows, n, block, how, kind):
    sparsity, pattern = (how, None) if isinstance(how, float) else (0.5, how)
    H, W = gram(kind, n, device=DEVICE), weights(rows, n)
    factor = factor_(H.clone(), backend="reference")
    arguments = (W, factor.U, sparsity, pattern, block, factor.dead)
    Q, wanted = sweep(*arguments, backend="triton"), sweep(*arguments, backend="reference")
    assert (Q == 0).sum() == (wanted == 0).sum()
    assert not (Q.signbit() & (Q == 0)).any()
    assert objective(W, Q, H) <= 1.001 * objective(W, wanted, H) + 1e-9


def test_row_groups_have_counts_of_their_own():
    H = gram("plain", 50, device=DEVICE)
    W = torch.cat([weights(40, 50), 100 * weights(3, 50), 0.01 * weights(33, 50)])
    Q = sweep(W, factor_(H).U, 0.5, block_size=32, row_groups=[40, 3, 0, 33], backend="triton")
    for block in Q.split(32, 1):
        for part in block.split([40, 3, 33]):
            assert int((part == 0).sum()) == part.numel() // 2


def test_ties_go_by_position():
    Q = sweep(torch.ones(70, 40, device=DEVICE), torch.eye(40, device=DEVICE), 0.33, block_size=16, backend="triton")
    for block in Q.split(16, 1):
        k = int(0.33 * block.numel())
        assert (block.reshape(-1)[:k] == 0).all() and (block.reshape(-1)[k:] == 1).all()
    Q = sweep(torch.ones(3, 40, device=DEVICE), torch.eye(40, device=DEVICE), pattern="3:5", backend="triton")
    assert torch.equal(Q[0].view(8, 5).cpu(), torch.tensor([0.0, 0, 1, 1, 1]).expand(8, 5))


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_all_or_nothing(sparsity):
    H, W = gram("plain", 40, device=DEVICE), weights(9, 40)
    Q = sweep(W, factor_(H).U, sparsity, block_size=16, backend="triton")
    assert torch.equal(Q, W * (1 - sparsity))


def test_strides_and_poison():
    H = gram("plain", 40, device=DEVICE)
    U = factor_(H).U
    W = weights(21, 40).half()
    expected = sweep(W, U, 0.5, block_size=16, backend="triton")
    store_w, store_u = torch.full((30, 100), torch.nan).to(W), torch.full((44, 47), torch.nan).to(U)
    store_w[5:26, 10:90:2] = W
    store_u[2:42, 3:43] = U.triu() + torch.full_like(U, torch.nan).tril(-1).nan_to_num(nan=7e30)
    assert torch.equal(
        sweep(store_w[5:26, 10:90:2], store_u[2:42, 3:43], 0.5, block_size=16, backend="triton"), expected
    )
    with pytest.raises(ValueError, match="NaN"):
        sweep(store_w, torch.eye(100, device=DEVICE), backend="triton")


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_captured_in_a_cuda_graph():
    H, W = gram("plain", 512, device="cuda"), weights(256, 512)
    U = factor_(H).U
    for pattern in (None, (2, 4)):
        wanted = sweep(W, U, 0.5, pattern)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            Q = sweep(W, U, 0.5, pattern)
        Q.zero_()
        graph.replay()
        assert torch.equal(Q, wanted)
