"""A reason is its text to people and its code to programs."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from rac_engine.solve.reasons import Reason, ReasonCode


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda reason: pickle.loads(pickle.dumps(reason))])
def test_a_copy_of_a_reason_has_its_code(made) -> None:
    reason = made(Reason(ReasonCode.NO_TOKEN, "no token reached it"))
    assert reason == "no token reached it" and reason.code is ReasonCode.NO_TOKEN


def test_a_reason_is_written_as_its_text_and_its_code() -> None:
    reason = Reason(ReasonCode.SPARSITY_ZERO, "sparsity 0")
    assert json.dumps([reason, reason.code]) == '["sparsity 0", "sparsity_zero"]'
