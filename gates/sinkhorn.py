"""Sinkhorn routing: top-k after the scores have been balanced by entropic optimal transport.

Clark et al., "Unified Scaling Laws for Routed Language Models" (S-BASE, arXiv:2202.01169, appendix B.2); also
Megatron-LM's ``sinkhorn`` balancing. exp(logits) is scaled until all tokens have one unit and all experts T / E of it,
and each token visits the k experts of which it has most. Here in the log domain with a cap on the iterations, so that
NaNs or extreme logits cannot loop for ever. Weights come from the logits: sigmoid at k=1, softmax else.

The scaling of an expert is a number that is added to its logits; its running mean routes single tokens.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.base import GateInput
from gates.plan import RoutingPlan
from gates.potentials import PotentialConfig, PotentialGate
from gates.registry import register_gate
from gates.scores import top_k


class SinkhornConfig(PotentialConfig):
    """Options of Sinkhorn routing."""

    name: Literal["sinkhorn"] = "sinkhorn"
    k: int = Field(1, ge=1, description="experts per token")
    iterations: int = Field(10, ge=1, description="Sinkhorn iterations at most")
    tolerance: float = Field(
        1e-2, gt=0, description="stop when every expert's mass is this close to its share, as a part of it"
    )
    temperature: float = Field(
        1.0, gt=0, description="logits are divided by it before they are balanced; lower makes loads more even"
    )
    renormalise: bool = Field(False, description="k above 1: divide the weights of a token by their sum")

    def experts_per_token(self, num_experts: int) -> float:
        """k."""
        return float(min(self.k, num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = []
        if self.k > num_experts:
            problems.append(f"k: {self.k} experts per token, but there are only {num_experts}")
        if self.renormalise and self.k == 1:
            problems.append(
                "renormalise: with k=1 it makes every weight 1, so that the task does not train the gate; set it to"
                " false"
            )
        return problems


@register_gate("sinkhorn")
class SinkhornGate(PotentialGate):
    """A linear gate whose logits are balanced before they choose. See the module."""

    config_type = SinkhornConfig
    config: SinkhornConfig
    weight_sum = "at_most_one"

    @property
    def max_k(self) -> int:
        return self.config.k

    def choose_batch(self, logits_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        """See :class:`PotentialGate`."""
        config = self.config
        scaled_TE = logits_TE / config.temperature
        potential_E = column_potential(scaled_TE, config.iterations, config.tolerance) * config.temperature
        return self.choose_frozen(logits_TE, potential_E), potential_E

    def choose_frozen(self, logits_TE: Tensor, potential_E: Tensor) -> RoutingPlan:
        """The k best of logits + potential: what a token has most of after scaling."""
        return RoutingPlan.from_topk(top_k(logits_TE + potential_E, self.config.k), logits_TE, self.num_experts)

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """Sigmoid of the logit at k=1, softmax else (Megatron-LM)."""
        if self.config.k == 1:
            return chosen.with_weight(chosen.pick(logits_TE).sigmoid())
        if self.config.renormalise:
            return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))
        return chosen.with_weight(chosen.pick(logits_TE.softmax(-1)))


def column_potential(logits_TE: Tensor, iterations: int, tolerance: float) -> Tensor:
    """(E,) beta of mean 0 with which softmax_E(logits + beta) has equal column sums: Sinkhorn's iteration.

    One softmax is the row step, done exactly; the column step adds log(share / sum). T >= 1.
    """
    share = logits_TE.shape[0] / logits_TE.shape[1]
    beta_E = torch.zeros_like(logits_TE[0])
    for _ in range(iterations):
        mass_E = (logits_TE + beta_E).softmax(-1).sum(0)
        if bool(((mass_E - share).abs() <= tolerance * share).all()):
            break
        # A column may underflow for logits far apart; it is raised as far as floats can tell.
        beta_E = beta_E + (share / mass_E.clamp_min(torch.finfo(mass_E.dtype).tiny)).log()
    return beta_E - beta_E.mean()
