"""ReMoE: the weight of an expert is relu(logit), and experts of weight 0 are not visited; differentiable throughout.

Wang, Chen and Zhu, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", ICLR 2025 (arXiv:2412.14711,
sections 3.2 and 3.3). Sparsity comes from an L1 loss that weighs busy experts more; its coefficient starts at
1e-8 and is multiplied or divided by 1.2 after every step, until a token visits k of E experts on average. So the first
hundred steps are dense, and cost and memory are those of E experts then.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gates.base import GateInput
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.scores import top_k


class ReLUConfig(LinearGateConfig):
    """Options of ReLU routing."""

    name: Literal["relu"] = "relu"
    k: int = Field(2, ge=1, description="experts per token that the controller aims at")
    max_k: int | None = Field(None, ge=1, description="most experts of one token, the best ones; null: no limit")
    l1_start: float = Field(1e-8, gt=0, description="first coefficient of the L1 loss")
    l1_factor: float = Field(1.2, gt=1, description="what the coefficient is multiplied or divided by after a step")
    bias: bool = Field(
        True,
        description="add a learned number per expert, 0 at first; without it, as in the paper, half of the experts stay"
        " positive for tokens that are centred at 0, and no L1 loss can change that",
    )
    sparsity_coef: float = Field(1.0, ge=0, description="weight of the L1 loss, on top of its moving coefficient")

    def num_params(self, dim: int, num_experts: int) -> int:
        """The projection, and the bias."""
        return num_experts * (dim + self.bias)

    def experts_per_token(self, num_experts: int) -> float:
        """k, which holds once the controller has settled."""
        return float(min(self.k, num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = []
        if self.k > num_experts:
            problems.append(f"k: {self.k} experts per token, but there are only {num_experts}")
        if self.max_k is not None and not self.k <= self.max_k <= num_experts:
            problems.append(f"max_k: {self.max_k} must be from k={self.k} to the {num_experts} experts")
        return problems


@register_gate("relu")
class ReLUGate(LinearGate):
    """A linear gate without softmax. See the module."""

    config_type = ReLUConfig
    config: ReLUConfig
    has_signals = True
    l1: Tensor

    def __init__(self, config: ReLUConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.bias else None
        self.register_buffer("l1", torch.tensor(config.l1_start, dtype=torch.float32))

    @property
    def max_k(self) -> int | None:
        return self.config.max_k

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weight, bias 0."""
        super().reset_parameters(generator)
        bias = getattr(self, "bias", None)  # the base class calls before there is one
        if bias is not None:
            nn.init.zeros_(bias)

    def logits(self, inp: GateInput) -> Tensor:
        """The projection, and the bias if there is one."""
        logits_TE = super().logits(inp)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        mask_TE = logits_TE > 0
        wanted = mask_TE.sum().float()  # by the logits: under a limit of k pairs there are never too many
        limit = self.config.max_k
        if limit is not None and limit < self.num_experts:
            best_TK = top_k(logits_TE, limit)
            mask_TE &= torch.zeros_like(mask_TE).scatter_(1, best_TK, True)
        signals = {"pairs": wanted, "tokens": torch.tensor(float(mask_TE.shape[0]))}
        return RoutingPlan.from_mask(mask_TE, logits_TE), signals

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """relu(logit); a replayed pair whose logit has become negative weighs 0."""
        return chosen.with_weight(chosen.pick(logits_TE).relu())

    def losses(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Balance and z, and the L1 loss: l1 * sum_e f_e * mean_t relu(h_te), f_e = E * load_e / (T * k)."""
        aux = super().losses(logits_TE, plan, inp)
        if self.config.sparsity_coef:
            num_tokens, num_experts = max(1, plan.num_tokens), self.num_experts
            busy_E = plan.offered_E.to(logits_TE.dtype) * (num_experts / (num_tokens * self.config.k))
            aux["sparsity"] = self.l1.to(logits_TE.dtype) * (busy_E * logits_TE.relu().sum(0)).sum() / num_tokens
        return aux

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """The coefficient of the L1 loss, and the share of tokens that visit nobody."""
        return {
            "l1": self.l1.clone(),
            "uncovered_frac": (plan.row_ptr_T1.diff() == 0).sum() / max(1, plan.num_tokens),
        }

    @torch.no_grad()
    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move the coefficient towards k of E experts per token. See :meth:`Gate.end_step`."""
        if not signals or float(signals["tokens"]) == 0:
            return
        too_many = float(signals["pairs"]) > self.config.k * float(signals["tokens"])
        factor = self.config.l1_factor if too_many else 1 / self.config.l1_factor
        self.l1.mul_(factor).clamp_(1e-12, 1e12)
