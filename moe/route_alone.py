"""Routing token by token: what a gate that computes a token differently beside others needs in batch-invariant serving.

Shape suffixes: T tokens, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gates import Gate, GateInput, GateOutput, RoutingPlan


def route_alone(gate: Gate, inp: GateInput) -> GateOutput:
    """The gate's output for every token by itself, put together. Only while text is generated: no losses, no replay."""
    if inp.x_TD.shape[0] <= 1:
        whole: GateOutput = gate(inp)
        return whole
    outputs: list[GateOutput] = [gate(_token(inp, t)) for t in range(inp.x_TD.shape[0])]
    return GateOutput(
        plan=join_plans([output.plan for output in outputs]),
        logits_TE=_joined([output.logits_TE for output in outputs]),
        added_TD=_joined([output.added_TD for output in outputs]),
    )


def join_plans(plans: Sequence[RoutingPlan]) -> RoutingPlan:
    """One plan for the tokens of all of them, in order. Nothing of dropped pairs or slots is kept."""
    count_T = torch.cat([plan.row_ptr_T1.diff() for plan in plans])
    row_ptr_T1 = torch.zeros(count_T.numel() + 1, dtype=torch.int64, device=count_T.device)
    torch.cumsum(count_T, 0, out=row_ptr_T1[1:])
    first = plans[0]
    load_E = torch.stack([plan.load_E for plan in plans]).sum(0)
    undispatched = [plan.undispatched for plan in plans if plan.undispatched is not None]
    return RoutingPlan(
        row_ptr_T1,
        torch.cat([plan.expert_N for plan in plans]),
        torch.cat([plan.weight_N for plan in plans]),
        first.num_experts,
        load_E,
        load_E,
        uniform_k=first.uniform_k if all(plan.uniform_k == first.uniform_k for plan in plans) else None,
        residual_T=_joined([plan.residual_T for plan in plans]),
        kind=first.kind,
        undispatched=join_plans(undispatched) if undispatched else None,
    )


def _token(inp: GateInput, t: int) -> GateInput:
    one = slice(t, t + 1)

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[one]

    return replace(
        inp,
        x_TD=inp.x_TD[one],
        ids_T=cut(inp.ids_T),
        valid_T=cut(inp.valid_T),
        segment_T=cut(inp.segment_T),
        position_T=cut(inp.position_T),
        prev_logits_TE=cut(inp.prev_logits_TE),
    )


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.cat(present) if len(present) == len(values) else None
