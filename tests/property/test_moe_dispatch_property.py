"""What holds for every plan: nothing lost, nothing doubled, order does not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gates import RoutingPlan
from moe.dispatch import LocalDispatcher
from moe.experts import Experts

pytestmark = pytest.mark.unit


@st.composite
def plans(draw: st.DrawFn) -> RoutingPlan:
    """Any rows: none, some or all of the experts, in any order within a row when K is fixed."""
    num_tokens, num_experts = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight_TE = torch.rand(num_tokens, num_experts, generator=rng)
    if draw(st.booleans()):
        k = draw(st.integers(1, num_experts))
        expert_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :k]
        return RoutingPlan.from_topk(expert_TK, weight_TE.gather(1, expert_TK), num_experts)
    mask_TE = torch.rand(num_tokens, num_experts, generator=rng) < draw(st.floats(0, 1))
    return RoutingPlan.from_mask(mask_TE, weight_TE)


@settings(max_examples=80, deadline=None)
@given(plans())
def test_dispatch_then_combine_is_multiplication_by_the_weights(plan: RoutingPlan) -> None:
    x_TD = torch.randn(plan.num_tokens, 4, generator=torch.Generator().manual_seed(0))
    dispatcher = LocalDispatcher()
    rows_ND, load_e, ticket = dispatcher.dispatch(x_TD, plan)
    assert load_e.tolist() == torch.bincount(plan.expert_N, minlength=plan.num_experts).tolist()
    assert torch.equal(rows_ND, x_TD[plan.token_N()[plan.expert_order_N()]])
    expected = x_TD * plan.dense_weight_TE().sum(1, keepdim=True)
    torch.testing.assert_close(dispatcher.combine(rows_ND, ticket), expected)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_the_layer_is_linear_in_the_dense_weights(plan: RoutingPlan) -> None:
    torch.manual_seed(0)
    experts = Experts(plan.num_experts, 4, 8)
    x_TD = torch.randn(plan.num_tokens, 4)
    dispatcher = LocalDispatcher()
    rows_ND, load_e, ticket = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(experts(rows_ND, load_e), ticket)
    every_TED = torch.stack(
        [
            experts(x_TD, torch.tensor([plan.num_tokens * (e == i) for i in range(plan.num_experts)]))
            for e in range(plan.num_experts)
        ],
        1,
    )
    expected = (plan.dense_weight_TE().unsqueeze(-1) * every_TED).sum(1)
    torch.testing.assert_close(y_TD, expected, atol=1e-6, rtol=1e-5)
