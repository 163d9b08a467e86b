"""MoE++: besides the experts a token may choose to vanish, to be copied, or to be mixed with a constant, all for free.

Jin et al., "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", ICLR 2025 (arXiv:2410.07348,
section 3). The gate scores E experts and Z zero-computation experts: ``zero`` (output 0), ``copy`` (output x) and
``constant`` (output a x + b v with a learned vector v and [a, b] = softmax(W_c x)). The weight of a zero expert is 0,
and the others are renormalised. Scores add a linear map of the previous layer's (gating residual). The balance loss
counts zero-computation experts by ``tau``, so that tau below 1 keeps more tokens with real experts.

Zero-computation experts live in the gate, on every rank, and only E experts are ever dispatched to or placed.

Shape suffixes: T tokens, D width, E experts, Z zero-computation experts, A = E + Z.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gates import balance
from gates.base import Gate, GateInput, GateOutput, check_finite
from gates.linear import LinearGateConfig, draw_normal_
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.scores import top_k


class ZeroComputationConfig(LinearGateConfig):
    """Options of MoE++."""

    name: Literal["zero_computation"] = "zero_computation"
    k: int = Field(2, ge=2, description="experts per token, zero-computation experts included")
    zero_experts: int = Field(1, ge=0, le=1, description="experts whose output is 0; with two a token could lose all")
    copy_experts: int = Field(1, ge=0, description="experts whose output is the token itself")
    constant_experts: int = Field(2, ge=0, description="experts that mix the token with a learned vector")
    residual: bool = Field(True, description="add a learned map of the previous MoE layer's scores to this one's")
    tau: float = Field(0.75, gt=0, description="weight of zero-computation experts in the balance loss")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss, which is 1 at perfect balance")

    @property
    def num_free(self) -> int:
        """Z, how many zero-computation experts there are."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    def num_params(self, dim: int, num_experts: int) -> int:
        """The projection, the residual map, and of each constant expert a vector and the two rows of W_c."""
        width = num_experts + self.num_free
        return dim * width + (width * width if self.residual else 0) + 3 * dim * self.constant_experts

    def experts_per_token(self, num_experts: int) -> float:
        """Real experts per token if all loads are as even as the balance loss wants them: free ones get 1 / tau."""
        share = num_experts / (num_experts + self.num_free / self.tau)
        return min(float(num_experts), self.k * share)

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        if self.k > num_experts + self.num_free:
            return [f"k: {self.k} experts per token, but there are only {num_experts + self.num_free}"]
        return []


@register_gate("zero_computation")
class ZeroComputationGate(Gate):
    """A linear gate over experts and zero-computation experts, and the latter themselves. See the module."""

    config_type = ZeroComputationConfig
    config: ZeroComputationConfig
    interchangeable_experts = False
    weight_sum = "at_most_one"

    def __init__(self, config: ZeroComputationConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        width = self.num_logits
        self.weight = nn.Parameter(torch.empty(width, dim))
        self.residual = nn.Parameter(torch.zeros(width, width)) if config.residual else None
        constants = config.constant_experts
        self.constant = nn.Parameter(torch.empty(constants, dim)) if constants else None
        self.mix = nn.Parameter(torch.empty(2 * constants, dim)) if constants else None
        self.reset_parameters()

    @property
    def num_logits(self) -> int:
        return self.num_experts + self.config.num_free

    @property
    def max_k(self) -> int:
        return self.config.k

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights; the residual map starts at 0."""
        for parameter in (self.weight, self.constant, self.mix):
            if parameter is not None:
                draw_normal_(parameter, self.config.init_std, generator)
        if self.residual is not None:
            nn.init.zeros_(self.residual)

    def _logits(self, inp: GateInput) -> Tensor:
        """(T, A) scores."""
        logits_TA = F.linear(inp.x_TD, self.weight.to(inp.x_TD.dtype))
        if self.residual is None or inp.prev_logits_TE is None:
            return logits_TA
        return logits_TA + F.linear(inp.prev_logits_TE.to(logits_TA.dtype), self.residual.to(logits_TA.dtype))

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`."""
        logits_TA = self._logits(inp)
        check_finite(logits_TA, self.config.name)
        mask_TA = self._chosen(logits_TA, inp)
        # A softmax over those that weigh something: their probabilities may all but vanish beside a zero expert's.
        weighs_TA = mask_TA.clone()
        weighs_TA[:, self.num_experts : self.num_experts + self.config.zero_experts] = False
        nobody_T1 = ~weighs_TA.any(-1, keepdim=True)
        weight_TA = logits_TA.masked_fill(~(weighs_TA | nobody_T1), -torch.inf).softmax(-1) * weighs_TA
        split = [self.num_experts, self.config.num_free]
        (mask_TE, mask_TZ), (weight_TE, weight_TZ) = mask_TA.split(split, 1), weight_TA.split(split, 1)
        plan = RoutingPlan.from_mask(mask_TE, weight_TE)
        plan = replace(plan, undispatched=RoutingPlan.from_mask(mask_TZ, weight_TZ))
        added_TD = self._compute(inp.x_TD, weight_TZ)
        check_finite(added_TD, self.config.name)
        if not inp.with_losses:
            return GateOutput(plan, logits_TE=logits_TA, added_TD=added_TD)
        metrics = plan_metrics(plan)
        metrics["free_frac"] = mask_TZ.sum() / mask_TA.sum().clamp_min(1)
        return GateOutput(plan, self._losses(logits_TA, mask_TA, inp.segment_T), metrics, logits_TA, added_TD)

    @torch.no_grad()
    def _chosen(self, logits_TA: Tensor, inp: GateInput) -> Tensor:
        """(T, A) bool, who visits whom."""
        mask_TA = torch.zeros_like(logits_TA, dtype=torch.bool)
        replay = inp.replay
        if replay is None:
            return mask_TA.scatter_(1, top_k(logits_TA, self.config.k), True)
        if replay.undispatched is None:
            raise ValueError(f"gate {self.config.name!r}: the plan to replay knows nothing of zero-computation experts")
        mask_TA[replay.token_N(), replay.expert_N] = True
        mask_TA[replay.undispatched.token_N(), self.num_experts + replay.undispatched.expert_N] = True
        return mask_TA

    def _compute(self, x_TD: Tensor, weight_TZ: Tensor) -> Tensor:
        """(T, D) sum of what the zero-computation experts return."""
        config = self.config
        _, copy_Tz, constant_Tz = weight_TZ.split(
            [config.zero_experts, config.copy_experts, config.constant_experts], 1
        )
        own_T1: Tensor = copy_Tz.sum(1, keepdim=True)
        if self.constant is None or self.mix is None:
            return own_T1 * x_TD
        mix_Tz2 = F.linear(x_TD, self.mix.to(x_TD.dtype)).view(-1, config.constant_experts, 2).softmax(-1)
        own_T1 = own_T1 + (constant_Tz * mix_Tz2[..., 0]).sum(1, keepdim=True)
        added_TD: Tensor = own_T1 * x_TD + (constant_Tz * mix_Tz2[..., 1]) @ self.constant.to(x_TD.dtype)
        return added_TD

    def _losses(self, logits_TA: Tensor, mask_TA: Tensor, segment_T: Tensor | None) -> dict[str, Tensor]:
        """Balance over all A experts, free ones weighing tau: 1 when f and P are spread in inverse proportion to it.

        By sequence where the input tells sequences apart.
        """
        aux: dict[str, Tensor] = {}
        if self.config.balance_coef:
            eta_A = logits_TA.new_ones(self.num_logits)
            eta_A[self.num_experts :] = self.config.tau
            weighed_TA = logits_TA.softmax(-1) * eta_A
            if segment_T is None:
                loss = balance.balance_loss(weighed_TA, mask_TA.sum(0))
            else:
                token_N, expert_N = mask_TA.nonzero(as_tuple=True)
                loss = balance.sequence_balance_loss(weighed_TA, expert_N, token_N, segment_T)
            # At f = P = (1 / eta) / sum(1 / eta), A times their product would be A / sum(1 / eta).
            aux["balance"] = loss * ((1 / eta_A).sum() / self.num_logits)
        if self.config.z_coef:
            aux["z"] = balance.z_loss(logits_TA)
        return aux
