"""What gates with one linear projection have in common: logits, then a choice without gradient, then weights.

Shape suffixes: T tokens, D width, E experts, N chosen pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gates import balance
from gates.base import Gate, GateConfig, GateInput, GateOutput, Mode, check_finite
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan


class LinearGateConfig(GateConfig):
    """Options of every gate with a linear projection."""

    init_std: float = Field(0.02, ge=0, description="standard deviation of the initial weight")
    balance_coef: float = Field(0.0, ge=0, description="weight of the balance loss, which is 1 at perfect balance")
    z_coef: float = Field(0.0, ge=0, description="weight of mean logsumexp(logits)^2; 1e-3 is usual (ST-MoE)")


class LinearGate(Gate):
    """``logits = x W^T`` with ``weight`` (E, D); a subclass writes :meth:`choose` and :meth:`weigh`."""

    config: LinearGateConfig
    has_signals: ClassVar[bool] = False

    def __init__(self, config: LinearGateConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weight."""
        draw_normal_(self.weight, self.config.init_std, generator)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`."""
        logits_TE = self.logits(inp)
        check_finite(logits_TE, self.config.name)
        seen_TE = self.perturb(logits_TE, inp)
        signals: dict[str, Tensor] = {}
        # Signals are wanted from a replay too: in recomputation it is the pass that counts.
        if inp.replay is None or (self.has_signals and inp.mode is Mode.TRAIN):
            with torch.no_grad():
                chosen, signals = self.choose(seen_TE, inp)
        plan = self.weigh(seen_TE, inp.replay or chosen, inp)
        if not inp.with_losses:
            return GateOutput(plan, logits_TE=logits_TE)
        metrics = plan_metrics(plan) | self.metrics(logits_TE, plan, inp)
        aux = self.losses(logits_TE, plan, inp)
        return GateOutput(plan, aux, metrics, logits_TE, signals=signals if inp.mode is Mode.TRAIN else {})

    def logits(self, inp: GateInput) -> Tensor:
        """(T, E) differentiable scores."""
        return F.linear(inp.x_TD, self.weight.to(inp.x_TD.dtype))

    def perturb(self, logits_TE: Tensor, inp: GateInput) -> Tensor:
        """(T, E) differentiable scores that choose and weigh: the logits with noise, if a gate has any."""
        return logits_TE

    @abstractmethod
    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """Which pairs, without gradient (the plan's weights do not count), and signals for :meth:`Gate.end_step`."""

    @abstractmethod
    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """``chosen`` with differentiable weights."""

    def losses(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Unweighted losses whose coefficient is not 0: balance of softmax(logits) against the offered load, and z."""
        aux: dict[str, Tensor] = {}
        if self.config.balance_coef:
            aux["balance"] = softmax_balance(logits_TE.softmax(-1), plan, inp)
        if self.config.z_coef:
            aux["z"] = balance.z_loss(logits_TE)
        return aux

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Diagnostics besides those that every gate reports."""
        return {}


def softmax_balance(probs_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> Tensor:
    """The balance loss of rows that add up to 1, by sequence where the input tells sequences apart."""
    if inp.segment_T is None:
        return balance.balance_loss(probs_TE, plan.offered_E)
    offered = plan.before_drop or plan
    return balance.sequence_balance_loss(probs_TE, offered.expert_N, offered.token_N(), inp.segment_T)


def draw_normal_(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """N(0, std), drawn in fp32 where the generator lives: the same numbers on every device and in every dtype."""
    device = parameter.device if generator is None else generator.device
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
    with torch.no_grad():
        parameter.copy_(drawn.normal_(0.0, std, generator=generator))


def draw_uniform_(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """U(-bound, bound), drawn as :func:`draw_normal_` draws."""
    device = parameter.device if generator is None else generator.device
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
    with torch.no_grad():
        parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))


def draw_like(like: Tensor, inp: GateInput, kind: str = "normal") -> Tensor:
    """Noise of the shape and dtype of ``like``, "normal", "uniform" on [0, 1) or "gumbel"; zeros without generator."""
    rng = inp.noise
    if rng is None:
        return torch.zeros_like(like)
    sample = torch.randn if kind == "normal" else torch.rand
    drawn = sample(like.shape, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)
    if kind != "gumbel":
        return drawn
    return -drawn.clamp_min(torch.finfo(like.dtype).tiny).log().neg().clamp_min(torch.finfo(like.dtype).tiny).log()
