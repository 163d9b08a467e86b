"""How evenly experts are used: pure functions of loads and plans, each a 0-d detached tensor.

Shape suffix: E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gates.plan import RoutingPlan


def imbalance(load_E: Tensor) -> Tensor:
    """max / mean load: 1 is perfect, E is one expert taking all; 1 when nothing is routed."""
    total = load_E.sum()
    return torch.where(total > 0, load_E.amax() * load_E.numel() / total.clamp_min(1), 1.0)


def max_vio(load_E: Tensor) -> Tensor:
    """max / mean load - 1, "maximal violation" (Wang et al. 2024, arXiv 2408.15664, section 3.1)."""
    return imbalance(load_E) - 1


def dead_fraction(load_E: Tensor) -> Tensor:
    """Share of experts without any token."""
    return (load_E == 0).float().mean()


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load as a share of log(E): 1 is perfect, 0 is one expert taking all; 1 when nothing is routed."""
    total = load_E.sum()
    share_E = load_E / total.clamp_min(1)
    entropy = torch.special.entr(share_E).sum() / math.log(max(2, load_E.numel()))
    return torch.where((total > 0) & (load_E.numel() > 1), entropy, 1.0)


def dropped_fraction(plan: RoutingPlan) -> Tensor:
    """Share of offered pairs that capacity dropped; 0 when nothing was offered."""
    return plan.dropped / plan.offered_E.sum().clamp_min(1)


def experts_per_token(plan: RoutingPlan, num_valid: int | None = None) -> Tensor:
    """Mean kept experts per token.

    Args:
        num_valid: tokens that are not padding; None: all of the plan's.
    """
    tokens = plan.num_tokens if num_valid is None else num_valid
    return torch.tensor(plan.num_pairs / max(1, tokens))


def agreement(plan: RoutingPlan, other: RoutingPlan) -> Tensor:
    """Jaccard index of two plans for the same tokens: pairs in both / pairs in either; 1 when neither has any."""
    visits_TE, others_TE = (
        torch.zeros(p.num_tokens, p.num_experts, dtype=torch.bool, device=p.expert_N.device).index_put(
            (p.token_N(), p.expert_N), torch.tensor(True, device=p.expert_N.device)
        )
        for p in (plan, other)
    )
    either = (visits_TE | others_TE).sum()
    return torch.where(either > 0, (visits_TE & others_TE).sum() / either.clamp_min(1), 1.0)


def plan_metrics(plan: RoutingPlan, num_valid: int | None = None) -> dict[str, Tensor]:
    """What every gate reports about its plan. Balance is that of the offered load: drops would make it look better."""
    return {
        "max_vio": max_vio(plan.offered_E),
        "load_entropy": load_entropy(plan.offered_E),
        "dead_frac": dead_fraction(plan.offered_E),
        "dropped_frac": dropped_fraction(plan),
        "experts_per_token": experts_per_token(plan, num_valid),
    }
