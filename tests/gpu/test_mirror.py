"""The mirror's Triton kernel on a GPU or in Triton's interpreter, and a calibration step captured in a CUDA graph."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import cross_accumulate_, hessian_accumulate_, symmetrize_
from rac_kernels.ops.mirror import mirror_triton_
from rac_kernels.testing import Poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("down", [True, False], ids=["down", "up"])
@pytest.mark.parametrize("n", [1, 7, 64, 150] + ([3584, 8961] if GPU else []))
def test_mirror(n: int, down: bool) -> None:
    around = Poisoned(torch.randn(2, n, n, device=DEVICE))
    H = around.view
    kept = (H.triu() if down else H.tril()).clone()
    assert mirror_triton_(H, down).tolist() == [True, True]
    assert torch.equal(H, H.mT) and torch.equal(H.triu() if down else H.tril(), kept)
    H[1, n // 2, n // 2] = torch.nan
    assert mirror_triton_(H, down).tolist() == [True, False]
    assert around.intact()


def test_only_what_is_copied_must_be_finite() -> None:
    H = torch.ones(1, 130, 130, device=DEVICE)
    H[0, 100, 3] = torch.inf
    assert mirror_triton_(H, True) and torch.equal(H, torch.ones_like(H))
    H[0, 100, 3] = torch.inf
    assert not mirror_triton_(H, False)


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_calibration_captured_in_a_cuda_graph() -> None:
    X = torch.randn(2048, 640, device=DEVICE, dtype=torch.bfloat16)
    Y = torch.randn(2048, 300, device=DEVICE, dtype=torch.bfloat16)
    H, C = torch.zeros(640, 640, device=DEVICE), torch.zeros(640, 300, device=DEVICE)

    def step() -> None:
        hessian_accumulate_(H, X)
        cross_accumulate_(C, X, Y)
        symmetrize_(H)

    step()  # compiles; nothing may be loaded while a graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    X.normal_()
    Y.normal_()
    H.zero_()
    C.zero_()
    graph.replay()
    graph.replay()
    x = X.double()
    torch.testing.assert_close(H.double(), 2 * x.T @ x, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(C.double(), 2 * x.T @ Y.double(), rtol=1e-5, atol=1e-2)
