"""Soft MoE: experts see slots, each a weighted mean of all tokens, and tokens get back a weighted mean of all slots.

Puigcerver et al., "From Sparse to Soft Mixtures of Experts", ICLR 2024 (arXiv:2308.00951, section 2). Tokens and slot
vectors are L2-normalised, a learned scale multiplies their products; the weights that mix tokens into a slot are a
softmax over tokens, those that mix slots into a token's output a softmax over all slots. Nothing is dropped and
everything is differentiable; but every output depends on every token, so it is for models that are not causal, and a
causal language model refuses it: nothing could serve it token by token.

Shape suffixes: T tokens, D width, E experts, S slots = E * slots per expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gates.base import Causality, Gate, GateConfig, GateInput, GateOutput, check_finite
from gates.linear import draw_normal_
from gates.metrics import plan_metrics
from gates.plan import PlanKind, RoutingPlan, Slots
from gates.registry import register_gate


class SoftConfig(GateConfig):
    """Options of Soft MoE."""

    name: Literal["soft"] = "soft"
    slots: int = Field(1, ge=1, description="slots per expert; E * slots of about the number of tokens is usual")

    def num_params(self, dim: int, num_experts: int) -> int:
        """A vector for each slot, and the scale."""
        return dim * num_experts * self.slots + 1

    def experts_per_token(self, num_experts: int) -> float:
        """All: each output is a mixture of every slot. What is computed is E * slots rows, whatever the tokens."""
        return float(num_experts)

    def chooses_experts(self) -> bool:
        """No: experts see slots."""
        return False


@register_gate("soft")
class SoftGate(Gate):
    """Slots instead of tokens. See the module. All tokens of a call are one group."""

    config_type = SoftConfig
    config: SoftConfig
    interchangeable_experts = False
    causality = Causality.BATCH
    weight_sum = "one"

    def __init__(self, config: SoftConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts * config.slots, dim))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal slot vectors (their length does not count), scale 1."""
        draw_normal_(self.weight, 1.0, generator)
        nn.init.ones_(self.scale)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`. The plan says how much of each expert a token gets, its slots how."""
        x_TD = inp.x_TD
        slot_SD = F.normalize(self.weight.to(x_TD.dtype), dim=-1) * self.scale.to(x_TD.dtype)
        logits_TS = F.linear(F.normalize(x_TD, dim=-1), slot_SD)
        check_finite(logits_TS, self.config.name)
        combine_TS = logits_TS.softmax(-1)
        slots = Slots(dispatch_TS=logits_TS.softmax(0), combine_TS=combine_TS, slots_per_expert=self.config.slots)
        weight_TE = combine_TS.view(-1, self.num_experts, self.config.slots).sum(-1)
        everyone = torch.ones_like(weight_TE, dtype=torch.bool)
        plan = replace(RoutingPlan.from_mask(everyone, weight_TE), kind=PlanKind.SLOTS, slots=slots)
        logits_TE = logits_TS.view(-1, self.num_experts, self.config.slots).logsumexp(-1)
        return GateOutput(plan, metrics=plan_metrics(plan) if inp.with_losses else {}, logits_TE=logits_TE)
