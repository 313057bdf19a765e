"""Why a matrix is left dense: a code for programs and a text for people."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class ReasonCode(StrEnum):
    """Every reason there is. The codes stand in metrics.jsonl as `skipped_code`."""

    ASKED_DENSE = "asked_dense"
    """The recipe names the matrix under `dense`."""
    SPARSITY_ZERO = "sparsity_zero"
    """The recipe asks for no zeros in it."""
    NOT_FINITE = "not_finite"
    """It holds NaN or Inf, and the recipe lets such a matrix be."""
    NO_TOKEN = "no_token"
    """No calibration token reached it."""
    BEYOND_FP32 = "beyond_fp32"
    """Its inputs are beyond fp32 when squared."""
    FEW_TOKENS = "few_tokens"
    """An expert that too few calibration tokens were routed to."""


class Reason(str):
    """The text of a reason, with its `code`. Texts are for people: no program goes by them."""

    code: ReasonCode

    def __new__(cls, code: ReasonCode, text: str) -> Self:
        """Make a reason that reads as `text`."""
        made = super().__new__(cls, text)
        made.code = code
        return made

    def __getnewargs__(self) -> tuple[ReasonCode, str]:  # type: ignore[override]
        """Arguments that make a copy."""
        return self.code, str(self)
