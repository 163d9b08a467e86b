"""Rank 0 of a serving gang: sends rows to the ranks that hold their experts, and tells these what to hold.

Implements the protocol that the inference engine defines for a model whose experts are spread over processes. All
calls but :meth:`ServingGang.describe` and :meth:`ServingGang.close` come from one thread, one after another; so every
worker gets its orders in order, and no pass runs with two placements.

What is exact: an expert with one holder gets the rows that one process would give it, in one product of the same op,
and the weighted sums run in the order of :class:`moe.dispatch.LocalDispatcher`. The rows of an expert with copies may
be in two products; where a product's rows do not depend on their number (batch-invariant mode) that changes no bit.

Shape suffixes: L MoE layers, T tokens, D width, E experts, W ranks, N rows, e experts held here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gates import RoutingPlan
from moe.dispatch import Dispatched, LocalDispatcher
from moe.ops.token_permute import RowOrder, combine_rows
from moe.transformer import Transformer
from parallel.gang_experts import HeldExperts, chunk_of, expert_bytes, sub_bank
from parallel.gang_link import GangError, GangLink, Op, Pending
from parallel.gang_member import GangMember
from parallel.gang_planner import expected_rows, imbalance_of, plan_layer
from parallel.gang_rows import send_rows
from parallel.gang_split import HolderTable
from parallel.placement import Ints, Placement

FATE_S = 1.0
"""How long a lost worker's process is given to be seen as ended, so that the error can say how."""


class WorkerProcesses(Protocol):
    """The processes behind ranks 1 to W - 1."""

    def fate(self, rank: int) -> str | None:
        """How the rank's process has ended, as the end of a sentence about it; None while it runs."""
        ...

    def end(self, *, told: bool) -> None:
        """See that all of them end. ``told``: they have been told to, and need a moment."""
        ...


@dataclass(frozen=True)
class GangTicket:
    """What :meth:`GangDispatcher.combine` needs; the last three as in :class:`moe.dispatch.LocalTicket`.

    Attributes:
        y_ND: (N, D) outputs, rank after rank; the workers' parts are being filled.
        order: between the plan's pairs and those rows.
        answers: receives under way.
        sent: sends under way.
    """

    y_ND: Tensor
    order: RowOrder
    answers: list[Pending]
    sent: list[Pending]
    weight_N: Tensor
    residual_T: Tensor | None
    x_TD: Tensor | None


class GangDispatcher:
    """Dispatches the tokens of one layer; see :class:`moe.dispatch.Dispatcher`."""

    def __init__(self, gang: ServingGang, layer: int) -> None:
        self._gang, self._layer = gang, layer

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """Send each worker its rows; what is left are this rank's, sorted by held expert.

        Raises:
            ValueError: the plan was made for another number of tokens.
            GangError: a worker is gone.
        """
        if x_TD.dim() != 2 or x_TD.shape[0] != plan.num_tokens:
            raise ValueError(f"plan routes {plan.num_tokens} tokens, x_TD has shape {tuple(x_TD.shape)}")
        return self._gang.dispatch(self._layer, x_TD, plan)

    def combine(self, y_ND: Tensor, ticket: GangTicket) -> Tensor:
        """See :meth:`moe.dispatch.Dispatcher.combine`.

        Raises:
            GangError: a worker is gone, or has not answered in time.
        """
        self._gang.collect(self._layer, ticket)
        ticket.y_ND[: y_ND.shape[0]] = y_ND
        y_TD = combine_rows(ticket.y_ND, ticket.weight_N, ticket.order)
        if ticket.residual_T is not None and ticket.x_TD is not None:
            y_TD = y_TD + ticket.residual_T.to(y_TD.dtype).unsqueeze(1) * ticket.x_TD.to(y_TD.dtype)
        return y_TD


class ServingGang:
    """The whole gang, as rank 0 sees it.

    Args:
        link: to the workers, which hold what ``owner_LE`` says and are waiting for orders.
        workers: their processes.
        owner_LE: (L, E) rank that owns each expert.
        extra_experts: most copies on one rank in one layer.
    """

    def __init__(self, link: GangLink, workers: WorkerProcesses, owner_LE: Ints, *, extra_experts: int = 1) -> None:
        self._link, self._workers, self._extra = link, workers, extra_experts
        self._others = range(1, link.world_size)
        self._start = [Placement(owner_E, world_size=link.world_size) for owner_E in owner_LE]
        self._member: GangMember | None = None
        self._tables: list[HolderTable] = []
        self._failure: GangError | None = None
        self._closed = False
        self._rows_LW = np.zeros((len(owner_LE), link.world_size), dtype=np.int64)
        self._rows_before_LW = self._rows_LW.copy()  # the last change of placement
        self._waited_s_L = np.zeros(len(owner_LE))
        self._rebalances = 0

    # --- the model ----------------------------------------------------------------------------------------------------

    def attach(self, model: Transformer) -> None:
        """Spread ``model``, whose experts are those that the workers hold; frees what rank 0 does not hold.

        Raises:
            ValueError: another number of layers or experts, or layers that are spread already.
            TypeError: a bank whose experts cannot be told apart.
        """
        placements = self._start if self._member is None else self._member.placements
        layers = [layer for _, layer in model.moe_layers()]
        if [layer.num_experts for layer in layers] != [placement.num_experts for placement in placements]:
            raise ValueError("the model has other layers or experts than the gang was started for")
        if not all(isinstance(layer.dispatcher, LocalDispatcher) for layer in layers):
            raise ValueError("the experts of this model are spread already")
        banks = []
        for index, (layer, placement) in enumerate(zip(layers, placements, strict=True)):
            whole, held = layer.experts, HeldExperts(sub_bank(layer.experts, placement.owned_by(0)))
            if placement.copied_to(0):
                held.copies = sub_bank(whole, placement.copied_to(0))
            layer.experts, layer.dispatcher = held, GangDispatcher(self, index)
            banks.append(held)
        self._member = GangMember(self._link, banks, placements)
        self._tables = [HolderTable(placement) for placement in placements]

    @torch.inference_mode()
    def swap(self, model: Transformer) -> None:
        """Other weights: send every worker its experts of ``model``, then spread that.

        Raises:
            GangError: a worker is gone, or has no room for them.
        """
        layers = [layer for _, layer in model.moe_layers()]
        with self._guarded():
            for index, layer in enumerate(layers):
                size = expert_bytes(layer.experts)
                for rank in self._others:
                    for message in self._link.order(rank, Op.WEIGHTS, index, size):
                        message.wait()
                    for expert in self._tables[index].held_We[rank]:
                        self._link.send(chunk_of(layer.experts, expert), rank).wait()
                self._hear_all()
            self._tell_all(Op.COMMIT)
        self.attach(model)

    # --- one pass -----------------------------------------------------------------------------------------------------

    def dispatch(self, layer: int, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
        """See :meth:`GangDispatcher.dispatch`."""
        split = self._tables[layer].split(plan.load_E.cpu().numpy())
        pair_N = plan.expert_order_N()[torch.from_numpy(split.row_N).to(x_TD.device)]
        row_N = torch.empty_like(pair_N)
        row_N[pair_N] = torch.arange(pair_N.numel(), device=pair_N.device)
        k = plan.uniform_k
        token_N = torch.div(pair_N, k, rounding_mode="floor") if k else plan.token_N()[pair_N]
        y_ND = x_TD.new_empty(token_N.numel(), x_TD.shape[1])
        tokens_W, parts_W = token_N.split(split.rows_W), y_ND.split(split.rows_W)
        answers: list[Pending] = []
        sent: list[Pending] = []
        with self._guarded():
            for rank in self._others:
                if split.rows_W[rank]:
                    sent += send_rows(self._link, rank, layer, split.load_We[rank], x_TD, tokens_W[rank])
                    answers.append(self._link.receive(parts_W[rank], rank))
        self._rows_LW[layer] += split.rows_W
        load_e = torch.from_numpy(split.load_We[0]).to(x_TD.device)
        order = RowOrder(token_N, pair_N, row_N, plan.row_ptr_T1, k)
        identity = None if plan.residual_T is None else x_TD
        ticket = GangTicket(y_ND, order, answers, sent, plan.weight_N, plan.residual_T, identity)
        return Dispatched(x_TD.index_select(0, tokens_W[0]), load_e, ticket)

    def collect(self, layer: int, ticket: GangTicket) -> None:
        """Wait for the workers' outputs."""
        begin_s = time.perf_counter()
        with self._guarded():
            for message in (*ticket.answers, *ticket.sent):
                message.wait()
        self._waited_s_L[layer] += time.perf_counter() - begin_s

    # --- placement ----------------------------------------------------------------------------------------------------

    def rows(self) -> Tensor:
        """(L, W) rows that each rank has computed since the start."""
        return torch.from_numpy(self._rows_LW.copy())

    def _imbalance(self) -> float:
        return imbalance_of(self._rows_LW - self._rows_before_LW)

    @torch.inference_mode()
    def rebalance(self, load_LE: Tensor) -> dict[str, Any]:
        """Plan copies for ``load_LE`` (L, E) and bring them to their holders, between two passes.

        Every rank makes room, then owners send layer by layer, and when all ranks have everything, the new placement
        holds. If a rank has no room the old placement stays, and the summary says so under "refused".

        Raises:
            GangError: a worker is gone.
        """
        assert self._member is not None, "attach a model first"
        begin_s, old = time.perf_counter(), self._member.placements
        load = load_LE.cpu().to(torch.int64).numpy()
        new = [plan_layer(placement, load_E, self._extra) for placement, load_E in zip(old, load, strict=True)]
        before, after = imbalance_of(expected_rows(load, old)), imbalance_of(expected_rows(load, new))
        summary: dict[str, Any] = {"changed": False, "expected_imbalance": (before, after)}
        if new == old:
            return summary
        with self._guarded():
            refused = self._moved(old, new)
            if refused is not None:
                self._member.drop()
                self._tell_all(Op.DROP)
                return {**summary, "refused": refused}
            self._tell_all(Op.COMMIT)
        self._member.commit()
        self._tables = [HolderTable(placement) for placement in new]
        copied = sum(len((b.holders_EW & ~a.holders_EW).nonzero()[0]) for a, b in zip(old, new, strict=True))
        dropped = sum(len((a.holders_EW & ~b.holders_EW).nonzero()[0]) for a, b in zip(old, new, strict=True))
        measured = self._imbalance()
        self._rows_before_LW = self._rows_LW.copy()
        self._rebalances += 1
        return {
            **summary,
            "changed": True,
            "measured_imbalance": measured,
            "copied": copied,
            "dropped": dropped,
            "seconds": time.perf_counter() - begin_s,
        }

    def _moved(self, old: Sequence[Placement], new: Sequence[Placement]) -> str | None:
        """Bring copies to where ``new`` wants them, without using them yet; why a rank has no room for them."""
        assert self._member is not None
        body = torch.from_numpy(np.stack([placement.holders_EW for placement in new]).astype(np.uint8)).flatten()
        self._tell_all(Op.PREPARE, body=body)
        refused = self._verdicts(partial(self._member.prepare, new))
        for layer in [index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]:
            if refused is None:
                self._tell_all(Op.MOVE, layer)
                self._member.move(layer)
                refused = self._verdicts(partial(self._member.build, layer))
        return refused

    def _verdicts(self, own: Callable[[], None]) -> str | None:
        """Do ``own`` part and hear how the others fared; which ranks failed and why."""
        problems = []
        try:
            own()
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises plain RuntimeErrors
            problems.append(f"rank 0: {error}")
        for rank in self._others:
            problem = self._link.verdict(rank)
            if problem is not None:
                problems.append(f"rank {rank}: {problem}")
        return "; ".join(problems) or None

    # --- life and death -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Ask every worker for a sign of life. Returns within the time-out of one message.

        Raises:
            GangError: one is gone, or hangs.
        """
        with self._guarded():
            for rank in self._others:
                fate = self._workers.fate(rank)
                if fate is not None:
                    raise GangError(rank, fate)
            answers = [self._link.receive(torch.empty(1, dtype=torch.uint8), rank) for rank in self._others]
            self._tell_all(Op.PING)
            for answer in answers:
                answer.wait()

    def close(self) -> None:
        """End the workers. May be called again, and from any thread once no pass runs."""
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._failure = GangError(0, "has closed the gang")
            for rank in self._others:
                with suppress(GangError):  # the others are told all the same
                    for message in self._link.order(rank, Op.STOP):
                        message.wait()
        self._workers.end(told=True)

    def describe(self) -> dict[str, Any]:
        """Numbers for people and metrics; JSON values only.

        ``holders``: by layer and expert. ``rows``: by layer and rank since the start. ``imbalance``: rows of the
        busiest rank over the mean's, since experts were last moved. ``waited_s``: by layer, for workers' outputs.
        """
        placements = self._start if self._member is None else self._member.placements
        return {
            "world_size": self._link.world_size,
            "extra_experts": self._extra,
            "holders": [[p.holders(expert) for expert in range(p.num_experts)] for p in placements],
            "rows": self._rows_LW.tolist(),
            "imbalance": self._imbalance(),
            "waited_s": self._waited_s_L.tolist(),
            "rebalances": self._rebalances,
            "failure": None if self._failure is None or self._closed else str(self._failure),
        }

    def _tell_all(self, op: Op, *arguments: int, body: Tensor | None = None) -> None:
        for message in [m for rank in self._others for m in self._link.order(rank, op, *arguments, body=body)]:
            message.wait()

    def _hear_all(self) -> None:
        for rank in self._others:
            problem = self._link.verdict(rank)
            if problem is not None:
                raise GangError(rank, f"could not do what it was told: {problem}")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After a failure nothing goes on: messages that were meant for an earlier order may still be under way."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except GangError as error:
            self._failure = self._explained(error)
            raise self._failure from error

    def _explained(self, error: GangError) -> GangError:
        """Who was first, and how its process ended, if that can be seen."""
        deadline = time.monotonic() + (FATE_S if "is gone" in str(error) else 0.0)
        while True:
            fates = {rank: fate for rank in self._others if (fate := self._workers.fate(rank)) is not None}
            killed = [rank for rank, fate in fates.items() if "killed" in fate]
            for rank in (*killed, error.rank, *fates):
                if rank in fates:
                    return GangError(rank, fates[rank])
            if time.monotonic() > deadline:
                return error
            time.sleep(0.02)
