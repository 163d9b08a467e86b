"""Top-p: the smallest set of experts whose probabilities add up to p, so that hard tokens visit more of them.

Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", ACL 2024 (arXiv:2403.07652), with p = 0.4
and an entropy loss of weight 1e-4, without which the gate flattens its probabilities and the cost explodes. With
``mean_k`` a controller moves p so that tokens visit that many experts on average (DTop-p, arXiv:2512.13996).

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.base import GateInput
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan
from gates.registry import register_gate


class TopPConfig(LinearGateConfig):
    """Options of top-p."""

    name: Literal["top_p"] = "top_p"
    p: float = Field(0.4, gt=0, le=1, description="probability that the chosen experts add up to, at the beginning")
    mean_k: float | None = Field(
        None, gt=0, description="experts per token that a controller aims at by moving p; null: p stays"
    )
    proportional: float = Field(0.05, gt=0, description="mean_k: how far p moves for an error of one expert")
    integral: float = Field(0.01, ge=0, description="mean_k: how far p moves for errors added up over steps")
    max_k: int | None = Field(8, ge=1, description="most experts of one token; null: no limit")
    renormalise: bool = Field(True, description="divide the weights of a token by their sum")
    entropy_coef: float = Field(1e-4, ge=0, description="weight of the mean entropy of a token's choice, in nats")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss, which is 1 at perfect balance")

    def experts_per_token(self, num_experts: int) -> float:
        """The mean that is aimed at; without one, 2 as the paper found for 16 experts, because p alone says nothing."""
        limit = float(min(num_experts, self.max_k or num_experts))
        return min(limit, self.mean_k or 2.0)

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        most = min(num_experts, self.max_k or num_experts)
        problems = []
        if self.mean_k is not None and not 1 <= self.mean_k <= most:
            problems.append(f"mean_k: {self.mean_k:g} must be from 1 to {most}, the most experts of one token")
        if most == 1 and self.renormalise and num_experts > 1:
            problems.append(
                "renormalise: with max_k=1 it makes every weight 1, so that the task does not train the gate; set it to"
                " false"
            )
        for name in ("proportional", "integral"):
            if self.mean_k is None and getattr(self, name) != type(self).model_fields[name].default:
                problems.append(f"{name}: has no effect without mean_k")
        return problems


@register_gate("top_p")
class TopPGate(LinearGate):
    """A linear gate whose number of experts varies with the token. See the module."""

    config_type = TopPConfig
    config: TopPConfig
    has_signals = True
    p: Tensor
    error_sum: Tensor

    def __init__(self, config: TopPConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight_sum = "one" if config.renormalise else "at_most_one"
        self.register_buffer("p", torch.tensor(config.p, dtype=torch.float32))
        self.register_buffer("error_sum", torch.tensor(0.0, dtype=torch.float32))

    @property
    def max_k(self) -> int | None:
        return self.config.max_k

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        probs_TE = logits_TE.softmax(-1)
        sorted_TE, order_TE = torch.sort(probs_TE, dim=-1, descending=True, stable=True)
        before_TE = sorted_TE.cumsum(-1) - sorted_TE
        taken_TE = before_TE < self.p  # the first always; the one that passes p still counts
        taken_TE[:, :1] = True
        if self.max_k is not None:
            taken_TE[:, self.max_k :] = False
        mask_TE = torch.zeros_like(taken_TE).scatter_(1, order_TE, taken_TE)
        signals = {"pairs": mask_TE.sum().float(), "tokens": torch.tensor(float(mask_TE.shape[0]))}
        return RoutingPlan.from_mask(mask_TE, probs_TE), signals

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """Probabilities, divided by their sum if asked for."""
        if self.config.renormalise:
            return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))
        return chosen.with_weight(chosen.pick(logits_TE.softmax(-1)))

    def losses(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Balance and z, and the entropy."""
        aux = super().losses(logits_TE, plan, inp)
        if self.config.entropy_coef:
            log_TE = logits_TE.log_softmax(-1)
            aux["entropy"] = -(log_TE.exp() * log_TE).sum() / max(1, log_TE.shape[0])
        return aux

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """The threshold p."""
        return {"p": self.p.clone()}

    @torch.no_grad()
    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move p towards the wanted mean: a proportional-integral controller. See :meth:`Gate.end_step`."""
        config = self.config
        if config.mean_k is None or not signals or float(signals["tokens"]) == 0:
            return
        error = config.mean_k - float(signals["pairs"] / signals["tokens"])
        # Errors that p cannot answer, because it is at its end, are not saved up.
        wanted = config.p + config.proportional * error + config.integral * (float(self.error_sum) + error)
        if 0 < wanted < 1:
            self.error_sum += error
        self.p.fill_(min(max(wanted, 1e-3), 1.0))
