"""The mixture-of-experts layer: gate, dispatcher, experts and shared experts. Usable alone in anybody's model.

    layer = MoELayer(256, 512, num_experts=8, gate={"name": "topk", "k": 2})
    y, routing = layer(torch.randn(4, 128, 256))

Shape suffixes: T tokens of this rank, D width, E experts, N chosen (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gates import Causality, Gate, GateConfig, GateInput, GateOutput, Mode, RoutingPlan, Slots, build_gate
from gates.metrics import agreement, max_vio
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.errors import UserError
from moe.experts import ExpertBank, Experts, SwiGLU
from moe.route_alone import route_alone


@dataclass(frozen=True)
class RoutingContext:
    """What a gate may want to know besides the tokens; see :class:`gates.GateInput` for each field.

    The T of all fields is the number of tokens that the layer sees, its leading dimensions flattened. ``causal``: the
    model is one in which a token must not depend on later ones, so that evaluation routes as generation does.
    """

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
    causal: bool = False

    def gate_input(self, x_TD: Tensor) -> GateInput:
        """These facts about the tokens ``x_TD``."""
        return GateInput(x_TD, **{name: getattr(self, name) for name in _GATE_FIELDS})


_GATE_FIELDS = tuple(f.name for f in fields(RoutingContext) if f.name != "causal")


def weighted_aux(aux: Mapping[str, Tensor], coefs: Mapping[str, float], gate_name: str) -> Tensor | float:
    """Sum of ``coefs[name] * aux[name]``; 0.0 when there is none.

    Raises:
        ValueError: the gate returned a loss that its config has no ``<name>_coef`` for.
    """
    unknown = sorted(set(aux) - set(coefs))
    if unknown:
        raise ValueError(f"gate {gate_name!r} returned the loss {unknown[0]!r}, its config has no {unknown[0]}_coef")
    return sum((coefs[name] * loss for name, loss in aux.items()), 0.0)


@dataclass(frozen=True)
class MoEOutput:
    """What the layer returns; unpacks as ``y, routing``.

    Attributes:
        y: the layer's output, shaped like its input.
        routing: the gate's output: plan, auxiliary losses, metrics, logits.
        gate_config: weighs the auxiliary losses.
    """

    y: Tensor
    routing: GateOutput
    gate_config: GateConfig = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        yield self.y
        yield self.routing

    def aux_loss(self) -> Tensor:
        """0-d sum of coefficient times auxiliary loss, to be added to the model's loss."""
        loss = weighted_aux(self.routing.aux, self.gate_config.aux_coefs(), self.gate_config.name)
        return loss if isinstance(loss, Tensor) else self.y.new_zeros((), dtype=torch.float32)


class MoELayer(nn.Module):
    """A feed-forward layer in which a gate chooses a few of E experts for each token.

    Args:
        dim: width D of the tokens.
        hidden_dim: hidden width F of each SwiGLU expert.
        num_experts: E.
        gate: a gate's name, ``{"name": ..., options}`` or a gate config.
        num_shared_experts: experts that every token visits besides the chosen ones, with weight 1 (DeepSeekMoE,
            arXiv:2401.06066); held as one network of that multiple of F.
        expert_op: "auto", "grouped_mm" or "loop".
        dispatcher: how tokens get to experts; None computes all experts in this process.
        expert_device: where the routed experts' weights are made; "meta" leaves them to ``parallel``.

    Attributes:
        route_alone: ask the gate for every token by itself; see :mod:`moe.route_alone`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        gate: str | Mapping[str, Any] | GateConfig = "topk",
        *,
        num_shared_experts: int = 0,
        expert_op: Literal["auto", "grouped_mm", "loop"] = "auto",
        dispatcher: Dispatcher | None = None,
        expert_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.gate: Gate = build_gate(gate, dim, num_experts)
        self.experts: ExpertBank = Experts(num_experts, dim, hidden_dim, expert_op, expert_device)
        self.shared = SwiGLU(dim, num_shared_experts * hidden_dim) if num_shared_experts else None
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()
        self.route_alone = False

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """(..., D) -> output of the same shape and dtype, and the routing.

        Args:
            x: tokens; all leading dimensions are flattened to T for the gate.
            context: see :class:`RoutingContext`; None routes for training if ``self.training`` else for evaluation.

        Raises:
            ValueError: the last dimension is not D.
            gates.GateNumericsError: scores are NaN or infinite.
            UserError: the gate looks at the whole batch and cannot serve token by token (modes PREFILL and DECODE).
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoELayer(dim={self.dim}) got an input of shape {tuple(x.shape)}")
        if context is None:
            context = RoutingContext(mode=Mode.TRAIN if self.training else Mode.EVAL)
        x_TD = x.reshape(-1, self.dim)
        gate = self.gate_for(context.mode, context.causal)
        inp = context.gate_input(x_TD)
        routing = route_alone(gate, inp) if self.route_alone else gate(inp)
        if gate is not self.gate and context.mode is Mode.EVAL:
            routing = self._compared(routing, context.gate_input(x_TD))
        if routing.plan.slots is not None:
            y_TD = self._mix_slots(x_TD, routing.plan.slots)
        else:
            rows_ND, load_e, ticket = self.dispatcher.dispatch(x_TD, routing.plan)
            y_TD = self.dispatcher.combine(self.experts(rows_ND, load_e), ticket)
        if routing.added_TD is not None:
            y_TD = y_TD + routing.added_TD.to(y_TD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return MoEOutput(y_TD.view(x.shape), routing, self.gate.config)

    def _mix_slots(self, x_TD: Tensor, slots: Slots) -> Tensor:
        """Experts on mixtures of tokens (Soft MoE).

        Raises:
            UserError: experts are spread over ranks; their slots would be mixtures of other ranks' tokens.
        """
        if not isinstance(self.dispatcher, LocalDispatcher):
            raise UserError("gate 'soft' computes its experts in one process: use parallel.mode=local")
        rows_SD = slots.dispatch_TS.to(x_TD.dtype).t() @ x_TD
        load_E = torch.full((self.num_experts,), slots.slots_per_expert, device=x_TD.device)
        return slots.combine_TS.to(x_TD.dtype) @ self.experts(rows_SD, load_E)

    @torch.no_grad()
    def choose(self, x: Tensor, context: RoutingContext) -> RoutingPlan:
        """Only the gate's choice, without autograd history: what a later ``context.replay`` repeats."""
        gate = self.gate_for(context.mode, context.causal)
        routing: GateOutput = gate(context.gate_input(x.reshape(-1, self.dim)))
        return routing.plan.detach()

    @torch.no_grad()
    def _compared(self, served: GateOutput, inp: GateInput) -> GateOutput:
        """``served`` with metrics of how well the gate that generates stands in for the one that was trained."""
        batch: GateOutput = self.gate(inp)
        compared = {
            "surrogate_agreement": agreement(served.plan, batch.plan),
            "surrogate_max_vio": max_vio(served.plan.offered_E),
            "batch_max_vio": max_vio(batch.plan.offered_E),
        }
        return replace(served, metrics={**served.metrics, **compared})

    def gate_for(self, mode: Mode, causal: bool = False) -> Gate:
        """The gate to ask in ``mode``: when tokens come one after another, one that needs no later token.

        A gate that looks at the whole batch is replaced in PREFILL as well as in DECODE: a prompt must be routed the
        same whether it comes at once, in chunks or token by token, or cached keys would differ from a fresh run's. In a
        ``causal`` model it is replaced in EVAL too: a token that sees later ones through its routing would look
        better predicted than it can be when text is written.

        Raises:
            UserError: the gate declares no causal surrogate.
        """
        one_by_one = mode in (Mode.PREFILL, Mode.DECODE) or (causal and mode is Mode.EVAL)
        if not one_by_one or self.gate.causality is not Causality.BATCH:
            return self.gate
        surrogate = self.gate.causal_surrogate()
        if surrogate is None:
            raise UserError(
                f"gate {self.gate.config.name!r} routes a token by looking at the whole batch and has no causal"
                " surrogate, so this model cannot generate text"
            )
        return surrogate
