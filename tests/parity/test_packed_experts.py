"""Experts packed for generating text against the same experts as training has them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import ModelConfig, MoEConfig, Transformer
from moe.experts import Experts, swiglu_experts
from moe.ops.packed_experts import PackedExperts, pack_experts

pytestmark = pytest.mark.unit


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]),
)
def test_packed_experts_compute_what_they_were_packed_from(load: list[int], kind: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = kind
    torch.manual_seed(0)
    experts = Experts(len(load), 24, 16).to(dtype)
    weights = [copy.deepcopy(w) for w in (experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD)]
    rows_ND, load_E = torch.randn(sum(load), 24).to(dtype), torch.tensor(load)
    with torch.no_grad():
        wanted_ND = swiglu_experts(rows_ND, weights, load_E, "loop")
        found_ND = PackedExperts(experts)(rows_ND, load_E)
    assert found_ND.dtype == dtype
    torch.testing.assert_close(found_ND, wanted_ND, atol=tolerance, rtol=tolerance)


def test_every_bank_of_a_model_is_packed_and_nothing_is_held_twice() -> None:
    moe = MoEConfig(num_experts=4, hidden_dim=16, num_shared_experts=1)
    model = Transformer(ModelConfig(vocab_size=40, dim=16, num_layers=3, num_heads=2, num_dense_layers=1, moe=moe))
    model.init_weights(0)
    ids_BT = torch.randint(40, (2, 9))
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        wanted_BTV = model.eval()(ids_BT).logits_BTV
        pack_experts(model)
        found_BTV = model(ids_BT).logits_BTV
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    assert not any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(found_BTV, wanted_BTV, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="save the model before packing"):
        next(model.moe_layers()[0][1].experts.expert_views("w_down_EDF", torch.zeros(4, 16, 16)))
