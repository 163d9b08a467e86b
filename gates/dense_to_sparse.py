"""Dense to sparse: all experts at first, fewer as the temperature falls and small weights are cut, then the k best.

Nie et al., "EvoMoE" (arXiv:2112.14397, section 3.3, the DTS gate): g = softmax((h + Gumbel noise) / temperature),
experts with g above a threshold are visited; the temperature falls from ``temperature_start`` to ``temperature_end``
over
``decay``; from ``harden`` on only the k best are visited, whatever the threshold. The paper ends with k = 1 and never
renormalises, which shrinks the output as experts are cut: here weights are renormalised unless told otherwise.

With ``activation`` the logits pass through sigmoid, tanh or GELU before the temperature divides them, and get an offset
per expert: Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", ICML
2024 (arXiv:2401.13875, section 4), which keeps temperature and gate parameters from compensating for each other.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gates.base import GateInput, Steps, check_finite, schedule_steps
from gates.linear import LinearGate, LinearGateConfig, draw_like
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.scores import top_k

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}


class DenseToSparseConfig(LinearGateConfig):
    """Options of the dense-to-sparse gate."""

    name: Literal["dense_to_sparse"] = "dense_to_sparse"
    k: int = Field(2, ge=1, description="experts per token once the gate is hard")
    temperature_start: float = Field(2.0, gt=0, description="temperature of the first step")
    temperature_end: float = Field(0.3, gt=0, description="temperature after the decay")
    decay: Steps = Field(0.3, description="how long the temperature falls: steps, or below 1 a share of training")
    decay_shape: Literal["exponential", "linear"] = Field("exponential", description="how the temperature falls")
    harden: Steps = Field(
        0.5, description="from when on the k best experts are visited, and only they: steps, or a share of training"
    )
    threshold: float = Field(1e-3, ge=0, lt=1, description="before that, experts whose weight is above it are visited")
    noise: bool = Field(True, description="Gumbel noise on the logits in training")
    activation: Literal["none", "sigmoid", "tanh", "gelu"] = Field(
        "none", description="what the logits pass through before the temperature divides them"
    )
    renormalise: bool = Field(True, description="divide the weights of a token by their sum; never with k=1")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss, which is 1 at perfect balance")

    def num_params(self, dim: int, num_experts: int) -> int:
        """The projection, and an offset per expert with an activation."""
        return num_experts * (dim + (self.activation != "none"))

    def experts_per_token(self, num_experts: int) -> float:
        """k, where training ends; it begins with all E."""
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
        if self.temperature_end > self.temperature_start:
            problems.append(
                f"temperature_end: {self.temperature_end:g} is above temperature_start {self.temperature_start:g}"
            )
        return problems


@register_gate("dense_to_sparse")
class DenseToSparseGate(LinearGate):
    """A linear gate with a falling temperature. See the module. Temperature and hardness are part of its state."""

    config_type = DenseToSparseConfig
    config: DenseToSparseConfig
    temperature: Tensor
    hard: Tensor

    def __init__(self, config: DenseToSparseConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight_sum = "one" if config.renormalise else "at_most_one"
        self.offset = nn.Parameter(torch.zeros(num_experts)) if config.activation != "none" else None
        self.register_buffer("temperature", torch.tensor(config.temperature_start, dtype=torch.float32))
        self.register_buffer("hard", torch.tensor(False))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weight, offset 0."""
        super().reset_parameters(generator)
        offset = getattr(self, "offset", None)  # the base class calls before there is one
        if offset is not None:
            nn.init.zeros_(offset)

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """See :meth:`Gate.begin_step`."""
        config = self.config
        length = schedule_steps(config.decay, total_steps, "decay")
        done = 1.0 if step >= length else step / length
        start, end = config.temperature_start, config.temperature_end
        if config.decay_shape == "linear":
            self.temperature.fill_(start + done * (end - start))
        else:
            self.temperature.fill_(math.exp(math.log(start) + done * (math.log(end) - math.log(start))))
        self.hard.fill_(step >= schedule_steps(config.harden, total_steps, "harden"))

    def logits(self, inp: GateInput) -> Tensor:
        """The projection, through the activation if there is one."""
        logits_TE = super().logits(inp)
        if self.offset is None or self.config.activation == "none":
            return logits_TE
        check_finite(logits_TE, self.config.name)  # a sigmoid would hide infinities
        return _ACTIVATIONS[self.config.activation](logits_TE) + self.offset.to(logits_TE.dtype)

    def perturb(self, logits_TE: Tensor, inp: GateInput) -> Tensor:
        """(h + noise) / temperature."""
        if self.config.noise:
            logits_TE = logits_TE + draw_like(logits_TE, inp, "gumbel")
        return logits_TE / self.temperature.to(logits_TE.dtype)

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        if bool(self.hard):
            return RoutingPlan.from_topk(top_k(logits_TE, self.config.k), logits_TE, self.num_experts), {}
        probs_TE = logits_TE.softmax(-1)
        mask_TE = probs_TE > self.config.threshold
        mask_TE.scatter_(1, top_k(logits_TE, 1), True)  # many experts may each stay below a high threshold
        return RoutingPlan.from_mask(mask_TE, probs_TE), {}

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """Softmax at this temperature, divided by the sum over the chosen if asked for."""
        if self.config.renormalise:
            return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))
        return chosen.with_weight(chosen.pick(logits_TE.softmax(-1)))

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """The temperature."""
        return {"temperature": self.temperature.clone()}
