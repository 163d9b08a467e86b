"""Bringing tokens to experts and their outputs back: the seam between a model and how experts are spread.

A dispatcher gets all tokens of this rank and the plan, and returns rows sorted by the experts that compute here. The
local one below computes every expert in this process; ``parallel`` implements the same protocol over processes.

Shape suffixes: T tokens, D width, N rows = chosen (token, expert) pairs computed here, e experts computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gates import RoutingPlan
from moe.ops.token_permute import RowOrder, combine_rows, gather_rows


class Dispatched(NamedTuple):
    """Rows ready for the experts of this process.

    Attributes:
        rows_ND: (N, D) token vectors, sorted by local expert.
        load_e: (e,) int64 rows of each local expert, in the order of the rows; sums to N.
        ticket: what ``combine`` needs to find the way back; a frozen value of the dispatcher's own type.
    """

    rows_ND: Tensor
    load_e: Tensor
    ticket: Any


class Dispatcher(Protocol):
    """Any number of dispatches may be open at once: all state is in the ticket."""

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """Bring the tokens of ``plan`` to the experts. N = 0 and T = 0 are legal; collectives run all the same."""
        ...

    def combine(self, y_ND: Tensor, ticket: Any) -> Tensor:
        """(N, D) expert outputs in the order of the dispatched rows -> (T, D) weighted sums per token."""
        ...


@dataclass(frozen=True)
class LocalTicket:
    """How to get from sorted rows back to tokens.

    Attributes:
        order: permutation between pairs and sorted rows.
        weight_N: (N,) fp32 differentiable weight of each pair, in the plan's order.
        residual_T: (T,) weight of the identity path, or None.
        x_TD: the tokens themselves, kept only for the identity path.
    """

    order: RowOrder
    weight_N: Tensor
    residual_T: Tensor | None
    x_TD: Tensor | None


class LocalDispatcher:
    """All experts in this process: a stable sort by expert and its inverse. Bitwise reproducible on every device."""

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """See :meth:`Dispatcher.dispatch`; local experts are all E experts in index order.

        Raises:
            ValueError: the plan was made for another number of tokens.
        """
        if x_TD.dim() != 2 or x_TD.shape[0] != plan.num_tokens:
            raise ValueError(f"plan routes {plan.num_tokens} tokens, x_TD has shape {tuple(x_TD.shape)}")
        pair_N = plan.expert_order_N()
        row_N = torch.empty_like(pair_N)
        row_N[pair_N] = torch.arange(pair_N.numel(), device=pair_N.device)
        k = plan.uniform_k
        token_N = torch.div(pair_N, k, rounding_mode="floor") if k else plan.token_N()[pair_N]
        order = RowOrder(token_N, pair_N, row_N, plan.row_ptr_T1, k)
        ticket = LocalTicket(order, plan.weight_N, plan.residual_T, None if plan.residual_T is None else x_TD)
        return Dispatched(gather_rows(x_TD, order), plan.load_E, ticket)

    def combine(self, y_ND: Tensor, ticket: LocalTicket) -> Tensor:
        """See :meth:`Dispatcher.combine`; adds ``residual_T * x_TD`` where the plan has an identity path."""
        y_TD = combine_rows(y_ND, ticket.weight_N, ticket.order)
        if ticket.residual_T is not None and ticket.x_TD is not None:
            y_TD = y_TD + ticket.residual_T.to(y_TD.dtype).unsqueeze(1) * ticket.x_TD.to(y_TD.dtype)
        return y_TD
