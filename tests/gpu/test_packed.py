"""The product with a packed matrix on a GPU, or in Triton's interpreter on small shapes (tests/triton runs that)."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from rac_kernels import packed_matmul
from rac_kernels.ops import packed_triton
from rac_kernels.ops.packed import Packed, Values, pack, unpack
from rac_kernels.testing import Poisoned, assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS: list[Values] = ["same", "int8", "int4"]
# tokens, rows, columns, share kept, columns a scale: rows without values, tiles that are not full, columns that
# programs share, many tokens.
CASES = [(3, 37, 200, 0.5, 64), (9, 5, 1100, 0.3, 128), (20, 130, 150, 0.2, 256)]
if GPU:
    CASES += [(tokens, 1024, 3584, 0.3, 128) for tokens in (1, 8, 16, 17, 64, 65, 512)] + [(1, 18_944, 3584, 0.5, 64)]


@pytest.mark.parametrize(("tokens", "rows", "columns", "share", "group"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", KINDS)
def test_any_matrix(
    values: Values,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    columns: int,
    share: float,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if columns == 1100:
        monkeypatch.setattr(packed_triton, "LEAST", 128)
    g = torch.Generator(DEVICE).manual_seed(rows + columns)
    W = torch.randn(rows, columns, generator=g, device=DEVICE).to(dtype)
    W *= torch.rand(rows, columns, generator=g, device=DEVICE) < share
    W[rows // 2] = 0
    packed = pack(W, values, None if values == "same" else group)
    around = Poisoned(torch.randn(tokens, columns, generator=g, device=DEVICE).to(dtype))
    bias = torch.randn(rows, generator=g, device=DEVICE).to(dtype) if rows > 5 else None

    found = packed_matmul(around.view, packed, bias, backend="triton")

    assert_near(found, around.view, packed, bias)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_the_smallest(tokens: int, values: Values) -> None:
    packed = pack(torch.tensor([[-0.7]], dtype=torch.float16, device=DEVICE), values, None if values == "same" else 64)
    X = torch.full((tokens, 1), 1.3, dtype=torch.float16, device=DEVICE)
    assert_near(packed_matmul(X, packed, backend="triton"), X, packed, None)
    nothing = pack(torch.empty(3, 0, device=DEVICE))
    bias = torch.arange(3.0, device=DEVICE)
    found = packed_matmul(torch.empty(tokens, 0, device=DEVICE), nothing, bias, backend="triton")
    assert torch.equal(found, bias.expand(tokens, 3))


@pytest.mark.parametrize("tokens", [2, 18])
def test_a_matrix_of_a_batch_and_tokens_of_another_dtype(tokens: int) -> None:
    W = torch.randn(2, 20, 70, device=DEVICE).half() * (torch.rand(2, 20, 70, device=DEVICE) < 0.4)
    packed = pack(W)
    X = torch.randn(tokens, 140, device=DEVICE)[:, ::2]
    assert_near(packed_matmul(X, packed, matrix=1, backend="triton"), X, pack(W[1]), None)


@pytest.mark.skipif(not GPU, reason="races do not show in the interpreter")
@pytest.mark.parametrize("values", KINDS)
def test_results_repeat_bit_for_bit(values: Values) -> None:
    W = torch.randn(700, 18_944, device=DEVICE).bfloat16() * (torch.rand(700, 18_944, device=DEVICE) < 0.3)
    packed = pack(W, values)
    for tokens in (1, 16, 300):
        X = torch.randn(tokens, 18_944, device=DEVICE).bfloat16()
        first, *others = (packed_matmul(X, packed) for _ in range(3))
        assert all(torch.equal(first, other) for other in others)


def assert_near(found: Tensor, X: Tensor, packed: Packed, bias: Tensor | None) -> None:
    """Within twice the error of torch with the matrix unpacked, which rounds it to its dtype."""
    layout = packed.layout
    exact = Packed(packed.data, replace(layout, dtype=torch.float32)) if layout.values != "same" else packed
    dense = unpack(packed).to(X.dtype)
    wide = None if bias is None else bias.double()
    assert_close(found, linear(X.double(), unpack(exact).double(), wide), linear(X, dense, bias))
