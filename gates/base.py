"""The gate contract: what a routing strategy receives, returns and promises.

A gate is an ``nn.Module`` that turns token vectors into a :class:`~gates.plan.RoutingPlan`. It knows nothing of
devices that hold experts, of process groups or of the trainer. Auxiliary losses are values in its output, unweighted
and by name; the field ``<name>_coef`` of its config weighs the loss ``<name>``. State that moves with the step moves
only in :meth:`Gate.begin_step` and :meth:`Gate.end_step`.

Shape suffixes: T tokens, D width, E experts, N chosen pairs, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gates.plan import RoutingPlan


class Mode(Enum):
    """What the forward pass is for. Noise and jitter act in TRAIN only; SEARCH asks for dense probing."""

    TRAIN = "train"
    EVAL = "eval"
    PREFILL = "prefill"
    DECODE = "decode"
    SEARCH = "search"


class Causality(Enum):
    """What token t's routing may depend on: itself, earlier tokens of its sequence, or the whole batch."""

    PER_TOKEN = "per_token"
    PREFIX = "prefix"
    BATCH = "batch"


class GateNumericsError(FloatingPointError):
    """The gate saw NaN or infinite scores; names the gate and how many tokens are affected."""


class GateConfig(BaseModel):
    """Options that every gate has. A concrete config adds ``name: Literal["..."] = "..."`` and its own fields.

    A field called ``<aux>_coef`` is the weight of the auxiliary loss ``<aux>`` that the gate returns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str

    def aux_coefs(self) -> dict[str, float]:
        """Weight of every auxiliary loss by its name, read from the ``*_coef`` fields."""
        return {key.removesuffix("_coef"): value for key, value in self if key.endswith("_coef")}

    def num_params(self, dim: int, num_experts: int) -> int:
        """Trainable parameters of one gate; one (D, E) projection unless a gate says otherwise."""
        return dim * num_experts

    def experts_per_token(self, num_experts: int) -> float:
        """Expected experts per token, for counts of active parameters and FLOPs."""
        raise TypeError(f"{type(self).__name__} must define experts_per_token()")

    def reduces_in_forward(self) -> bool:
        """Whether forward calls ``GateInput.reduce_load``, so that all ranks must run it or none."""
        return False

    def check(self, num_experts: int) -> list[str]:
        """Everything wrong with these options for E experts, as ``"field: message"``; empty when all is well."""
        return []


@dataclass(frozen=True)
class GateInput:
    """One call's tokens and what is known about them. T may be 0.

    Attributes:
        x_TD: (T, D) token vectors, any float dtype; the gate computes in fp32.
        ids_T: (T,) int64 token ids, for gates that need "ids".
        valid_T: (T,) bool, False for padding, which is routed nowhere and counted nowhere. None: all valid.
        segment_T: (T,) int64 sequence number, 0-based and ascending: the scope of sequence-level losses.
        position_T: (T,) int64 position in the sequence.
        prev_logits_TE: (T, E) logits of the previous MoE layer, for gates that need "prev_logits".
        replay: plan whose selection must be repeated (activation recompute); only weights are computed anew.
        reduce_load: sums an integer load over all data-parallel ranks; None on one rank. For global-batch losses.
        step: optimizer step, 0-based.
        mode: see :class:`Mode`.
        rng: the only source of randomness; None means no noise even in training. A replay needs it in the state that
            it had before the first pass, because noise is part of the weights too.
    """

    x_TD: Tensor
    ids_T: Tensor | None = None
    valid_T: Tensor | None = None
    segment_T: Tensor | None = None
    position_T: Tensor | None = None
    prev_logits_TE: Tensor | None = None
    replay: RoutingPlan | None = None
    reduce_load: Callable[[Tensor], Tensor] | None = None
    step: int = 0
    mode: Mode = Mode.EVAL
    rng: torch.Generator | None = None


@dataclass(frozen=True)
class GateOutput:
    """What a gate returns.

    Attributes:
        plan: who goes where.
        aux: unweighted 0-d losses by name, with gradients; "balance" is 1 at perfect balance. A loss whose coefficient
            is 0 may be left out, and PREFILL and DECODE return none.
        metrics: detached 0-d diagnostics by name (load_entropy, experts_per_token, max_vio, dropped_frac, ...).
        logits_TE: (T, E) raw fp32 scores, or None for gates that have none.
    """

    plan: RoutingPlan
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    logits_TE: Tensor | None = None


class Gate(nn.Module, ABC):
    """Base of all routing strategies.

    A subclass sets ``config_type``, builds its parameters in ``__init__`` and implements :meth:`forward`.
    It declares ``causality``; ``needs`` (names of optional GateInput fields that it cannot do without); and
    ``weight_sum``: what the weights of one token add up to ("one", "at_most_one" or "free").
    """

    config_type: ClassVar[type[GateConfig]]
    causality: Causality = Causality.PER_TOKEN
    needs: frozenset[str] = frozenset()
    weight_sum: Literal["one", "at_most_one", "free"] = "free"

    def __init__(self, config: GateConfig, dim: int, num_experts: int) -> None:
        super().__init__()
        problems = config.check(num_experts)
        if problems:
            raise ValueError(f"gate {config.name!r} with {num_experts} experts: " + "; ".join(problems))
        self.config = config
        self.dim = dim
        self.num_experts = num_experts

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give the parameters their initial values, drawn from ``generator`` (None: torch's global one)."""

    @property
    def max_k(self) -> int | None:
        """Most experts that one token can have, or None when there is no bound below E."""
        return None

    @abstractmethod
    def forward(self, inp: GateInput) -> GateOutput:
        """Route ``inp``. With ``inp.replay`` the selection is that plan's and only weights are computed."""

    def begin_step(self, step: int) -> None:
        """Move schedules (temperature, thresholds) to ``step``: a pure function of the step."""

    def end_step(self, load_E: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Move controllers once per optimizer step.

        Args:
            load_E: (E,) int64 offered load of this layer over all ranks and micro-batches of the step.
            metrics: this layer's gate metrics averaged over the step.
        """

    def causal_surrogate(self) -> Gate | None:
        """The gate that serves token-by-token decode; None when there is nothing sound to do."""
        return None if self.causality is Causality.BATCH else self


def check_finite(logits_TE: Tensor, gate_name: str) -> None:
    """Raise :class:`GateNumericsError` when a score is NaN or infinite."""
    # One pass over the scores instead of four: their sum is finite unless one of them is not (or it overflows).
    if bool(torch.isfinite(logits_TE.detach().sum())):
        return
    bad_T = ~torch.isfinite(logits_TE).all(-1)
    if bool(bad_T.any()):
        raise GateNumericsError(
            f"gate {gate_name!r}: scores of {int(bad_T.sum())} of {bad_T.numel()} tokens are NaN or infinite"
        )
