"""The factor's Triton kernels on a GPU, or in Triton's interpreter on small matrices (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from rac_kernels import Factor, FactorError, factor_, factor_batch_
from rac_kernels.backends import cuda
from rac_kernels.testing import KINDS, Poisoned, assert_close, factor_error, gram

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
CASES = [(kind, 20) for kind in KINDS] + [("correlated", 130), ("dead", 1)]
if GPU:
    CASES += [(kind, n) for kind in KINDS for n in (130, 1024, 3000)]


def damped(H: Tensor, factor: Factor) -> Tensor:
    """What U Uᵀ should be, in fp64."""
    H = H.double().clone()
    H.diagonal().add_(factor.ridge)
    H.diagonal()[factor.dead] = 1
    return H


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_accuracy_against_plain_torch(kind, n):
    H = gram(kind, n, device=DEVICE)
    around = Poisoned(H)
    found = factor_(around.view, backend="triton")
    expected = damped(H, found)
    plain = torch.linalg.cholesky(expected.float().flip(0, 1)).flip(0, 1)
    assert found.attempts == [0.01]
    assert_close(found.U, expected, plain, factor_error)
    assert torch.equal(found.U.tril(-1), H.tril(-1))
    assert around.intact()


def test_escalation_and_its_end():
    n = 30
    H = gram("plain", n, device=DEVICE)
    H -= 0.5 * H.diagonal().mean() * torch.eye(n, device=DEVICE)
    found = factor_(H.clone(), max_damping=10, backend="triton")
    assert found.attempts == pytest.approx([0.01, 0.1, 1.0])
    assert factor_error(found.U, damped(H, found)) < 2e-6
    with pytest.raises(FactorError, match=r"not positive definite with damping 0.01"):
        factor_(H, max_damping=0.05, backend="triton")


@pytest.mark.parametrize("n", [20, 130] + ([1024, 3584] if GPU else []))
def test_a_batch_is_its_matrices_alone(n):
    """Bit for bit, inside a buffer of NaN; the second needs more damping than the others."""
    plain = gram("plain", n, device=DEVICE)
    indefinite = plain - 0.5 * plain.diagonal().mean() * torch.eye(n, device=DEVICE)
    matrices = [plain, indefinite, gram("dead", n, device=DEVICE)]
    if not GPU and n > 100:  # the interpreter takes its time over each attempt
        del matrices[1]
    around = Poisoned(torch.stack(matrices))
    found = factor_batch_(around.view, max_damping=10, backend="triton")
    for one, matrix in zip(found, matrices, strict=True):
        alone = factor_(matrix.clone(), max_damping=10, backend="triton")
        assert torch.equal(one.U, alone.U) and one.attempts == alone.attempts and torch.equal(one.dead, alone.dead)
    assert around.intact()


def test_a_batch_with_matrices_that_have_no_factor():
    good = gram("plain", 30, device=DEVICE)
    bad = good.clone()
    bad[4, 20] = 1e9
    with pytest.raises(FactorError, match=r"^H\[1\] .*not positive definite.*limit is 1$"):
        factor_batch_(torch.stack([good, bad]), backend="triton")


def test_not_finite_is_refused():
    H = gram("plain", 140, device=DEVICE)
    H[3, 139] = torch.inf
    with pytest.raises(FactorError, match="infinities or NaN"):
        factor_(H, backend="triton")


@pytest.mark.skipif(not cuda.usable(torch.device(DEVICE)), reason="needs a GPU and the CUDA kernels")
@pytest.mark.parametrize("kind", ["correlated", "dead"])
def test_cuda_and_triton_corners_agree(kind):
    H = gram(kind, 700, device="cuda")
    by_cuda, by_triton = (factor_(H.clone(), backend=backend).U for backend in ("cuda", "triton"))
    assert torch.equal(factor_(H.clone()).U, by_cuda)  # what "auto" takes
    torch.testing.assert_close(by_triton.triu(), by_cuda.triu(), rtol=1e-4, atol=1e-4)
    batch = factor_batch_(torch.stack([H, 2 * H]), backend="cuda")
    assert torch.equal(batch[0].U, by_cuda)
