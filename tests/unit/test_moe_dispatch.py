"""The local dispatcher: order of rows, the way back, the identity path, empty plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gates import PlanKind, RoutingPlan
from moe.dispatch import LocalDispatcher

pytestmark = pytest.mark.unit


def test_rows_are_sorted_by_expert_then_token() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[2, 0], [0, 1], [2, 1]]), torch.ones(3, 2), 4)
    x_TD = torch.tensor([[0.0], [1.0], [2.0]])
    rows_ND, load_e, ticket = LocalDispatcher().dispatch(x_TD, plan)
    assert rows_ND.flatten().tolist() == [0, 1, 1, 2, 0, 2]
    assert load_e.tolist() == [2, 2, 2, 0]
    assert ticket.order.token_N.tolist() == [0, 1, 1, 2, 0, 2]
    assert ticket.order.pair_N.tolist() == [1, 2, 3, 5, 0, 4]
    assert ticket.order.row_N[ticket.order.pair_N].tolist() == list(range(6))


def test_combine_adds_weighted_rows() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.25, 0.75], [1.0, 2.0]]), 2)
    dispatcher = LocalDispatcher()
    rows_ND, _, ticket = dispatcher.dispatch(torch.tensor([[1.0], [10.0]]), plan)
    expert_scale = torch.tensor([[100.0], [100.0], [1.0], [1.0]])  # expert 0 multiplies by 100, expert 1 by 1
    y_TD = dispatcher.combine(rows_ND * expert_scale, ticket)
    assert y_TD.flatten().tolist() == [0.25 * 1 + 0.75 * 100, 1000 + 20]


def test_ticket_is_a_frozen_value_and_tickets_may_overlap() -> None:
    dispatcher = LocalDispatcher()
    plans = [RoutingPlan.from_topk(torch.tensor([[e], [1 - e]]), torch.ones(2, 1), 2) for e in (0, 1)]
    x_TD = torch.tensor([[1.0], [2.0]])
    first, second = (dispatcher.dispatch(x_TD, plan) for plan in plans)
    assert first.rows_ND.flatten().tolist() == [1, 2]
    assert second.rows_ND.flatten().tolist() == [2, 1]
    # Combined in the other order than dispatched.
    for dispatched in (second, first):
        assert torch.equal(dispatcher.combine(dispatched.rows_ND, dispatched.ticket), x_TD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.ticket.weight_N = None


def test_residual_path_adds_the_token_itself() -> None:
    plan = RoutingPlan.from_mask(torch.tensor([[True, False], [False, False]]), torch.full((2, 2), 0.5))
    residual_T = torch.tensor([0.25, 1.0], requires_grad=True)
    plan = dataclasses.replace(plan, residual_T=residual_T)
    x_TD = torch.tensor([[4.0, 8.0], [1.0, 3.0]], requires_grad=True)
    dispatcher = LocalDispatcher()
    rows_ND, _, ticket = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(rows_ND, ticket)
    assert y_TD.tolist() == [[3.0, 6.0], [1.0, 3.0]]  # (0.5 + 0.25) x, and x for the token without expert
    y_TD.sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.tolist() == [[0.75, 0.75], [1.0, 1.0]]
    assert residual_T.grad is not None
    assert residual_T.grad.tolist() == [12.0, 4.0]


def test_no_tokens_and_no_pairs() -> None:
    dispatcher = LocalDispatcher()
    for num_tokens in (0, 3):
        plan = RoutingPlan.from_mask(torch.zeros(num_tokens, 4, dtype=torch.bool), torch.zeros(num_tokens, 4))
        x_TD = torch.randn(num_tokens, 8, requires_grad=True)
        rows_ND, load_e, ticket = dispatcher.dispatch(x_TD, plan)
        assert rows_ND.shape == (0, 8)
        assert load_e.tolist() == [0, 0, 0, 0]
        y_TD = dispatcher.combine(rows_ND, ticket)
        assert torch.equal(y_TD, torch.zeros(num_tokens, 8))
        y_TD.sum().backward()
        assert x_TD.grad is not None
        assert torch.equal(x_TD.grad, torch.zeros(num_tokens, 8))


def test_dense_plan_visits_every_expert() -> None:
    weight_TE = torch.rand(5, 3)
    plan = RoutingPlan.from_mask(torch.ones(5, 3, dtype=torch.bool), weight_TE)
    assert plan.kind is PlanKind.DENSE
    x_TD = torch.randn(5, 2)
    rows_ND, load_e, ticket = LocalDispatcher().dispatch(x_TD, plan)
    assert load_e.tolist() == [5, 5, 5]
    torch.testing.assert_close(LocalDispatcher().combine(rows_ND, ticket), x_TD * weight_TE.sum(1, keepdim=True))


def test_plan_for_other_tokens_is_refused() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    with pytest.raises(ValueError, match=r"plan routes 2 tokens, x_TD has shape \(3, 4\)"):
        LocalDispatcher().dispatch(torch.zeros(3, 4), plan)
