"""Routing plans and their transforms, against plain lists."""

from __future__ import annotations

import pytest
import torch

from gates import PlanKind, RoutingPlan
from gates.plan import apply_permutation, insert_padding, keep_pairs

pytestmark = pytest.mark.unit


def example() -> RoutingPlan:
    """Token 0 to experts 2 and 0, token 1 nowhere, token 2 to 1, 2 and 0."""
    mask_TE = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    return RoutingPlan.from_mask(mask_TE, torch.arange(9.0).view(3, 3).requires_grad_())


def test_from_topk() -> None:
    expert_TK = torch.tensor([[2, 0], [1, 2]])
    plan = RoutingPlan.from_topk(expert_TK, torch.tensor([[0.7, 0.3], [0.6, 0.4]]), 4)
    assert plan.row_ptr_T1.tolist() == [0, 2, 4]
    assert plan.expert_N.tolist() == [2, 0, 1, 2]
    assert plan.load_E.tolist() == plan.offered_E.tolist() == [1, 1, 2, 0]
    assert plan.uniform_k == 2
    assert (plan.num_tokens, plan.num_pairs, int(plan.dropped)) == (2, 4, 0)
    assert plan.token_N().tolist() == [0, 0, 1, 1]
    assert plan.expert_order_N().tolist() == [1, 2, 0, 3]
    assert plan.dense_weight_TE()[0].tolist() == pytest.approx([0.3, 0, 0.7, 0])


def test_from_topk_with_padding() -> None:
    expert_TK, weight_TK = torch.tensor([[2, 0], [1, 2], [0, 1]]), torch.rand(3, 2)
    plan = RoutingPlan.from_topk(expert_TK, weight_TK, 3, torch.tensor([True, False, True]))
    assert plan.row_ptr_T1.tolist() == [0, 2, 2, 4]
    assert plan.expert_N.tolist() == [2, 0, 0, 1]
    assert plan.uniform_k is None
    assert plan.token_N().tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_weights_are_never_narrower_than_fp32(given: torch.dtype, kept: torch.dtype) -> None:
    expert_TK, weight_TK = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=given)
    assert RoutingPlan.from_topk(expert_TK, weight_TK, 2).weight_N.dtype == kept
    assert RoutingPlan.from_mask(weight_TK > 0, weight_TK).weight_N.dtype == kept


def test_from_mask() -> None:
    plan = example()
    assert plan.row_ptr_T1.tolist() == [0, 2, 2, 5]
    assert plan.expert_N.tolist() == [0, 2, 0, 1, 2]
    assert plan.weight_N.tolist() == [0, 2, 6, 7, 8]
    assert plan.kind is PlanKind.SPARSE
    dense = RoutingPlan.from_mask(torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 3))
    assert dense.kind is PlanKind.DENSE
    assert dense.uniform_k == 3


def test_with_weight_keeps_the_selection() -> None:
    plan = example().with_weight(torch.ones(5))
    assert plan.weight_N.tolist() == [1] * 5
    with pytest.raises(ValueError, match=r"weight_N has shape \(4,\), the plan has 5 pairs"):
        plan.with_weight(torch.ones(4))


def test_keep_pairs() -> None:
    plan = example()
    kept = keep_pairs(plan, torch.tensor([True, False, False, True, True]))
    assert kept.row_ptr_T1.tolist() == [0, 1, 1, 3]
    assert kept.expert_N.tolist() == [0, 1, 2]
    assert kept.weight_N.tolist() == [0, 7, 8]
    assert kept.weight_N.requires_grad
    assert kept.load_E.tolist() == [1, 1, 1]
    assert kept.offered_E.tolist() == [2, 1, 2]
    assert int(kept.dropped) == 2
    assert kept.before_drop is not None
    assert kept.before_drop.expert_N.tolist() == plan.expert_N.tolist()
    assert not kept.before_drop.weight_N.requires_grad
    assert keep_pairs(plan, torch.ones(5, dtype=torch.bool)) is plan


def test_dropping_twice_remembers_the_first_selection() -> None:
    once = keep_pairs(example(), torch.tensor([True, False, True, True, True]))
    twice = keep_pairs(once, torch.tensor([True, False, True, False]))
    at_once = keep_pairs(example(), torch.tensor([True, False, False, True, False]))
    assert twice.expert_N.tolist() == at_once.expert_N.tolist()
    assert twice.row_ptr_T1.tolist() == at_once.row_ptr_T1.tolist()
    assert twice.offered_E.tolist() == [2, 1, 2]
    assert twice.kept_M is not None
    assert twice.kept_M.tolist() == [True, False, False, True, False]
    assert once.kept_M is not None
    assert once.kept_M.tolist() == [True, False, True, True, True], "the plan before is left alone"


def test_insert_padding() -> None:
    plan = keep_pairs(example(), torch.tensor([True, True, True, False, True]))
    valid_T = torch.tensor([False, True, True, False, True, False])
    padded = insert_padding(plan, valid_T)
    assert padded.row_ptr_T1.tolist() == [0, 0, 2, 2, 2, 4, 4]
    assert padded.expert_N.tolist() == plan.expert_N.tolist()
    assert padded.before_drop is not None
    assert padded.before_drop.row_ptr_T1.tolist() == [0, 0, 2, 2, 2, 5, 5]
    torch.testing.assert_close(padded.dense_weight_TE()[valid_T], plan.dense_weight_TE())


def test_insert_padding_keeps_the_identity_path() -> None:
    plan = RoutingPlan(**{**example().__dict__, "residual_T": torch.tensor([0.1, 1.0, 0.2])})
    padded = insert_padding(plan, torch.tensor([True, False, True, True]))
    assert padded.residual_T is not None
    assert padded.residual_T.tolist() == pytest.approx([0.1, 0, 1.0, 0.2])


def test_permutation_and_back() -> None:
    plan = keep_pairs(example(), torch.tensor([True, True, False, True, True]))
    expert_of_E = torch.tensor([1, 2, 0])
    moved = apply_permutation(plan, expert_of_E)
    assert moved.expert_N.tolist() == [1, 0, 2, 0]
    assert moved.load_E.tolist() == torch.bincount(moved.expert_N, minlength=3).tolist()
    assert moved.before_drop is not None
    assert moved.before_drop.load_E.tolist() == moved.offered_E.tolist()
    back = apply_permutation(moved, expert_of_E.argsort())
    assert back.expert_N.tolist() == plan.expert_N.tolist()
    assert back.offered_E.tolist() == plan.offered_E.tolist()


def test_detach_has_no_history() -> None:
    plan = keep_pairs(example(), torch.tensor([True, True, False, True, True])).detach()
    assert not plan.weight_N.requires_grad
    assert plan.before_drop is not None
