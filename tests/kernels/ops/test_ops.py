"""Every operation that is registered with torch: its schema, fake and functionalization, in all backends of a CPU; and
that the public functions are whole graphs to torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rac_kernels
from rac_kernels.backends import native
from rac_kernels.testing import gram

BACKENDS = ("reference", "native") if native.available() else ("reference",)
N, ROWS, TOKENS = 40, 6, 30
SPLIT = ([20, 10], 0.3)  # lengths of sequences, and the scale of their scores


def tokens(n: int = N) -> Tensor:
    return torch.randn(TOKENS, n)


def packed() -> Tensor:
    """The bytes of a matrix of int4 values."""
    return rac_kernels.pack(torch.randn(2 * ROWS, N).bfloat16(), "int4").data


def mask() -> Tensor:
    return torch.rand(ROWS, N) < 0.5


#: Arguments for each op but the backend, which comes last.
CASES: dict[str, list[Callable[[], tuple[object, ...]]]] = {
    "hessian_accumulate_": [
        lambda: (gram("plain", N), tokens(), None),
        lambda: (gram("plain", N), tokens(2 * N)[:, ::2].bfloat16(), torch.rand(TOKENS)),
    ],
    "cross_accumulate_": [
        lambda: (torch.zeros(N, 9), tokens(), tokens(9), None),
        lambda: (torch.zeros(N, 9), tokens().half(), tokens(9).half(), torch.rand(TOKENS)),
    ],
    "column_norm_accumulate_": [lambda: (torch.zeros(N), tokens(), torch.rand(TOKENS))],
    "packed_attention_": [
        lambda: (
            torch.zeros(TOKENS, 4, 8).bfloat16(),
            *(torch.randn(h, TOKENS, 8).bfloat16() for h in (4, 2, 2)),
            *SPLIT,
        )
    ],
    "packed_matmul": [
        lambda: (tokens().bfloat16(), packed(), torch.rand(4), 2 * ROWS, N, 3, 4, 0, 2, 64),
        lambda: (tokens().bfloat16()[:2, None], packed(), None, 2 * ROWS, N, 0, 2 * ROWS, 0, 2, 64),
    ],
    "symmetrize_": [lambda: (gram("plain", N),)],
    "factor_": [lambda: (torch.stack([gram("plain", N), gram("dead", N)]), 0.01, 1.0, True)],
    "refactor_": [lambda: (gram("plain", N), gram("plain", N).diagonal().clone())],
    "inverse_": [lambda: (torch.randn(N, N).triu() + N * torch.eye(N),)],
    "sweep": [
        lambda: (torch.randn(ROWS, N), torch.eye(N), None, 0.5, 0, 0, 16, [4, 2]),
        lambda: (torch.randn(ROWS, N).bfloat16(), torch.eye(N), torch.rand(N) < 0.1, 0.5, 2, 4, 16, [ROWS]),
    ],
    "refine": [
        lambda: (torch.randn(ROWS, N), gram("plain", N), torch.randn(ROWS, N), mask(), "full", None, 3, 1e-3, "auto"),
        lambda: (
            *(torch.randn(ROWS, N), gram("plain", N), torch.randn(ROWS, N), None),
            *("lower", torch.full((N,), 200.0), 3, 1e-3, "gradients"),
        ),
    ],
    "round_kept": [
        lambda: (
            *(torch.randn(ROWS, N), gram("plain", N), torch.randn(ROWS, N), mask(), torch.rand(ROWS, 3)),
            *(7, 16, 2, False, torch.bfloat16),
        ),
    ],
    "kth_smallest": [lambda: (torch.randn(N), 7), lambda: (torch.randn(4, N).half(), 7)],
    "mask_by_score": [
        lambda: (torch.rand(ROWS, N), 9, True, 0, 0),
        lambda: (torch.rand(ROWS, N), 9, False, 0, 0),
        lambda: (torch.rand(ROWS, N).double(), 0, True, 2, 4),
    ],
}


def test_every_registered_op_is_checked() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rac::")]
    assert {name.removeprefix("rac::") for name in names} == set(CASES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_opcheck(name: str, case: Callable[[], tuple[object, ...]], backend: str) -> None:
    torch.library.opcheck(getattr(torch.ops.rac, name).default, (*case(), backend))


def calibrate(X: Tensor, Y: Tensor, H: Tensor, C: Tensor, s: Tensor) -> Tensor:
    rac_kernels.hessian_accumulate_(H, X * 2)
    rac_kernels.cross_accumulate_(C, X, Y + 1)
    rac_kernels.column_norm_accumulate_(s, X)
    return rac_kernels.symmetrize_(H) @ C + s[:, None]


def solve(H: Tensor, W: Tensor, added: Tensor) -> tuple[Tensor, ...]:
    factor = rac_kernels.factor_(H * 2, 0.02)
    Q = rac_kernels.sweep(W * 2, factor.U, 0.5, dead=factor.dead, row_groups=[4, 2])
    N_M = rac_kernels.sweep(W * 2, factor.U, pattern="2:4", dead=factor.dead)
    rac_kernels.refactor_(factor, added)
    several = [one.U.triu() for one in rac_kernels.factor_batch_(torch.stack([H, H + 1]))]
    return Q + 1, N_M, factor.U.triu(), factor.used, *several


def improve(H: Tensor, W: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    Q, how = rac_kernels.refine(W * keep, H, W, keep > 0)
    return Q + 1, how.rows.clone()


def mark(scores: Tensor) -> tuple[Tensor, ...]:
    rows = rac_kernels.mask_by_score(scores * 2, 0.5)
    matrix = rac_kernels.mask_by_score(scores, 0.3, per="matrix")
    pattern = rac_kernels.mask_by_score(scores, pattern="2:4")
    return rows & matrix, ~pattern, rac_kernels.kth_smallest(scores, 5) + 1


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (calibrate, lambda: (tokens(), tokens(7), torch.zeros(N, N), torch.zeros(N, 7), torch.zeros(N))),
        (solve, lambda: (gram("dead", N), torch.randn(ROWS, N), torch.rand(N))),
        (improve, lambda: (gram("dead", N), torch.randn(ROWS, N), mask().float())),
        (mark, lambda: (torch.rand(ROWS, N),)),
    ],
    ids=["calibrate", "solve", "improve", "mark"],
)
def test_a_whole_graph_to_torch_compile(
    function: Callable[..., object], arguments: Callable[[], tuple[Tensor, ...]]
) -> None:
    given = arguments()
    mine, theirs = [x.clone() for x in given], [x.clone() for x in given]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*mine), function(*theirs), rtol=0, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)  # what is changed in place, too


def test_errors_in_a_compiled_graph_are_the_same() -> None:
    compiled = torch.compile(rac_kernels.mask_by_score, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="scores contain NaN"):
        compiled(torch.full((3, 8), torch.nan))
    factor = torch.compile(rac_kernels.factor_, backend="aot_eager", fullgraph=True)
    with pytest.raises(rac_kernels.FactorError, match=r"H \[3, 3\] holds infinities or NaN"):
        factor(torch.full((3, 3), torch.inf))
    found = factor(torch.eye(3), 0.03)
    assert (found.damping, found.ridge, found.attempts) == (0.03, 0.03, [0.03])
