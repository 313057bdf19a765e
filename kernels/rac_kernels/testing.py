"""Helpers for tests of kernels: Gram matrices of every kind, NaN around the arguments, and the error that is allowed.

An operation's error against fp64 may be at most twice that of plain torch in the same dtypes, plus 1e-6. The tests here
use them, and so can those of an operation written elsewhere. They need torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rac_kernels.backends import native

#: The CPU's implementations that run here: the torch reference, and native code for every instruction set found.
CPU = ["reference", *native.info().get("isas", [])]

#: Without those that differ from another one only for products of two bytes.
CPU_FP32 = [name for name in CPU if name not in ("avx512bf16", "amx")]

#: Kinds of inputs that `gram` knows.
KINDS = ["plain", "correlated", "offset", "rank-deficient", "low-rank plus noise", "outliers", "wide range", "dead"]


@contextmanager
def running(name: str) -> Iterator[str]:
    """Choose one of ``CPU``; gives what to pass as ``backend=``."""
    if name == "reference":
        yield name
    else:
        with native.use_isa(name):
            yield "native"


def gram(kind: str, n: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """H = XᵀX [n, n] fp32, exactly symmetric, of inputs X with the trait that `kind` names; made on the device."""
    g = torch.Generator(device).manual_seed(seed)
    wide: dict[str, Any] = {"generator": g, "device": device, "dtype": torch.float64}

    def some(count: int) -> Tensor:
        return torch.randperm(n, generator=g, device=device)[:count]

    X = torch.randn(2 * n + 8, n, **wide)
    if kind == "correlated":
        mixed = torch.randn(n, n, generator=g, device=device) / n**0.5
        X = X @ (0.1 * torch.eye(n, device=device) + mixed).double()
    elif kind == "offset":
        X += 5
    elif kind == "rank-deficient":
        X = X[: max(n // 8, 1)]
    elif kind == "low-rank plus noise":
        X = X[:, :4] @ torch.randn(4, n, **wide)[: X[:, :4].shape[1]] + 0.05 * X
    elif kind == "outliers":
        X[:, ::29] *= 300
    elif kind == "wide range":
        X *= torch.logspace(-10, 10, n, dtype=torch.float64, device=device)[some(n)]
    elif kind == "dead":
        X[:, some(max(n // 6, 1))] = 0
    elif kind != "plain":
        raise ValueError(f"kind {kind!r} must be one of {', '.join(KINDS)}")
    return (X.T @ X).float()


class Poisoned:
    """A copy of a matrix, or of a batch of them, inside memory full of NaN: what is read beyond the edges shows."""

    view: Tensor
    """The copy: every `steps`-th row and column of the memory; its columns are contiguous if it is `turned`."""

    def __init__(self, values: Tensor, turned: bool = False, steps: tuple[int, int] = (1, 1)) -> None:
        *batch, rows, columns = values.shape
        down, across = slice(1, 1 + rows * steps[0], steps[0]), slice(2, 2 + columns * steps[1], steps[1])
        height, width = down.stop + 2, across.stop + 3
        sides = (width, height) if turned else (height, width)
        self._around = torch.full((*batch, *sides), torch.nan, dtype=values.dtype, device=values.device)
        self.view = (self._around.mT if turned else self._around)[..., down, across]
        self.view.copy_(values)

    def intact(self) -> bool:
        """Whether nothing beyond the edges was written. The copy is lost by asking."""
        self.view.fill_(torch.nan)
        return bool(self._around.isnan().all())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest element; `wanted` is fp64."""
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def triangle_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error in the upper triangle, relative to the largest element of all; `wanted` is fp64."""
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted).triu().abs().max() / wanted.abs().max().clamp_min(1e-30))


def factor_error(U: Tensor, H: Tensor) -> float:
    """The largest |U Uᵀ − H| relative to √(H_ii H_jj), which scaling the columns does not change.

    U: [n, n], of which the upper triangle counts. H: [n, n].
    """
    U, H = U.double().triu(), H.double()
    scale = H.diagonal().sqrt()
    return float(((U @ U.T - H) / scale / scale[:, None]).abs().max())


def assert_close(
    found: Tensor, wanted: Tensor, plain: Tensor, error: Callable[[Tensor, Tensor], float] = relative_error
) -> None:
    """Assert that `found` is about as near to `wanted`, in fp64, as `plain` torch in the same dtypes: within twice its
    error and 1e-6."""
    own, allowed = error(found, wanted), 2 * error(plain, wanted) + 1e-6
    assert own <= allowed, f"an error of {own:.3g} where {allowed:.3g} is allowed"
