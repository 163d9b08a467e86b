"""The gate contract: what a routing strategy receives, returns and promises.

A gate is an ``nn.Module`` that turns token vectors into a :class:`~gates.plan.RoutingPlan`. It knows nothing of
devices that hold experts, of process groups or of the trainer. Auxiliary losses are values in its output, unweighted
and by name; the field ``<name>_coef`` of its config weighs the loss ``<name>``. State that moves with the step moves
only in :meth:`Gate.begin_step` and :meth:`Gate.end_step`. A strategy writes :meth:`Gate.route`, which sees fp32 tokens
without padding; :meth:`Gate.forward` takes care of the rest.

Shape suffixes: T tokens, D width, E experts, N chosen pairs, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor, nn

from gates.plan import RoutingPlan, insert_padding, remove_padding


class Mode(Enum):
    """What the forward pass is for. Noise and jitter act in TRAIN only."""

    TRAIN = "train"
    EVAL = "eval"
    PREFILL = "prefill"
    DECODE = "decode"


class Causality(Enum):
    """What token t's routing may depend on: itself, earlier tokens of its sequence, or the whole batch."""

    PER_TOKEN = "per_token"
    PREFIX = "prefix"
    BATCH = "batch"


class GateNumericsError(FloatingPointError):
    """The gate saw NaN or infinite scores; names the gate and how many tokens are affected."""


def _steps_or_share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a whole number of optimizer steps, or a share of the training run below 1")
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(
            f"{value} is no share of the training run below 1; for a number of optimizer steps leave out the point"
        )
    if value < 0:
        raise ValueError(f"{value} optimizer steps are less than none")
    return value


_is_steps = BeforeValidator(_steps_or_share)
Steps = Annotated[int | float, _is_steps]
"""Type of an option that says how long a schedule lasts: optimizer steps, or below 1 a share of the training run."""


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

    def files(self) -> dict[str, str]:
        """Paths that training reads, by the field that names them."""
        return {}

    def num_ids(self) -> int | None:
        """Token ids that the gate can route, counted from 0; None for any."""
        return None

    def chooses_experts(self) -> bool:
        """Whether tokens visit experts as they are; not so where experts see mixtures of all tokens (Soft MoE)."""
        return True

    def reduces_in_forward(self) -> bool:
        """Whether forward calls ``GateInput.reduce_load``, so that all ranks must run it or none."""
        return False

    def check(self, num_experts: int) -> list[str]:
        """Everything wrong with these options for E experts, as ``"field: message"``; empty when all is well."""
        return []

    def check_schedules(self, total_steps: int) -> list[str]:
        """Every schedule that would not end within a training run of so many steps, as ``"field: message"``."""
        return [
            f"{name}: the schedule ends after {getattr(self, name)} steps, training after {total_steps}; give fewer"
            " steps, or a share of the run below 1"
            for name, field_info in type(self).model_fields.items()
            if _is_steps in field_info.metadata
            and isinstance(getattr(self, name), int)
            and getattr(self, name) > total_steps
        ]


def schedule_steps(length: int | float, total_steps: int | None, name: str) -> int:
    """A schedule's length in steps: at least 1 unless it is 0, and at most such that it ends in training's last step.

    Raises:
        ValueError: it is a share of a training run whose length is not known.
    """
    if isinstance(length, float) and total_steps is None:
        raise ValueError(
            f"{name} is {length:g} of the training run: tell begin_step() its total_steps, or give {name} as a whole"
            " number of steps"
        )
    steps = length if isinstance(length, int) else max(round(length * (total_steps or 0)), 1 if length else 0)
    return steps - 1 if steps and steps == total_steps else steps


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
        layer: which layer of the model asks, 0-based; with ``row`` for gates that repeat or prescribe a routing.
        row: which sequence of the step's global batch is the first one here.
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
    layer: int = 0
    row: int = 0
    step: int = 0
    mode: Mode = Mode.EVAL
    rng: torch.Generator | None = None

    @property
    def noise(self) -> torch.Generator | None:
        """The generator in training, None elsewhere: where noise and jitter may come from."""
        return self.rng if self.mode is Mode.TRAIN else None

    @property
    def with_losses(self) -> bool:
        """Whether losses and metrics are wanted: not while text is generated."""
        return self.mode not in (Mode.PREFILL, Mode.DECODE)

    def without_padding(self) -> GateInput:
        """The valid tokens alone."""
        valid_T = self.valid_T
        if valid_T is None:
            return self

        def kept(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[valid_T]

        return replace(
            self,
            x_TD=self.x_TD[valid_T],
            ids_T=kept(self.ids_T),
            valid_T=None,
            segment_T=kept(self.segment_T),
            position_T=kept(self.position_T),
            prev_logits_TE=kept(self.prev_logits_TE),
            replay=None if self.replay is None else remove_padding(self.replay, valid_T),
        )


@dataclass(frozen=True)
class GateOutput:
    """What a gate returns.

    Attributes:
        plan: who goes where.
        aux: unweighted 0-d losses by name, with gradients; "balance" is 1 at perfect balance. A loss whose coefficient
            is 0 may be left out, and PREFILL and DECODE return none.
        metrics: detached 0-d diagnostics by name (load_entropy, experts_per_token, max_vio, dropped_frac, ...).
        logits_TE: (T, E) raw fp32 scores, or None for gates that have none.
        added_TD: (T, D) fp32, what the layer's output gets besides that of the experts: that of zero-computation
            experts, which need no dispatch. None for nothing.
        signals: detached fp32 sums by name, of any fixed shape: what :meth:`Gate.end_step` gets, added up over ranks
            and micro-batches of the step. A mean is a sum and a count. In training only.
    """

    plan: RoutingPlan
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    logits_TE: Tensor | None = None
    added_TD: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    def with_padding(self, valid_T: Tensor) -> GateOutput:
        """What was found for the valid tokens, for all T: padding has empty rows and logits of 0."""

        def padded(value: Tensor | None) -> Tensor | None:
            return (
                None if value is None else value.new_zeros(valid_T.numel(), value.shape[1]).index_put((valid_T,), value)
            )

        plan = insert_padding(self.plan, valid_T)
        return replace(self, plan=plan, logits_TE=padded(self.logits_TE), added_TD=padded(self.added_TD))


class Gate(nn.Module, ABC):
    """Base of all routing strategies.

    A subclass sets ``config_type``, builds its parameters in ``__init__`` and implements :meth:`route`.
    It declares ``causality``; ``needs`` (what it cannot do without: "ids", "position", "segment", "prev_logits"); and
    ``weight_sum``: what the weights of one token add up to ("one", "at_most_one" or "free"); and
    ``interchangeable_experts``: whether numbering the experts otherwise only numbers the plan otherwise, which is not
    so where they stand in groups, at the leaves of a tree or under a code.
    """

    config_type: ClassVar[type[GateConfig]]
    causality: Causality = Causality.PER_TOKEN
    needs: frozenset[str] = frozenset()
    weight_sum: Literal["one", "at_most_one", "free"] = "free"
    interchangeable_experts: bool = True

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
    def num_logits(self) -> int:
        """Width of ``GateOutput.logits_TE`` and ``GateInput.prev_logits_TE``; E unless a gate has more to score."""
        return self.num_experts

    @property
    def max_k(self) -> int | None:
        """Most experts that one token can have, or None when there is no bound below E."""
        return None

    def forward(self, inp: GateInput) -> GateOutput:
        """Route ``inp``. With ``inp.replay`` the selection is that plan's and only weights are computed.

        Padding is cut out before :meth:`route` and put back after it. Everything is computed in fp32 (fp64 when tokens
        and parameters are fp64), under autocast too.

        Raises:
            GateNumericsError: a score is NaN or infinite.
            ValueError: a field that the gate ``needs`` is missing, or the plan to replay is not of these tokens.
        """
        name, num_tokens = self.config.name, inp.x_TD.shape[0]
        missing = sorted(need for need in self.needs if getattr(inp, _FIELD_OF_NEED[need]) is None)
        if missing:
            raise ValueError(f"gate {name!r} needs {missing[0]}: pass {_FIELD_OF_NEED[missing[0]]}")
        if inp.replay is not None and inp.replay.num_tokens != num_tokens:
            raise ValueError(f"gate {name!r}: the plan to replay has {inp.replay.num_tokens} tokens, not {num_tokens}")
        valid_T = inp.valid_T
        if valid_T is not None and bool(valid_T.all()):
            valid_T = None
        with torch.autocast(inp.x_TD.device.type, enabled=False):
            seen = replace(inp, valid_T=valid_T).without_padding()
            out = self.route(replace(seen, x_TD=self._wide(seen.x_TD)))
        return out if valid_T is None else out.with_padding(valid_T)

    @abstractmethod
    def route(self, inp: GateInput) -> GateOutput:
        """Route tokens that are all valid and in fp32 or fp64; the strategy itself. See :meth:`forward`."""

    def _wide(self, x_TD: Tensor) -> Tensor:
        param = next(self.parameters(), None)
        both_double = x_TD.dtype == torch.float64 and (param is None or param.dtype == torch.float64)
        return x_TD.to(torch.float64 if both_double else torch.float32)

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """Move schedules (temperature, thresholds) to ``step``: a pure function of the step and the run's length.

        Args:
            step: optimizer step, 0-based.
            total_steps: how many the run takes; None where nobody knows.

        Raises:
            ValueError: a schedule is a share of a run whose length is not known.
        """

    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move controllers once per optimizer step.

        Args:
            load_E: (E,) int64 offered load of this layer over all ranks and micro-batches of the step.
            signals: what this layer's gate said in :attr:`GateOutput.signals`, added up likewise.
        """

    def causal_surrogate(self) -> Gate | None:
        """The gate that serves token-by-token decode; None when there is nothing sound to do."""
        return None if self.causality is Causality.BATCH else self

    @property
    def generates_text(self) -> bool:
        """Whether a causal language model can use it: it looks at no later token, or has a surrogate that does not."""
        return self.causality is not Causality.BATCH or self.causal_surrogate() is not None

    @property
    def trains_as_it_serves(self) -> bool:
        """Whether, noise and capacity apart, training routes a token as generation does; not so while searching."""
        return self.causality is Causality.PER_TOKEN

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps buffers wide when the model goes to half precision: steps of a bias are too small for it."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(new.device)
        return self


_FIELD_OF_NEED = {"ids": "ids_T", "position": "position_T", "segment": "segment_T", "prev_logits": "prev_logits_TE"}


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
