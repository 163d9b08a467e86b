"""Feature choice: expert choice with a capacity of each expert's own, popular experts taking more tokens.

Ayonrinde, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders", 2024
(arXiv:2411.02124): column i of the affinities keeps its best m_i, with m_i in proportion to (rank_i + beta)^-alpha.
As a gate, a column is an expert; with alpha=0 every m_i is the same, which is expert choice. Affinities are sigmoids
(or ReLUs) of the logits, which are comparable across tokens.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.batch_choice import BatchChoiceConfig, BatchChoiceGate
from gates.expert_choice import best_of_columns
from gates.registry import register_gate


class FeatureChoiceConfig(BatchChoiceConfig):
    """Options of feature choice."""

    name: Literal["feature_choice"] = "feature_choice"
    mean_k: float = Field(2.0, gt=0, description="mean experts per token")
    alpha: float = Field(0.5, ge=0, description="how fast capacities fall with an expert's rank; 0: all the same")
    beta: float = Field(1.0, gt=-1, description="shift of the ranks, which begin at 0, before the power is taken")
    affinity: Literal["softmax", "sigmoid", "relu"] = Field("sigmoid", description="what a logit is compared by")

    def experts_per_token(self, num_experts: int) -> float:
        """The mean that is asked for."""
        return min(self.mean_k, float(num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = super().check(num_experts)
        if self.mean_k > num_experts:
            problems.append(f"mean_k: {self.mean_k:g} experts per token, but there are only {num_experts}")
        if self.beta <= 0 and self.alpha:
            problems.append("beta: ranks begin at 0, so it must be above 0 where alpha is not 0")
        return problems


@register_gate("feature_choice")
class FeatureChoiceGate(BatchChoiceGate):
    """A linear gate whose experts choose as many tokens as their popularity entitles them to. See the module."""

    config_type = FeatureChoiceConfig
    config: FeatureChoiceConfig

    def scores(self, logits_TE: Tensor) -> Tensor:
        """The affinity of each pair."""
        return affinity(logits_TE, self.config.affinity)

    def pick_batch(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Each column's best m_i; experts are ranked by the sum of their column."""
        rank_E = torch.argsort(torch.argsort(-score_TE.sum(0), stable=True))
        pairs = round(self.config.mean_k * score_TE.shape[0])
        num_tokens, num_experts = score_TE.shape
        capacity_E = ranked_capacities(pairs, num_tokens, num_experts, self.config.alpha, self.config.beta)
        mask_TE, threshold_E = best_of_columns(score_TE, capacity_E.to(score_TE.device)[rank_E])
        return mask_TE & (score_TE > 0), threshold_E


def affinity(logits_TE: Tensor, kind: Literal["softmax", "sigmoid", "relu"]) -> Tensor:
    """(T, E) non-negative affinities."""
    if kind == "softmax":
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.relu()


def ranked_capacities(pairs: int, num_tokens: int, num_experts: int, alpha: float, beta: float) -> Tensor:
    """(E,) int64 tokens for the expert of each rank: in proportion to (rank + beta)^-alpha, together ``pairs``.

    None gets more than T; what would exceed it is shared out again. Rounding goes to the largest remainders, then to
    lower ranks.
    """
    share_E = (torch.arange(num_experts, dtype=torch.float64) + beta) ** -alpha if alpha else torch.ones(num_experts)
    share_E = share_E.double()
    capacity_E = torch.zeros(num_experts, dtype=torch.float64)
    open_E = torch.ones(num_experts, dtype=torch.bool)
    left = float(min(pairs, num_tokens * num_experts))
    while left > 0 and bool(open_E.any()):
        offer_E = torch.where(open_E, left * share_E / share_E[open_E].sum(), 0.0)
        full_E = open_E & (capacity_E + offer_E >= num_tokens)
        if not bool(full_E.any()):
            capacity_E += offer_E
            break
        left -= float((num_tokens - capacity_E)[full_E].sum())
        capacity_E[full_E] = num_tokens
        open_E &= ~full_E
    whole_E = capacity_E.floor().long()
    missing = min(pairs, num_tokens * num_experts) - int(whole_E.sum())
    order_E = torch.argsort(whole_E - capacity_E, stable=True)
    order_E = order_E[whole_E[order_E] < num_tokens]
    whole_E[order_E[:missing]] += 1
    return whole_E
