"""BASE: every expert gets exactly T / E tokens of the batch, by an assignment of most total score.

Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models", ICML 2021 (arXiv:2103.16716). One expert a
token; its output is mixed with the token by sigmoid(score): y = a f(x) + (1 - a) x. The paper solves the assignment by
an auction; here it is exact (:func:`gates.solvers.assignment.balanced_assignment`), which also gives the experts'
prices. The paper generates with the best score, ignoring balance; here with the best score minus the running mean of
prices.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gates.base import GateInput
from gates.plan import RoutingPlan
from gates.potentials import PotentialConfig, PotentialGate
from gates.registry import register_gate
from gates.scores import top_k
from gates.solvers.assignment import balanced_assignment


class BaseConfig(PotentialConfig):
    """Options of BASE layers."""

    name: Literal["base"] = "base"
    mix_identity: bool = Field(True, description="add (1 - weight) times the token, as the paper does")
    gain: float = Field(0.1, gt=0, description="gain of the orthogonal initial weight; init_std is not used")

    def experts_per_token(self, num_experts: int) -> float:
        """One."""
        return 1.0

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        if self.init_std != type(self).model_fields["init_std"].default:
            return ["init_std: has no effect: the initial weight is orthogonal, of the given gain"]
        return []


@register_gate("base")
class BaseGate(PotentialGate):
    """Balanced assignment in training, best score minus price elsewhere. See the module."""

    config_type = BaseConfig
    config: BaseConfig
    weight_sum = "at_most_one"

    @property
    def max_k(self) -> int:
        return 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Orthogonal expert vectors."""
        device = self.weight.device if generator is None else generator.device
        drawn = torch.empty(self.weight.shape, dtype=torch.float32, device=device)
        with torch.no_grad():
            self.weight.copy_(nn.init.orthogonal_(drawn, self.config.gain, generator=generator))

    def choose_batch(self, logits_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        """See :class:`PotentialGate`. What does not divide goes to the experts with the highest mean score."""
        num_tokens, num_experts = logits_TE.shape
        capacity_E = torch.full((num_experts,), num_tokens // num_experts)
        favoured_E = torch.argsort(-logits_TE.mean(0), stable=True)[: num_tokens % num_experts]
        capacity_E[favoured_E.cpu()] += 1
        expert_T, bonus_E = balanced_assignment(logits_TE, capacity_E)
        return RoutingPlan.from_topk(expert_T.unsqueeze(1), logits_TE, num_experts), bonus_E.to(logits_TE.dtype)

    def choose_frozen(self, logits_TE: Tensor, potential_E: Tensor) -> RoutingPlan:
        """The best score minus price."""
        return RoutingPlan.from_topk(top_k(logits_TE + potential_E, 1), logits_TE, self.num_experts)

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """sigmoid(score), and one minus it for the token itself."""
        weight_N = chosen.pick(logits_TE).sigmoid()
        residual_T = 1 - chosen.sum_rows(weight_N) if self.config.mix_identity else None
        return replace(chosen.with_weight(weight_N), residual_T=residual_T)
