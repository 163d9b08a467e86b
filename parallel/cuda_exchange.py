"""Running a schedule on CUDA tensors: one grouped NCCL call a round, on a stream beside that of compute.

NCCL matches messages by order, not by name, and a group call begins all of its messages together; the canonical rounds
of :mod:`parallel.exchange` are made for that. Calls are queued by the caller's own thread: two threads that queue on
two communicators can wait for each other on the device.

Only here and in the exchange of rows does the engine know of CUDA. Nothing in this file has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.exchange import Transfer, piece_of
from parallel.partial_sums import PartialSums


class CudaRounds:
    """A stream and a communicator of their own for the copies of all layers."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self._group, self._stream = group, torch.cuda.Stream(device)
        # The first point-to-point call of a communicator would need all of its ranks.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def run(
        self,
        mine: Sequence[Transfer],
        rank: int,
        pieces: int,
        chunks: Mapping[int, Tensor],
        sums: PartialSums | None = None,
    ) -> torch.cuda.Event:
        """Queue this rank's part of a schedule behind what the current stream has queued; returns its end.

        Args:
            mine: transfers of ``rank`` in canonical order.
            chunks: by expert, flat.
            sums: add what comes, in canonical order, instead of storing it.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _, transfers in groupby(mine, key=lambda t: t.round):
                self._round(list(transfers), rank, pieces, chunks, sums)
            for chunk in chunks.values():
                chunk.record_stream(self._stream)  # its memory must not be given away while this stream uses it
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def _round(
        self,
        transfers: list[Transfer],
        rank: int,
        pieces: int,
        chunks: Mapping[int, Tensor],
        sums: PartialSums | None,
    ) -> None:
        calls, came = [], []
        for t in transfers:
            if t.src == rank:
                part = sums.take(t) if sums else piece_of(chunks[t.expert], t.piece, pieces)
                calls.append(dist.P2POp(dist.isend, part, group=self._group, group_peer=t.dst))
                continue
            part = sums.room(t) if sums else piece_of(chunks[t.expert], t.piece, pieces)
            calls.append(dist.P2POp(dist.irecv, part, group=self._group, group_peer=t.src))
            came.append((t, part))
        for work in dist.batch_isend_irecv(calls):
            work.wait()  # the stream waits, not the host
        if sums:
            for t, part in came:
                sums.add(t, part)
