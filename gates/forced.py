"""Forced: routing with a prescribed skew, whatever the tokens say; for benchmarks of what comes after the gate.

Experts are drawn by a Zipf law whose exponent is set so that max / mean load is ``imbalance``; with ``drift`` the
popular experts change over steps. The draw depends on token id, position, layer and step alone, so that any split over
ranks routes alike. Weights are learned as ever, and the projection is computed, so a step costs what a real one does.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.base import GateInput
from gates.hash import mix_bits, wrapped
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.scores import top_k


class ForcedConfig(LinearGateConfig):
    """Options of forced routing."""

    name: Literal["forced"] = "forced"
    k: int = Field(2, ge=1, description="experts per token")
    imbalance: float = Field(1.0, ge=1, description="max / mean load of the experts, from 1 (even) to E / k")
    drift: float = Field(0.0, ge=0, description="how many places the order of popularity moves on in a step")
    seed: int = Field(0, ge=0, description="another number is another order of popularity and other draws")

    def experts_per_token(self, num_experts: int) -> float:
        """k."""
        return float(min(self.k, num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        if self.k > num_experts:
            return [f"k: {self.k} experts per token, but there are only {num_experts}"]
        if self.imbalance > num_experts / self.k:
            return [
                f"imbalance: {self.imbalance:g} is above E / k = {num_experts / self.k:g}, which is one expert having"
                " every token"
            ]
        return []


@register_gate("forced")
class ForcedGate(LinearGate):
    """A linear gate that does not choose. See the module."""

    config_type = ForcedConfig
    config: ForcedConfig
    interchangeable_experts = False
    needs = frozenset({"ids", "position"})

    def __init__(self, config: ForcedConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight_sum = "one" if config.k > 1 else "at_most_one"

    @property
    def max_k(self) -> int:
        return self.config.k

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`: the k largest of log p + Gumbel noise, a draw without replacement."""
        assert inp.ids_T is not None
        assert inp.position_T is not None
        config, num_experts = self.config, self.num_experts
        log_p_E = torch.tensor(zipf_log_shares(num_experts, config.k, config.imbalance), device=logits_TE.device)
        order_E = torch.argsort(
            mix_bits(torch.arange(num_experts) + wrapped(7919 * (config.seed + 1)))
        )  # who is popular
        log_p_E = log_p_E[torch.argsort(order_E).roll(int(config.drift * inp.step))]
        salt = wrapped(((config.seed * 1_000_003 + inp.layer) * 1_000_003 + inp.step) * num_experts)
        token_T = mix_bits(mix_bits(inp.ids_T) + inp.position_T + salt)
        bits_TE = mix_bits(token_T.unsqueeze(1) + torch.arange(num_experts, device=token_T.device))
        uniform_TE = ((bits_TE & (2**52 - 1)).double() + 0.5) / 2**52
        gumbel_TE = -(-uniform_TE.log()).log()
        return RoutingPlan.from_topk(top_k(log_p_E + gumbel_TE, config.k), logits_TE, num_experts), {}

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """Softmax over the chosen logits; with k=1 over all, or the task would not train the gate."""
        if self.config.k == 1:
            return chosen.with_weight(chosen.pick(logits_TE.softmax(-1)))
        return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))


@lru_cache(maxsize=64)
def zipf_log_shares(num_experts: int, k: int, imbalance: float) -> list[float]:
    """Logarithms of (rank + 1)^-s for the s at which k draws without replacement give max / mean load ``imbalance``.

    Measured on 4,096 fixed draws, to within about a hundredth.
    """
    if imbalance == 1:
        return [0.0] * num_experts
    index_TE = torch.arange(4096 * num_experts).view(4096, num_experts)
    uniform_TE = ((mix_bits(index_TE) & (2**52 - 1)).double() + 0.5) / 2**52
    gumbel_TE = -(-uniform_TE.log()).log()
    log_rank_E = (torch.arange(num_experts).double() + 1).log()

    def share_of_first(exponent: float) -> float:
        chosen_TK = (gumbel_TE - exponent * log_rank_E).topk(k, -1).indices
        return float((chosen_TK == 0).any(1).double().mean()) * num_experts / k

    low, high = 0.0, 1.0
    while share_of_first(high) < imbalance and high < 64:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of_first(middle) < imbalance else (low, middle)
    return (-high * log_rank_E).tolist()
