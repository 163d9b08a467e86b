"""What gates have in common that add a number per expert to the scores so that loads come out even.

In training the number (potential, dual price) is that of the batch; its mean over steps serves generation, where tokens
come one by one: the same rule with a frozen number.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from gates.base import Causality, GateInput
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan


class PotentialConfig(LinearGateConfig):
    """Options of every gate with potentials."""

    potential_decay: float = Field(
        0.95, ge=0, lt=1, description="decay per step of the running mean of potentials that generation routes by"
    )


class PotentialGate(LinearGate):
    """A subclass writes :meth:`choose_batch` and :meth:`choose_frozen`."""

    causality = Causality.BATCH
    has_signals = True
    config: PotentialConfig
    potential: Tensor
    potential_steps: Tensor

    def __init__(self, config: PotentialConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.register_buffer("potential", torch.zeros(self.num_potentials, dtype=torch.float32))
        self.register_buffer("potential_steps", torch.zeros((), dtype=torch.int64))
        self._frozen = False

    @property
    def num_potentials(self) -> int:
        """Numbers that generation routes by: one an expert, unless a gate needs more."""
        return self.num_experts

    @abstractmethod
    def choose_batch(self, logits_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        """The plan of T >= 1 tokens together, and the (E,) potential that it follows from, whose mean is 0."""

    @abstractmethod
    def choose_frozen(self, logits_TE: Tensor, potential_E: Tensor) -> RoutingPlan:
        """The plan of each token by itself, given the potential."""

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        num_tokens = logits_TE.shape[0]
        if self._frozen or not num_tokens:
            potential_E = self.potential.to(logits_TE.dtype)
            nothing = {"potential": torch.zeros_like(self.potential), "tokens": torch.tensor(0.0)}
            return self.choose_frozen(logits_TE, potential_E), nothing
        plan, potential_E = self.choose_batch(logits_TE)
        share = float(num_tokens)  # a micro-batch counts by its tokens
        return plan, {"potential": potential_E.float() * share, "tokens": torch.tensor(share)}

    @torch.no_grad()
    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move the running mean of potentials; its first step sets it. See :meth:`Gate.end_step`."""
        if not signals or float(signals["tokens"]) == 0:
            return
        mean_E = (signals["potential"] / signals["tokens"]).to(self.potential)
        self.potential_steps += 1
        decay = self.config.potential_decay
        self.potential.lerp_(mean_E, (1 - decay) / (1 - decay ** int(self.potential_steps)))

    def causal_surrogate(self) -> PotentialGate:
        """This gate with its potential frozen at the running mean; shares parameters and buffers."""
        surrogate = copy.copy(self)
        surrogate._frozen = True
        surrogate.causality = Causality.PER_TOKEN
        return surrogate
