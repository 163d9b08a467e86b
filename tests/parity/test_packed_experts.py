"""Experts packed for generating text against the same experts as training has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import ModelConfig, MoEConfig, Transformer
from moe.errors import UserError
from moe.experts import Experts, swiglu_experts
from moe.ops import native as native_ops
from moe.ops.native import NativeOps, choose_native_ops
from moe.ops.packed_experts import PackedExperts, pack_experts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("native", [None, False])
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]),
)
def test_packed_experts_compute_what_they_were_packed_from(
    native: bool | None, load: list[int], kind: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = kind
    torch.manual_seed(0)
    experts = Experts(len(load), 24, 16).to(dtype)
    weights = [copy.deepcopy(w) for w in (experts.w_gate_EDF, experts.w_up_EDF, experts.w_down_EFD)]
    rows_ND, load_E = torch.randn(sum(load), 24).to(dtype), torch.tensor(load)
    with torch.no_grad():
        wanted_ND = swiglu_experts(rows_ND, weights, load_E, "loop")
        found_ND = PackedExperts(experts, native)(rows_ND, load_E)
    assert found_ND.dtype == dtype
    torch.testing.assert_close(found_ND, wanted_ND, atol=tolerance, rtol=tolerance)


def test_op_choice_names_what_computes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedExperts(Experts(2, 8, 4))
    found = choose_native_ops()
    if found.ops is not None:
        limit = f"{found.reason}, up to {found.ops.few_rows(torch.bfloat16)} rows an expert"
        assert packed.op_choice(torch.bfloat16) == ("native", limit)
        assert PackedExperts(Experts(2, 8, 4), batch_invariant=True).op_choice() == ("native", found.reason)
    name, reason = packed.op_choice(torch.float64, torch.device("meta"))
    assert (name, "they take float32 and bfloat16 on cpu, not float64 on meta" in reason) == ("loop", True)
    assert PackedExperts(Experts(2, 8, 4), native=False).op_choice() == (
        "loop",
        "weights are packed for generating text; no native ops: turned off by name",
    )
    monkeypatch.setattr(native_ops, "_choices", {})
    monkeypatch.setenv("MOEYARD_NATIVE", "0")
    assert PackedExperts(Experts(2, 8, 4)).op_choice()[1].endswith("disabled by MOEYARD_NATIVE=0")
    with pytest.raises(UserError, match=r"native ops cannot compute here: disabled by MOEYARD_NATIVE=0"):
        PackedExperts(Experts(2, 8, 4), native=True)


def test_rows_that_want_a_gradient_are_torchs() -> None:
    packed = PackedExperts(Experts(2, 8, 4))
    rows_ND = torch.randn(3, 8, requires_grad=True)
    packed(rows_ND, torch.tensor([1, 2])).sum().backward()
    assert rows_ND.grad is not None
    assert rows_ND.grad.ne(0).any(1).all()


def test_many_rows_are_torchs_unless_they_must_be_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    if choose_native_ops().ops is None:
        pytest.skip(f"{choose_native_ops().reason}: install g++ and leave MOEYARD_NATIVE unset to run this")
    calls: list[int] = []
    expert_mlp = NativeOps.expert_mlp

    def counted(self: NativeOps, rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, load: torch.Tensor) -> Any:
        calls.append(len(rows))
        return expert_mlp(self, rows, up, down, load)

    monkeypatch.setattr(NativeOps, "expert_mlp", counted)
    monkeypatch.setattr(NativeOps, "few_rows", lambda self, dtype: 4)
    experts = Experts(3, 8, 4)
    exact = PackedExperts(copy.deepcopy(experts), batch_invariant=True)
    packed = PackedExperts(experts)
    with torch.inference_mode():
        for load, native in [([4, 0, 0], True), ([5, 0, 0], False), ([5, 3, 0], True), ([9, 4, 0], False)]:
            rows_ND, load_E = torch.randn(sum(load), 8), torch.tensor(load)
            calls.clear()
            torch.testing.assert_close(packed(rows_ND, load_E), exact(rows_ND, load_E))
            assert calls == [sum(load)] * (1 + native)


@pytest.mark.parametrize("native", [None, False])
def test_every_bank_of_a_model_is_packed_and_nothing_is_held_twice(native: bool | None) -> None:
    moe = MoEConfig(num_experts=4, hidden_dim=16, num_shared_experts=1)
    model = Transformer(ModelConfig(vocab_size=40, dim=16, num_layers=3, num_heads=2, num_dense_layers=1, moe=moe))
    model.init_weights(0)
    ids_BT = torch.randint(40, (2, 9))
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        wanted_BTV = model.eval()(ids_BT).logits_BTV
        pack_experts(model, native)
        found_BTV = model(ids_BT).logits_BTV
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    assert not any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(found_BTV, wanted_BTV, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="save the model before packing"):
        next(model.moe_layers()[0][1].experts.expert_views("w_down_EDF", torch.zeros(4, 16, 16)))
