"""Tokens to the ranks that hold their experts, and their outputs back.

The distributed :class:`moe.dispatch.Dispatcher`. Three moves, each with its exact inverse in backward: sort the rows by
(rank, expert); exchange them between ranks; sort what came by local expert. How many rows go where follows from the
counts of all ranks (:mod:`parallel.row_split`), so nothing is padded and no message says how long it is.

Shape suffixes: T tokens, D width, N rows, E experts, W ranks, e experts computed here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gates import RoutingPlan
from moe.dispatch import Dispatched
from moe.ops.token_permute import RowOrder, combine_rows, gather_rows
from parallel.chrome_trace import StepRecorder
from parallel.collectives import CommunicationError
from parallel.placement import Ints
from parallel.row_split import RowSplit
from parallel.topology import Topology


class RowExchange:
    """Uneven exchange of rows between all ranks, in a process group of its own.

    On gloo all messages are under way at once: its ``all_to_all_single`` goes in steps, in each of which the ranks
    wait for the longest message.

    Attributes:
        sent_bytes: payload bytes that this rank has sent, by kind.
        waited_s: how long exchanges have held the caller up, later ranks included.
        recorder: is told of each exchange, if there is one.
    """

    def __init__(self, topology: Topology) -> None:
        self.rank, self.world_size = topology.rank, topology.world_size
        self.sent_bytes: Counter[str] = Counter()
        self.waited_s = 0.0
        self.recorder: StepRecorder | None = None
        self._group = dist.new_group(timeout=topology.timeout) if topology.world_size > 1 else None

    def gather_counts(self, count_E: Tensor, label: str) -> Ints:
        """(W, E) counts of every rank from this rank's (E,) counts; runs whatever they are."""
        mine = count_E.to("cpu", torch.int64).contiguous()
        count_WE = torch.empty(self.world_size, mine.numel(), dtype=torch.int64)
        count_WE[self.rank] = mine
        others = self._others()
        self.swap([(r, mine) for r in others], [(r, count_WE[r]) for r in others], "counts", label)
        gathered: Ints = count_WE.numpy()
        return gathered

    def rows(self, rows_ND: Tensor, sent_W: Sequence[int], received_W: Sequence[int], label: str) -> Tensor:
        """Send the first ``sent_W[0]`` rows to rank 0 and so on; what came, in the order of ranks.

        Args:
            rows_ND: contiguous; ``sent_W`` must sum to N.
            received_W: rows that come from each rank, which both sides have worked out alike.
        """
        came_ND = rows_ND.new_empty(sum(received_W), rows_ND.shape[1])
        outgoing, incoming = rows_ND.split(list(sent_W)), came_ND.split(list(received_W))
        incoming[self.rank].copy_(outgoing[self.rank])
        self.swap(
            [(r, outgoing[r]) for r in self._others() if sent_W[r]],
            [(r, incoming[r]) for r in self._others() if received_W[r]],
            "tokens",
            label,
        )
        return came_ND

    def _others(self) -> list[int]:
        """The other ranks, each rank beginning with its neighbour, so that not all begin with the same one."""
        return [(self.rank + i) % self.world_size for i in range(1, self.world_size)]

    def swap(
        self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]], kind: str, label: str
    ) -> None:
        """Send and receive tensors, each with the rank at its other end.

        Between two ranks, the sender's order must be the receiver's.

        Raises:
            CommunicationError: a rank did not do its part; names it.
        """
        sent_bytes = sum(part.nbytes for _, part in outgoing)
        self.sent_bytes[kind] += sent_bytes
        if any(part.is_cuda for _, part in (*outgoing, *incoming)):
            calls = [dist.P2POp(dist.irecv, part, group=self._group, group_peer=r) for r, part in incoming]
            calls += [dist.P2POp(dist.isend, part, group=self._group, group_peer=r) for r, part in outgoing]
            for call in dist.batch_isend_irecv(calls):
                call.wait()  # the stream waits, not the host
            return
        begin_s = time.perf_counter()
        receives = [(r, dist.irecv(part, group=self._group, group_src=r)) for r, part in incoming]
        sends = [(r, dist.isend(part, group=self._group, group_dst=r)) for r, part in outgoing]
        for works, what in ((receives, "did not send its"), (sends, "did not take my")):
            for rank, work in works:
                try:
                    assert work is not None
                    work.wait()
                except RuntimeError as error:
                    raise CommunicationError(f"{label}: rank {rank} {what} {kind} ({error})") from error
        self.waited_s += time.perf_counter() - begin_s
        if self.recorder:
            self.recorder.exchanged(label, begin_s, sent_bytes)


@dataclass(frozen=True)
class Route:
    """The way of one dispatch between ranks.

    Attributes:
        sent_W, received_W: rows to and from each rank.
        order_N: position, among the rows that came, of each row in local expert order.
        place_N: its inverse.
        label: which layer, for error texts.
        on_arrived: called in backward when the gradients of the experts' outputs have come.
        on_returned: called in backward when the rows' gradients are back where the rows came from.
    """

    sent_W: list[int]
    received_W: list[int]
    order_N: Tensor
    place_N: Tensor
    label: str
    on_arrived: Callable[[], None]
    on_returned: Callable[[], None]


@dataclass(frozen=True)
class Ticket:
    """What :meth:`TokenDispatcher.combine` needs; attributes as in :class:`moe.dispatch.LocalTicket`."""

    route: Route
    order: RowOrder
    weight_N: Tensor
    residual_T: Tensor | None
    x_TD: Tensor | None


class TokenDispatcher:
    """Dispatches the tokens of one layer.

    Args:
        exchange: shared by all layers.
        place: called with the (W, E) counts of all ranks at each dispatch; says how rows go and which experts compute
            here, in the order of their rows.
        label: the layer's name in error texts.
        on_routed: called at each dispatch, before anything is sent.
        on_combined: called in forward when the outputs are home.
        on_arrived, on_returned: see :class:`Route`.
    """

    def __init__(
        self,
        exchange: RowExchange,
        place: Callable[[Ints], tuple[RowSplit, list[int]]],
        label: str,
        on_routed: Callable[[], None],
        on_combined: Callable[[], None],
        on_arrived: Callable[[], None],
        on_returned: Callable[[], None],
    ) -> None:
        self.exchange, self.place, self.label = exchange, place, label
        self.on_routed, self.on_combined = on_routed, on_combined
        self.on_arrived, self.on_returned = on_arrived, on_returned

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """See :meth:`moe.dispatch.Dispatcher.dispatch`; local experts are those that ``place`` names.

        Raises:
            ValueError: the plan was made for another number of tokens.
            CommunicationError: a rank did not answer; names it and the layer.
        """
        if x_TD.dim() != 2 or x_TD.shape[0] != plan.num_tokens:
            raise ValueError(f"plan routes {plan.num_tokens} tokens, x_TD has shape {tuple(x_TD.shape)}")
        device = x_TD.device
        self.on_routed()
        count_WE = self.exchange.gather_counts(plan.load_E, f"{self.label} counts")
        split, held = self.place(count_WE)
        # By expert, and the rows of one expert in the order of the ranks that they go to: that is the split.
        by_expert_N = plan.expert_order_N()
        sent_EW = torch.from_numpy(np.ascontiguousarray(split.sent_WE.T))
        rank_N = torch.arange(sent_EW.shape[1]).repeat(sent_EW.shape[0]).repeat_interleave(sent_EW.flatten())
        pair_N = by_expert_N[torch.argsort(rank_N, stable=True).to(device)]
        row_N = torch.empty_like(pair_N)
        row_N[pair_N] = torch.arange(pair_N.numel(), device=device)
        k = plan.uniform_k
        token_N = torch.div(pair_N, k, rounding_mode="floor") if k else plan.token_N()[pair_N]
        order = RowOrder(token_N, pair_N, row_N, plan.row_ptr_T1, k)

        arrival_N = torch.from_numpy(_local_expert_order(split.received_WE, held))
        place_N = torch.empty_like(arrival_N)
        place_N[arrival_N] = torch.arange(arrival_N.numel())
        route = Route(
            split.sent_WE.sum(1).tolist(),
            split.received_WE.sum(1).tolist(),
            arrival_N.to(device),
            place_N.to(device),
            self.label,
            self.on_arrived,
            self.on_returned,
        )
        rows_ND = _to_experts(gather_rows(x_TD, order), self.exchange, route)
        load_e = torch.from_numpy(split.received_WE[:, held].sum(0)).to(device)
        ticket = Ticket(route, order, plan.weight_N, plan.residual_T, None if plan.residual_T is None else x_TD)
        return Dispatched(rows_ND, load_e, ticket)

    def combine(self, y_ND: Tensor, ticket: Ticket) -> Tensor:
        """See :meth:`moe.dispatch.Dispatcher.combine`."""
        home_ND = _from_experts(y_ND, self.exchange, ticket.route)
        self.on_combined()
        y_TD = combine_rows(home_ND, ticket.weight_N, ticket.order)
        if ticket.residual_T is not None and ticket.x_TD is not None:
            y_TD = y_TD + ticket.residual_T.to(y_TD.dtype).unsqueeze(1) * ticket.x_TD.to(y_TD.dtype)
        return y_TD


def _local_expert_order(received_WE: Ints, held: Sequence[int]) -> Ints:
    """(N,) where, among rows that came sorted by (source, expert), those sorted by (place in held, source) stand."""
    begin_WE = (received_WE.cumsum() - received_WE.flatten()).reshape(received_WE.shape)
    size_M, begin_M = received_WE[:, held].T.flatten(), begin_WE[:, held].T.flatten()
    first_M = size_M.cumsum() - size_M
    positions: Ints = np.repeat(begin_M - first_M, size_M) + np.arange(int(size_M.sum()))
    return positions


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, exchange: RowExchange, route: Route) -> Tensor:
        ctx.exchange, ctx.route = exchange, route
        return _out(rows_ND, exchange, route, "dispatch")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        grad_ND = _home(grad_ND, ctx.exchange, ctx.route, "gradient of dispatch")
        ctx.route.on_returned()
        return grad_ND, None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, exchange: RowExchange, route: Route) -> Tensor:
        ctx.exchange, ctx.route = exchange, route
        return _home(y_ND, exchange, route, "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        grad_ND = _out(grad_ND, ctx.exchange, ctx.route, "gradient of combine")
        ctx.route.on_arrived()
        return grad_ND, None, None


def _out(rows_ND: Tensor, exchange: RowExchange, route: Route, what: str) -> Tensor:
    came_ND = exchange.rows(rows_ND.contiguous(), route.sent_W, route.received_W, f"{route.label} {what}")
    return came_ND.index_select(0, route.order_N)


def _home(rows_ND: Tensor, exchange: RowExchange, route: Route, what: str) -> Tensor:
    sorted_ND = rows_ND.index_select(0, route.place_N)
    return exchange.rows(sorted_ND, route.received_W, route.sent_W, f"{route.label} {what}")


_to_experts: Callable[[Tensor, RowExchange, Route], Tensor] = _ToExperts.apply
_from_experts: Callable[[Tensor, RowExchange, Route], Tensor] = _FromExperts.apply
