"""Expert capacity: at most C pairs for an expert, the rest dropped. Plan -> plan.

The default of every gate is dropless; capacity is for reproducing older models and for hardware with fixed buffers.

Shape suffixes: T tokens, E experts, N offered pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from gates.plan import RoutingPlan, keep_pairs

DropPolicy = Literal["position", "choice", "probs", "random"]


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float, minimum: int = 1) -> int:
    """max(minimum, ceil(factor * T * k / E)), in exact decimal arithmetic: 1.1 * 50 is 55, not 56."""
    return max(minimum, math.ceil(Fraction(repr(float(factor))) * num_tokens * k / num_experts))


def apply_capacity(
    plan: RoutingPlan,
    capacity: int,
    policy: DropPolicy = "position",
    score_N: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> RoutingPlan:
    """Keep the ``capacity`` first pairs of every expert, in the order that ``policy`` gives.

    Args:
        plan: the selection; ``offered_E`` of the result still counts what is dropped.
        capacity: most pairs that one expert keeps.
        policy: who is served first. "position": earlier tokens (Switch). "choice": all first choices before all second
            ones, then earlier tokens (GShard). "probs": higher ``score_N`` (batch-prioritised routing, V-MoE).
            "random": in random order (DeepSpeed's random token selection). Ties go to the earlier pair.
        score_N: (N,) priority of each pair, for "probs".
        rng: source of the order, for "random".

    Raises:
        ValueError: the policy lacks what it needs, or the capacity is negative.
    """
    if capacity < 0:
        raise ValueError(f"capacity: {capacity} is negative")
    order_N = _priority_order(plan, policy, score_N, rng)
    if capacity >= plan.num_pairs or bool((plan.load_E <= capacity).all()):
        return plan
    # Sort by expert, by priority within an expert: a pair's place in its expert's queue is its place in the run.
    by_expert_N = torch.argsort(plan.expert_N if order_N is None else plan.expert_N[order_N], stable=True)
    pair_N = by_expert_N if order_N is None else order_N[by_expert_N]
    begin_E = plan.load_E.cumsum(0) - plan.load_E
    place_N = torch.arange(plan.num_pairs, device=pair_N.device) - begin_E.repeat_interleave(plan.load_E)
    keep_N = torch.empty_like(pair_N, dtype=torch.bool)
    keep_N[pair_N] = place_N < capacity
    return keep_pairs(plan, keep_N)


def normalise_rows(plan: RoutingPlan, total: float = 1.0) -> RoutingPlan:
    """The same pairs with the weights of each token rescaled to add up to ``total`` (GShard, after its drops)."""
    token_N = plan.token_N()
    sum_T = plan.weight_N.new_zeros(plan.num_tokens).index_add(0, token_N, plan.weight_N)
    tiny = torch.finfo(sum_T.dtype).tiny
    return replace(plan, weight_N=plan.weight_N * (total / sum_T.clamp_min(tiny))[token_N])


def _priority_order(
    plan: RoutingPlan, policy: DropPolicy, score_N: Tensor | None, rng: torch.Generator | None
) -> Tensor | None:
    """(N,) pairs from first served to last; None for the order in which they stand."""
    if policy == "position":
        return None
    if policy == "choice":
        rank_N = torch.arange(plan.num_pairs, device=plan.expert_N.device) - plan.row_ptr_T1[plan.token_N()]
        return torch.argsort(rank_N, stable=True)
    if policy == "probs":
        if score_N is None or score_N.shape != plan.expert_N.shape:
            raise ValueError(f'drop policy "probs" needs score_N, one number for each of the {plan.num_pairs} pairs')
        return torch.argsort(score_N.detach(), descending=True, stable=True)
    if policy == "random":
        if rng is None:
            raise ValueError('drop policy "random" needs rng')
        return torch.randperm(plan.num_pairs, generator=rng, device=rng.device).to(plan.expert_N.device)
    raise ValueError(f"unknown drop policy {policy!r}; known: position, choice, probs, random")
