"""Products with packed matrices on every path, against fp64 and against torch in the same dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rac_kernels import packed_matmul
from rac_kernels.backends import native
from rac_kernels.ops import packed_matmul as module
from rac_kernels.ops.packed import Packed, Values, pack, unpack
from rac_kernels.testing import CPU, Poisoned, assert_close, running

NATIVE = [name for name in CPU if name != "reference"]
KINDS: list[Values] = ["same", "int8", "int4"]
SHAPES = [(1, 1), (1, 200), (37, 1), (5, 63), (6, 64), (7, 65), (33, 129), (3, 1000), (70, 640)]


def matrix(rows: int, columns: int, density: float = 0.4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A pruned one; its third row and its second group of 64 columns keep nothing."""
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    W = torch.randn(rows, columns, generator=g) * (torch.rand(rows, columns, generator=g) < density)
    W[2:3] = 0
    W[:, 64:128] = 0
    return W.to(dtype)


@cache
def packed_matrix(
    rows: int, columns: int, values: Values, group: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Packed:
    return pack(matrix(rows, columns, dtype=dtype), values, group)


@cache
def packed_batch(values: Values) -> Packed:
    """Of three matrices [300, 640], of which the first keeps nothing in most of its rows."""
    W = matrix(900, 640).view(3, 300, 640)
    W[0, :200] = 0
    return pack(W, values)


def surrounded(packed: Packed) -> Packed:
    """The same bytes amid others, at a multiple of 8 but of no more."""
    around = torch.full((len(packed.data) + 72,), 0xFF, dtype=torch.uint8)
    shift = (8 - around.data_ptr() % 64) % 64
    around[shift : shift + len(packed.data)] = packed.data
    return Packed(around[shift : shift + len(packed.data)], packed.layout)


def weights(packed: Packed, backend: str, tokens: int) -> Tensor:
    """What is multiplied: for a few tokens in native code scale times code, which fp32 holds, else that rounded."""
    if packed.layout.values == "same" or backend == "reference" or tokens > module.FEW:
        return unpack(packed)
    return unpack(Packed(packed.data, replace(packed.layout, dtype=torch.float32)))


def check(X: Tensor, packed: Packed, bias: Tensor | None, backend: str) -> None:
    W = weights(packed, backend, len(X))
    found = packed_matmul(X, packed, bias, backend=backend)
    exact = F.linear(X.double(), W.double(), None if bias is None else bias.double())
    both = torch.promote_types(X.dtype, W.dtype)
    plain = F.linear(X.to(both), W.to(both), None if bias is None else bias.to(both)).to(X.dtype)
    assert found.dtype == X.dtype and found.shape == exact.shape
    assert_close(found, exact, plain)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", CPU)
def test_odd_shapes(name: str, values: Values) -> None:
    for rows, columns in SHAPES:
        for group in [None] if values == "same" else [None, 64, 512]:
            packed = surrounded(packed_matrix(rows, columns, values, group))
            for tokens in (1, 3):
                X = Poisoned(torch.randn(tokens, columns).bfloat16()).view
                with running(name) as backend:
                    check(X, packed, torch.randn(rows).bfloat16() if tokens == 3 else None, backend)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(name: str, dtype: torch.dtype, values: Values) -> None:
    for own in (torch.bfloat16, torch.float16, torch.float32):
        packed = packed_matrix(9, 300, values, dtype=own)
        with running(name) as backend:
            check(torch.randn(5, 300).to(dtype), packed, torch.randn(9).to(dtype), backend)
            check(torch.randn(40, 300).to(dtype), packed, torch.randn(9).to(dtype), backend)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", NATIVE)
def test_every_number_of_tokens(name: str, values: Values) -> None:
    packed = packed_matrix(11, 320, values)
    X = torch.randn(18, 320).bfloat16()
    with running(name) as backend:
        for tokens in range(19):
            check(X[:tokens], packed, None, backend)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", NATIVE)
def test_tiles_of_any_shape(name: str, values: Values) -> None:
    """More rows than are expanded together, columns in several blocks, the last of them short, and many tokens."""
    packed = surrounded(packed_matrix(37, 3700, values))
    for tokens in (6, 65):
        X = Poisoned(torch.randn(tokens, 3700).bfloat16()).view
        with running(name) as backend:
            check(X, packed, torch.randn(37).bfloat16(), backend)
    for dtype in (torch.float16, torch.float32):
        with running(name) as backend:
            check(torch.randn(9, 300).to(dtype), packed_matrix(9, 300, values, dtype=dtype), None, backend)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", NATIVE)
def test_a_token_of_a_tile_is_the_same_whatever_the_threads_and_the_others(name: str, values: Values) -> None:
    packed = packed_matrix(599, 640, values)
    X = torch.randn(23, 640).bfloat16()
    with running(name) as backend:
        one = packed_matmul(X, packed, backend=backend)
        torch.set_num_threads(3)  # a fixture puts it back
        assert torch.equal(one, packed_matmul(X, packed, backend=backend))
        assert torch.equal(one[5:16], packed_matmul(X[5:16], packed, backend=backend))
        assert torch.equal(one[:, 7:500], packed_matmul(X, packed.rows(7, 500), backend=backend))


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("name", NATIVE)
def test_nearly_empty_and_full(name: str, density: float, values: Values) -> None:
    """A full word of an odd number of nibbles into a row is the longest that is read."""
    W = matrix(5, 450)
    W[:, 128:] = torch.where(torch.rand(5, 322) < density, torch.randn(5, 322), 0).bfloat16()
    W[:, :1] = 1
    with running(name) as backend:
        check(torch.randn(2, 450).bfloat16(), pack(W, values), None, backend)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", NATIVE)
def test_largest_values_and_outliers(name: str, values: Values) -> None:
    """Sums of integers do not overflow, and a token 10 000 times the others costs none of their accuracy."""
    W = torch.full((4, 1024), 3.0).bfloat16()
    W[1] = -3
    W[:, 700:] = matrix(4, 324)
    X = torch.full((3, 1024), -100.0).bfloat16()
    X[1] = torch.randn(1024)
    X[2] = torch.randn(1024)
    X[2, 5] = 10_000
    with running(name) as backend:
        for group in [None] if values == "same" else [64, 256, 1024]:
            check(X, pack(W, values, group), None, backend)
            check(X[1:2] * 1e-30, pack(W, values, group), None, backend)


@pytest.mark.parametrize("name", CPU)
def test_threads_and_slices_of_a_batch(name: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", 40_000)
    monkeypatch.setattr(module, "MANY", 20)
    for values in KINDS:
        packed = packed_batch(values)
        for tokens in (2, 20, 21):
            X = torch.randn(tokens, 640).bfloat16()
            with running(name) as backend:
                dense = weights(packed, backend, tokens).float()
                for e in range(3):
                    found = packed_matmul(X, packed, matrix=e, backend=backend)
                    assert_close(found, X.double() @ dense[e].double().T, (X.float() @ dense[e].T).bfloat16())


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_is_the_same_whatever_the_threads_and_the_others(name: str) -> None:
    packed = packed_matrix(599, 640, "int4")
    X = torch.randn(4, 640).bfloat16()
    with running(name) as backend:
        one = packed_matmul(X, packed, backend=backend)
        torch.set_num_threads(3)  # a fixture puts it back
        assert torch.equal(one, packed_matmul(X, packed, backend=backend))
        assert torch.equal(one[2:3], packed_matmul(X[2:3], packed, backend=backend))
        assert torch.equal(one[:, 7:500], packed_matmul(X, packed.rows(7, 500), backend=backend))


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("name", CPU)
def test_what_is_not_finite_shows_in_its_token_alone(name: str, values: Values) -> None:
    packed = packed_matrix(6, 200, values)
    X = torch.randn(3, 200).bfloat16()
    X[1, 70], X[2, 3] = torch.nan, torch.inf
    with running(name) as backend:
        found = packed_matmul(X, packed, backend=backend)
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize("name", NATIVE)
def test_tiles_hold_the_dense_matrix_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied for many tokens is what `unpack` gives, subnormals, -0.0 and NaN included."""
    seen: list[Tensor] = []
    real = F.linear

    def noted(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(W.clone())
        return real(X, W, bias)

    monkeypatch.setattr(F, "linear", noted)
    monkeypatch.setattr(module, "TILE_BYTES", 3000)
    monkeypatch.setattr(module, "MANY", 16)
    for own in (torch.bfloat16, torch.float16, torch.float32):
        W = matrix(13, 201, dtype=own)
        W[0, :4] = torch.tensor([-0.0, torch.nan, torch.finfo(own).smallest_normal / 8, torch.inf]).to(own)
        for values in KINDS:
            packed = pack(W if values == "same" else matrix(13, 201, dtype=own) * 0.1, values)
            for dtype in {own, torch.float32}:
                seen.clear()
                with running(name) as backend:
                    packed_matmul(torch.randn(17, 201).to(dtype), packed, backend=backend)
                tiles, dense = torch.cat(seen), unpack(packed).to(seen[0].dtype)
                assert len(seen) > 1 and torch.equal(tiles.view(torch.uint8), dense.view(torch.uint8))


def test_shapes_of_tokens() -> None:
    packed = pack(matrix(6, 130))
    X = torch.randn(2, 3, 260).bfloat16()[..., ::2]
    Y = packed_matmul(X, packed)
    assert Y.shape == (2, 3, 6) and torch.equal(Y.view(6, 6), packed_matmul(X.reshape(6, 130), packed))
    assert packed_matmul(X[0, 0], packed).shape == (6,) and packed_matmul(X[:0], packed).shape == (0, 3, 6)


def test_a_whole_graph_to_torch_compile() -> None:
    packed, X = packed_batch("int4"), torch.randn(2, 640).bfloat16()

    def product(X: Tensor) -> Tensor:
        return packed_matmul(X * 2, packed, matrix=1) + 1

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), product(X))


def test_a_gradient_is_refused_and_not_lost() -> None:
    packed, X = pack(matrix(6, 130)), torch.randn(2, 130, requires_grad=True)
    for product in (packed_matmul, torch.compile(packed_matmul, backend="eager")):
        Y = product(X, packed)
        assert torch.equal(Y, packed_matmul(X.detach(), packed))
        with pytest.raises(RuntimeError, match="no gradient"):
            (Y.sum() + X.sum()).backward()
    with torch.no_grad():
        assert not packed_matmul(X, packed).requires_grad


def test_refuses() -> None:
    packed, X = pack(matrix(6, 130)), torch.randn(2, 130)
    with pytest.raises(ValueError, match=r"X must be bf16, fp16 or fp32 \[..., 130\]"):
        packed_matmul(X[:, :129], packed)
    with pytest.raises(ValueError, match="X must be bf16, fp16 or fp32"):
        packed_matmul(X.double(), packed)
    with pytest.raises(ValueError, match=r"bias must be \[6\]"):
        packed_matmul(X, packed, torch.zeros(7))
    with pytest.raises(ValueError, match="matrix 0 of packed ones"):
        packed_matmul(X, packed, matrix=0)
    batch = pack(matrix(6, 130).view(2, 3, 130))
    for wrong in (None, -1, 2):
        with pytest.raises(ValueError, match="of packed ones"):
            packed_matmul(X, batch, matrix=wrong)
    with pytest.raises(ValueError, match="packed matrix is on cpu and X on meta"):
        packed_matmul(X.to("meta"), packed)


@pytest.mark.skipif(not native.available(), reason="needs the native extension")
def test_limit() -> None:
    least = module.limit(1, 100, 200, 5000)
    assert least.moved == 5000 + 2 * 300 and least.flops == 40_000
