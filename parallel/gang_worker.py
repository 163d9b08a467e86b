"""An expert worker: holds some experts of a served model and computes the rows that rank 0 sends, until it is told to
stop or rank 0 is gone.

Shape suffixes: L MoE layers, E experts, W ranks, N rows, D width, e experts held here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from moe.ops.batch_invariant import BatchInvariant
from parallel.gang_link import GangLink, Op, Order, Pending
from parallel.gang_member import GangMember
from parallel.gang_rows import rows_in
from parallel.placement import Placement


class ExpertWorker:
    """Does what rank 0 says.

    Args:
        member: the experts of this rank.
        link: to the other ranks.
        dtype, dim: of rows.
        batch_invariant: compute as rank 0 does in that mode; see :mod:`moe.ops.batch_invariant`.
    """

    def __init__(
        self, member: GangMember, link: GangLink, dtype: torch.dtype, dim: int, *, batch_invariant: bool
    ) -> None:
        self.member, self._link, self._dtype, self._dim = member, link, dtype, dim
        self._invariant = batch_invariant

    @torch.inference_mode()
    def run(self) -> None:
        """Until the order to stop.

        Raises:
            GangError: the connection to a rank is lost.
        """
        answering: Pending | None = None
        while True:
            order = self._link.next_order()
            if answering is not None:
                answering.wait()  # it has been read: rank 0 speaks only after it has heard all answers
            answering = None
            if order.op is Op.STOP:
                return
            if order.op is Op.EXPERTS:
                answering = self._compute(order)
            elif order.op is Op.PING:
                answering = self._link.send(torch.zeros(1, dtype=torch.uint8), 0)
            elif order.op is Op.COMMIT:
                self.member.commit()
            elif order.op is Op.DROP:
                self.member.drop()
            elif order.op is Op.PREPARE:
                self._verdict(partial(self._prepare, order.body))
            elif order.op is Op.MOVE:
                layer = order.arguments[0]
                self.member.move(layer)  # if it fails, the connections are of no use any more
                self._verdict(partial(self.member.build, layer))
            else:
                self._take_weights(*order.arguments[:2])

    def _compute(self, order: Order) -> Pending:
        layer, count = order.arguments[:2]
        bank = self.member.banks[layer]
        load_e, rows_ND = rows_in(order.body, len(self.member.held(layer)), count, self._dim, self._dtype)
        if self._link.device.type == "cuda":
            rows_ND = torch.empty(count, self._dim, dtype=self._dtype, device=self._link.device)
            self._link.receive(rows_ND, 0).wait()
            load_e = load_e.to(self._link.device)
        with BatchInvariant() if self._invariant else contextlib.nullcontext():
            y_ND = bank(rows_ND, load_e).contiguous()
        return self._link.send(y_ND, 0)

    def _verdict(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises plain RuntimeErrors
            self._link.answer(str(error))
        else:
            self._link.answer()

    def _prepare(self, body: torch.Tensor) -> None:
        old = self.member.placements
        held_LEW = body.numpy().reshape(len(old), old[0].num_experts, old[0].world_size).astype(np.bool_)
        self.member.prepare([Placement(p.owner_E, held_EW) for p, held_EW in zip(old, held_LEW, strict=True)])

    def _take_weights(self, layer: int, size: int) -> None:
        chunks = []
        for _ in self.member.held(layer):
            chunk = torch.empty(size, dtype=torch.uint8, device=self._link.device)
            self._link.receive(chunk, 0).wait()
            chunks.append(chunk)
        self._verdict(partial(self.member.stage_weights, layer, chunks))
