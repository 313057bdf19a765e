"""What a calibration's tokens teach: the law of errors held out by errors seen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rac_engine.plan.plan import make_plan
from rac_engine.plan.text import render
from rac_engine.recipe.settings import PruneSettings
from rac_engine.solve.generalisation import MOST, enough_tokens, expected_gap
from rac_engine.solve.matrices import prune_matrix
from rac_engine.solve.methods import find_method
from rac_kernels import hessian_accumulate_, objective

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_the_gap_falls_with_the_tokens_and_rises_with_the_inputs() -> None:
    for name in ("admm", "sparsegpt"):
        method = find_method(name)
        gap = expected_gap(method, 1536, 8000, 0.6)
        assert gap is not None and gap > 1 and method.learns is not None
        few, wide = expected_gap(method, 1536, 4000, 0.6), expected_gap(method, 3072, 8000, 0.6)
        assert few is not None and few == wide and few - 1 == pytest.approx(2 * (gap - 1))
        sparse = expected_gap(method, 1536, 8000, 0.8)
        assert sparse is not None and sparse - 1 == pytest.approx((gap - 1) / 2)
        enough = enough_tokens(method, 1536, 0.6)
        assert enough is not None and expected_gap(method, 1536, enough, 0.6) == pytest.approx(MOST, rel=1e-3)
    assert (
        expected_gap(find_method("magnitude"), 576, 1000, 0.6) is None
        and enough_tokens(find_method("wanda"), 9, 0.6) is None
    )
    assert expected_gap(find_method("admm"), 576, 0, 0.6) is None


def test_the_law_has_the_form_of_what_is_measured() -> None:
    """Twice the tokens halve what is learnt by heart of independent ones: 2 d / t, with d the weights that are kept."""
    torch.manual_seed(0)
    n, rows = 96, 64
    W, mix = torch.randn(rows, n), torch.randn(n, n) * torch.linspace(0.2, 1, n)
    others = torch.randn(20_000, n) @ mix

    def gap(tokens: int) -> float:
        x, H, held = torch.randn(tokens, n) @ mix, torch.zeros(n, n), torch.zeros(n, n)
        hessian_accumulate_(H, x)
        hessian_accumulate_(held, others)
        made = prune_matrix(W, H, method="admm", sparsity=0.5, damping=0.0001)
        assert made.objective is not None
        return objective(W, made.weight, held) / len(others) / (made.objective / tokens)

    gaps = {tokens: gap(tokens) for tokens in (1000, 2000, 4000)}
    assert gaps[1000] - 1 == pytest.approx(2 * n / 2 / 1000 * 2, rel=0.6)
    assert (gaps[1000] - 1) / (gaps[4000] - 1) == pytest.approx(4, rel=0.35)


def test_a_plan_says_what_to_expect_and_warns(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    plan = make_plan(tmp_path, PruneSettings(sparsity=0.6), tokens=8_000, length=200)
    gaps = {group.columns: group.gap for group in plan.groups}
    assert gaps[1536] == expected_gap(find_method("admm"), 1536, 8_000, 0.6)
    page = render(plan)
    assert f"  8k tokens, 1,536 inputs, 576 outputs: expect a held-out error {gaps[1536]:.2f} times the seen" in page
    assert "  warning: too few tokens; with " in page
    rich = make_plan(tmp_path, PruneSettings(sparsity=0.6), tokens=1_000_000)
    assert "expect a held-out error" in render(rich) and "warning" not in render(rich)
    exact = make_plan(tmp_path, PruneSettings(sparsity=0.6), tokens=plan.groups[-1].enough or 0)
    assert exact.groups[-1].gap == pytest.approx(MOST, rel=1e-3) and "warning" not in render(exact)
    for settings in (PruneSettings(method="wanda"), PruneSettings(reconstruct="layer")):
        assert "held-out error" not in render(make_plan(tmp_path, settings, tokens=8_000))


def test_experts_are_sent_their_share_of_the_tokens(tmp_path) -> None:
    mixture = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(mixture))
    plan = make_plan(tmp_path, tokens=80_000)
    (expert,) = [group for group in plan.groups if group.columns == 1536]
    assert expert.tokens == 20_000 and expert.gap == expected_gap(find_method("admm"), 1536, 20_000, 0.5)
    assert expert.enough == 4 * (enough_tokens(find_method("admm"), 1536, 0.5) or 0)


def test_a_method_that_was_not_measured_promises_nothing() -> None:
    assert expected_gap(replace(find_method("admm"), learns=None), 576, 8000, 0.6) is None
