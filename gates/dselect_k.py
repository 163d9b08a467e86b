"""DSelect-k: k selectors, each of which writes an expert's number in binary with smooth steps.

Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts", NeurIPS 2021 (arXiv:2106.03760, section
3). Selector j has ceil(log2 E) bits s = S(z_j . x + c_j); expert i has probability r_i = prod_l (s_l where bit l of i
is 1, else 1 - s_l); a softmax over the selectors' logits weighs them. An entropy loss makes bits decide, turned up over
a warm-up. Where E is no power of two some codes name no expert: a second loss keeps probability away from them. The
paper has 1 / probability, summed over the batch; a token near such a code would outweigh all else, so it is the mean of
-log(probability) here.

Shape suffixes: T tokens, D width, E experts, K selectors, b bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gates.base import Gate, GateConfig, GateInput, GateOutput, Steps, check_finite, schedule_steps
from gates.linear import draw_uniform_
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.solvers.smooth_step import smooth_step

_LOST = 1e-6
"""Probability on experts' codes that the loss takes a token for which has none."""


class DSelectKConfig(GateConfig):
    """Options of DSelect-k."""

    name: Literal["dselect_k"] = "dselect_k"
    k: int = Field(2, ge=1, description="selectors, and with them experts per token once all bits have decided")
    gamma: float = Field(1.0, gt=0, description="width of the smooth step")
    per_token: bool = Field(True, description="bits and selector weights depend on the token; false: they are the same")
    entropy_coef: float = Field(0.01, ge=0, description="weight of the entropy of each selector, summed over selectors")
    entropy_warmup: Steps = Field(
        0.1, description="how long that weight grows from 0: steps, or below 1 a share of training"
    )
    reachable_coef: float = Field(
        0.01, ge=0, description="weight of -log(probability on codes that name an expert); for E no power of two"
    )
    balance_coef: float = Field(
        0.01, ge=0, description="weight of E * sum_e (mean probability of e)^2, which is 1 at perfect balance"
    )
    normalise: bool = Field(True, description="divide a token by its root mean square first; the paper does not")

    def num_params(self, dim: int, num_experts: int) -> int:
        """Bits and weight of each selector, with biases; without weights where tokens do not matter."""
        return self.k * (1 + num_bits(num_experts)) * (dim * self.per_token + 1)

    def experts_per_token(self, num_experts: int) -> float:
        """k, where training ends; it begins with all E."""
        return float(min(self.k, num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        return [f"k: {self.k} selectors, but there are only {num_experts} experts"] if self.k > num_experts else []


@register_gate("dselect_k")
class DSelectKGate(Gate):
    """k binary-coded selectors. See the module. ``warmth`` is how far the entropy loss has been turned up."""

    config_type = DSelectKConfig
    config: DSelectKConfig
    interchangeable_experts = False
    weight_sum = "at_most_one"
    warmth: Tensor

    def __init__(self, config: DSelectKConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        bits = num_bits(num_experts)
        self.bit_weight = nn.Parameter(torch.empty(config.k * bits, dim)) if config.per_token else None
        self.bit_bias = nn.Parameter(torch.empty(config.k * bits))
        self.selector_weight = nn.Parameter(torch.empty(config.k, dim)) if config.per_token else None
        self.selector_bias = nn.Parameter(torch.empty(config.k))
        self.register_buffer("warmth", torch.tensor(0.0, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Bits within the cubic part of the smooth step: U(-gamma/100, gamma/100); selectors U(-0.05, 0.05)."""
        bits, selectors = (self.bit_weight, self.bit_bias), (self.selector_weight, self.selector_bias)
        for parameters, bound in ((bits, self.config.gamma / 100), (selectors, 0.05)):
            for parameter in parameters:
                if parameter is not None:
                    draw_uniform_(parameter, bound, generator)

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """See :meth:`Gate.begin_step`."""
        length = schedule_steps(self.config.entropy_warmup, total_steps, "entropy_warmup")
        self.warmth.fill_(1.0 if step >= length else step / length)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`."""
        config, num_experts, x_TD = self.config, self.num_experts, inp.x_TD
        bits = num_bits(num_experts)
        if config.normalise:
            x_TD = F.rms_norm(x_TD, x_TD.shape[-1:])
        if self.bit_weight is not None and self.selector_weight is not None:
            bit_TKb = F.linear(x_TD, self.bit_weight.to(x_TD.dtype), self.bit_bias.to(x_TD.dtype))
            logit_TK = F.linear(x_TD, self.selector_weight.to(x_TD.dtype), self.selector_bias.to(x_TD.dtype))
        else:
            bit_TKb = self.bit_bias.to(x_TD.dtype).unsqueeze(0)  # one row, the same for every token
            logit_TK = self.selector_bias.to(x_TD.dtype).expand(x_TD.shape[0], -1)
        check_finite(torch.cat([bit_TKb.expand(x_TD.shape[0], -1), logit_TK], 1), config.name)
        bit_TKb = bit_TKb.reshape(bit_TKb.shape[0], config.k, bits)
        r_TKE = code_probabilities(bit_TKb, config.gamma)[..., :num_experts].expand(x_TD.shape[0], -1, -1)
        weight_TE = (logit_TK.softmax(-1).unsqueeze(-1) * r_TKE).sum(1)
        reached_T1 = weight_TE.sum(1, keepdim=True)
        # A token whose codes all name nobody goes to nobody, until the loss has brought it back.
        weight_TE = weight_TE / reached_T1.clamp_min(torch.finfo(weight_TE.dtype).tiny)
        if inp.replay is None:
            mask_TE = (r_TKE > 0).any(1)
            lost_T = ~mask_TE.any(1)
            plan = RoutingPlan.from_mask(mask_TE, weight_TE)
        else:
            plan = inp.replay.with_weight(inp.replay.pick(weight_TE))
            lost_T = plan.row_ptr_T1.diff() == 0
        if not inp.with_losses:
            return GateOutput(plan)
        num_tokens = max(1, plan.num_tokens)
        aux: dict[str, Tensor] = {}
        entropy = -torch.special.xlogy(r_TKE, r_TKE.clamp_min(torch.finfo(r_TKE.dtype).tiny)).sum() / num_tokens
        if config.entropy_coef:
            aux["entropy"] = self.warmth.to(entropy.dtype) * entropy
        if config.reachable_coef:
            aux["reachable"] = -((r_TKE.sum(-1) + _LOST) / (1 + _LOST)).log().sum() / num_tokens
        if config.balance_coef:
            share_E = r_TKE.sum((0, 1)) / r_TKE.sum().clamp_min(torch.finfo(r_TKE.dtype).tiny)
            aux["balance"] = num_experts * share_E.square().sum()
        metrics = plan_metrics(plan)
        metrics["selector_entropy"] = entropy.detach()
        metrics["uncovered_frac"] = lost_T.sum() / num_tokens
        return GateOutput(plan, aux, metrics)


def code_probabilities(bit_TKb: Tensor, gamma: float) -> Tensor:
    """(T, K, 2^b) probability of every code: products of smooth steps, bit 0 the least significant.

    Bit by bit, each doubling what there is, so that no (T, K, E, b) is ever formed.
    """
    one_TKb, zero_TKb = smooth_step(bit_TKb, gamma), smooth_step(-bit_TKb, gamma)
    code_TKC = bit_TKb.new_ones(*bit_TKb.shape[:-1], 1)
    for bit in range(bit_TKb.shape[-1]):
        code_TKC = torch.cat([code_TKC * zero_TKb[..., bit, None], code_TKC * one_TKb[..., bit, None]], -1)
    return code_TKC


def num_bits(num_experts: int) -> int:
    """ceil(log2 E)."""
    return (num_experts - 1).bit_length()
