"""Mutual choice: the best M affinities of the whole batch are the pairs, however they spread over tokens and experts.

Ayonrinde 2024 (arXiv:2411.02124), equal to BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) with tokens as samples
and experts as features. M is ``mean_k`` times the tokens: easy tokens visit few experts, hard ones many. Nothing bounds
what one expert gets, hence ``load_cap``.

Shape suffixes: T tokens, E experts, M pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.batch_choice import BatchChoiceConfig, BatchChoiceGate, between
from gates.capacity import expert_capacity
from gates.expert_choice import best_of_columns
from gates.feature_choice import affinity
from gates.registry import register_gate
from gates.scores import top_k


class MutualChoiceConfig(BatchChoiceConfig):
    """Options of mutual choice."""

    name: Literal["mutual_choice"] = "mutual_choice"
    mean_k: float = Field(2.0, gt=0, description="mean experts per token")
    load_cap: float | None = Field(
        4.0, ge=1, description="an expert takes at most this many times the mean load of the batch; null: no limit"
    )
    affinity: Literal["sigmoid", "relu"] = Field("sigmoid", description="what a logit is compared by")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss, which is 1 at perfect balance")

    def experts_per_token(self, num_experts: int) -> float:
        """The mean that is asked for."""
        return min(self.mean_k, float(num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = super().check(num_experts)
        if self.mean_k > num_experts:
            problems.append(f"mean_k: {self.mean_k:g} experts per token, but there are only {num_experts}")
        return problems


@register_gate("mutual_choice")
class MutualChoiceGate(BatchChoiceGate):
    """A linear gate with one threshold for all pairs. See the module."""

    config_type = MutualChoiceConfig
    config: MutualChoiceConfig

    def scores(self, logits_TE: Tensor) -> Tensor:
        """The affinity of each pair."""
        return affinity(logits_TE, self.config.affinity)

    def pick_batch(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The best M of all entries that the experts' caps leave."""
        num_tokens, num_experts = score_TE.shape
        open_TE, cap_E = score_TE, torch.zeros_like(score_TE[0])
        if self.config.load_cap is not None:
            factor = self.config.mean_k * self.config.load_cap
            capacity = min(num_tokens, expert_capacity(num_tokens, 1, num_experts, factor))
            capacity_E = torch.full((num_experts,), capacity, device=score_TE.device)
            within_TE, last_E = best_of_columns(score_TE, capacity_E)
            open_TE = score_TE.masked_fill(~within_TE, 0.0)
            if capacity < num_tokens:  # an expert at its cap has a threshold of its own
                cap_E = last_E
        pairs = min(max(1, round(self.config.mean_k * num_tokens)), open_TE.numel())
        flat_M = open_TE.reshape(-1)
        index_M = top_k(flat_M.unsqueeze(0), min(pairs + 1, flat_M.numel())).squeeze(0)
        mask_M = torch.zeros_like(flat_M, dtype=torch.bool)
        mask_M[index_M[:pairs]] = True
        last, following = flat_M[index_M[pairs - 1]], flat_M[index_M[-1]]
        threshold = between(last, following if index_M.numel() > pairs else torch.zeros_like(last))
        return mask_M.view_as(score_TE) & (open_TE > 0), torch.maximum(threshold, cap_E)
