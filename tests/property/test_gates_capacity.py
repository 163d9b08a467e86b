"""Capacity against a loop, for arbitrary plans.

Shape suffixes: T tokens, E experts, N offered pairs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gates import RoutingPlan
from gates.capacity import DropPolicy, apply_capacity, expert_capacity, normalise_rows

pytestmark = pytest.mark.unit
POLICIES: list[DropPolicy] = ["position", "choice", "probs", "random"]
quick = settings(max_examples=120, deadline=None)


@st.composite
def plans(draw: st.DrawFn) -> RoutingPlan:
    """Rows of any length with distinct experts, in any order within a row."""
    num_experts = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, num_experts - 1), unique=True, max_size=num_experts)
    chosen = draw(st.lists(row, max_size=12))
    expert_N = torch.tensor([e for experts in chosen for e in experts], dtype=torch.int64)
    row_ptr_T1 = torch.tensor([0, *(len(experts) for experts in chosen)]).cumsum(0)
    weight_N = torch.linspace(0.1, 1, expert_N.numel(), dtype=torch.float64)
    load_E = torch.bincount(expert_N, minlength=num_experts)
    return RoutingPlan(row_ptr_T1, expert_N, weight_N, num_experts, load_E, load_E)


def kept_by_loop(plan: RoutingPlan, capacity: int, order: list[int]) -> list[bool]:
    """Serve the pairs in ``order``; an expert takes no more than ``capacity``."""
    room = [capacity] * plan.num_experts
    kept = [False] * plan.num_pairs
    for pair in order:
        expert = int(plan.expert_N[pair])
        if room[expert] > 0:
            room[expert] -= 1
            kept[pair] = True
    return kept


def order_by_loop(plan: RoutingPlan, policy: DropPolicy, scores: list[int], seed: int) -> list[int]:
    """Pairs from first served to last."""
    edges, rank = plan.row_ptr_T1.tolist(), {}
    for begin, end in itertools.pairwise(edges):
        rank.update({pair: pair - begin for pair in range(begin, end)})
    pairs = list(range(plan.num_pairs))
    if policy == "choice":
        return sorted(pairs, key=lambda pair: (rank[pair], pair))
    if policy == "probs":
        return sorted(pairs, key=lambda pair: (-scores[pair], pair))
    if policy == "random":
        return torch.randperm(plan.num_pairs, generator=torch.Generator().manual_seed(seed)).tolist()
    return pairs


@pytest.mark.parametrize("policy", POLICIES)
@quick
@given(plan=plans(), capacity=st.integers(0, 6), seed=st.integers(0, 5), data=st.data())
def test_capacity_against_the_loop(
    policy: DropPolicy, plan: RoutingPlan, capacity: int, seed: int, data: st.DataObject
) -> None:
    few_values = st.lists(st.integers(0, 3), min_size=plan.num_pairs, max_size=plan.num_pairs)
    scores = data.draw(few_values)  # with ties
    score_N = torch.tensor(scores, dtype=torch.float32)
    got = apply_capacity(plan, capacity, policy, score_N, torch.Generator().manual_seed(seed))
    kept = kept_by_loop(plan, capacity, order_by_loop(plan, policy, scores, seed))
    pairs = [pair for pair, stays in enumerate(kept) if stays]
    assert got.expert_N.tolist() == plan.expert_N[pairs].tolist()
    assert got.weight_N.tolist() == plan.weight_N[pairs].tolist()
    assert got.token_N().tolist() == plan.token_N()[pairs].tolist()
    assert got.load_E.tolist() == plan.load_E.clamp_max(capacity).tolist()
    assert got.offered_E.tolist() == plan.load_E.tolist()
    if len(pairs) == plan.num_pairs:
        assert got is plan
    else:
        assert got.kept_M is not None
        assert got.kept_M.tolist() == kept
    again = apply_capacity(got, capacity, policy, got.weight_N, torch.Generator().manual_seed(seed))
    assert again is got, "what fits is left alone"


@quick
@given(plan=plans(), capacity=st.integers(0, 4), total=st.floats(0.5, 3))
def test_rows_add_up_after_renormalising(plan: RoutingPlan, capacity: int, total: float) -> None:
    kept = normalise_rows(apply_capacity(plan, capacity), total)
    sums_T = kept.dense_weight_TE().sum(1)
    assert sums_T.tolist() == pytest.approx([total if size else 0.0 for size in kept.row_ptr_T1.diff().tolist()])


@quick
@given(
    tokens=st.integers(0, 5000),
    k=st.integers(1, 8),
    num_experts=st.integers(1, 64),
    hundredths=st.integers(1, 400),
    minimum=st.integers(1, 8),
)
def test_expert_capacity_is_exact(tokens: int, k: int, num_experts: int, hundredths: int, minimum: int) -> None:
    """In integers: the factor is a decimal number, not the nearest binary one."""
    expected = max(minimum, -(-hundredths * tokens * k // (100 * num_experts)))
    assert expert_capacity(tokens, k, num_experts, hundredths / 100, minimum) == expected


def test_expert_capacity_does_not_round_up_noise() -> None:
    assert math.ceil(1.1 * 50) == 56, "what a float would say"
    assert expert_capacity(50, 1, 1, 1.1) == 55


def test_what_a_policy_lacks() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[0], [0]]), torch.ones(2, 1), 2)
    with pytest.raises(ValueError, match='drop policy "probs" needs score_N, one number for each of the 2 pairs'):
        apply_capacity(plan, 1, "probs", torch.ones(3))
    with pytest.raises(ValueError, match='drop policy "random" needs rng'):
        apply_capacity(plan, 1, "random")
    with pytest.raises(ValueError, match="capacity: -1 is negative"):
        apply_capacity(plan, -1)
    with pytest.raises(ValueError, match="unknown drop policy 'fifo'; known: position, choice, probs, random"):
        apply_capacity(plan, 1, "fifo")  # type: ignore[arg-type]
