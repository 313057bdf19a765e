from __future__ import annotations

import pytest
import torch

from rac_kernels import add_expert_, slots_by_expert


@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("k", [1, 3])
def test_every_slot_goes_to_its_expert_in_order(tokens: int, k: int) -> None:
    chosen = torch.rand(tokens, 8).argsort(1)[:, :k]
    found = slots_by_expert(chosen, 8)
    expected = [[at for at, expert in enumerate(chosen.flatten().tolist()) if expert == e] for e in range(8)]
    assert [slots.tolist() for slots in found] == expected


def test_outputs_are_added_by_their_shares() -> None:
    chosen, shares = torch.rand(20, 5).argsort(1)[:, :2], torch.rand(20, 2)
    outputs = torch.randn(5, 20, 3)  # of every expert for every token
    out = torch.zeros(20, 3)
    for expert, slots in enumerate(slots_by_expert(chosen, 5)):
        tokens = slots // 2
        assert add_expert_(out, outputs[expert, tokens], tokens, shares.flatten()[slots]) is out
    expected = sum(shares[:, [j]].double() * outputs[chosen[:, j], torch.arange(20)].double() for j in range(2))
    torch.testing.assert_close(out.double(), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)
