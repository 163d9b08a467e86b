"""Messages between the ranks of a serving gang, each with the rank at its other end to blame.

Rank 0 speaks, workers listen: every message to a worker begins with a header of eight integers; a body follows in the
same message if it is small, else in a second one. Over gloo a message may be shorter than the buffer that waits for
it, so one is enough for the rows of a decoding pass. The process groups belong to the gang alone and are not
torch.distributed's global ones: a server may have others, or several gangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import is_timeout

HEADER_INTS = 8
ALIGN_BYTES = 64
INLINE_BYTES = 1 << 20
"""Bodies up to here travel in the header's message. It bounds a buffer, not what can be sent."""
VERDICT_BYTES = 512
FOREVER = timedelta(days=365)


class GangError(RuntimeError):
    """A rank of the gang is gone, hangs, or could not do what it was told.

    Attributes:
        rank: which one.
    """

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"expert rank {rank} {what}")
        self.rank = rank


class Op(IntEnum):
    """What rank 0 tells a worker; the arguments are the integers of its header.

    Attributes:
        STOP: end.
        PING: answer.
        EXPERTS: (layer, rows) compute rows; body: rows of each held expert, then the rows. Answer: as many rows.
        PREPARE: make room for the placements of the body (L, E, W bytes). Answer: a verdict.
        MOVE: (layer) send and receive copies of that layer, and build a bank of them. Answer: a verdict.
        COMMIT: what was prepared holds from now on.
        DROP: forget what was prepared.
        WEIGHTS: (layer, bytes of an expert) one message for each expert held there follows. Answer: a verdict.
    """

    STOP = 0
    PING = 1
    EXPERTS = 2
    PREPARE = 3
    MOVE = 4
    COMMIT = 5
    DROP = 6
    WEIGHTS = 7


@dataclass(frozen=True)
class Order:
    """A message as a worker sees it.

    Attributes:
        op, arguments: of the header.
        body: (bytes,) uint8; valid until the next order is read.
    """

    op: Op
    arguments: tuple[int, ...]
    body: Tensor


@dataclass(frozen=True)
class Pending:
    """A message under way; keeps its memory alive."""

    rank: int
    tensor: Tensor
    work: Any
    timeout: timedelta

    def wait(self) -> None:
        """Until it has arrived, or left.

        Raises:
            GangError: names the rank at the other end.
        """
        try:
            self.work.wait(self.timeout)
        except RuntimeError as error:
            if is_timeout(error):
                raise GangError(self.rank, f"has not answered for {self.timeout.total_seconds():g} s") from error
            raise GangError(self.rank, "is gone: the connection to it is lost") from error


class GangLink:
    """This rank's connections to all others of the gang. All ranks must construct it at the same time.

    Args:
        store: in which the ranks met.
        device: where rows are; on CUDA they travel by NCCL, headers by gloo all the same.
        timeout_s: how long one message may take; None: for ever, as workers wait for orders.
        connect_s: how long connecting may take.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        timeout_s: float | None,
        connect_s: float = 60.0,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.timeout = FOREVER if timeout_s is None else timedelta(seconds=timeout_s)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # By address: gloo would ask the resolver for this machine's name, which may not answer.
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=connect_s)
        self._group: Any = gloo(dist.PrefixStore("gang/gloo", store), rank, world_size, options)
        self._rows_group: Any = self._group
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            self._rows_group = dist.ProcessGroupNCCL(dist.PrefixStore("gang/nccl", store), rank, world_size, nccl)
        self._buffer = torch.empty(INLINE_BYTES, dtype=torch.uint8)

    def send(self, tensor: Tensor, rank: int, tag: int = 0) -> Pending:
        """Begin to send a contiguous tensor, which must not change until it has left."""
        return self._begin(self._group_of(tensor).send, tensor, rank, tag)

    def receive(self, tensor: Tensor, rank: int, tag: int = 0) -> Pending:
        """Begin to fill ``tensor``, contiguous, with what ``rank`` sends."""
        return self._begin(self._group_of(tensor).recv, tensor, rank, tag)

    def _group_of(self, tensor: Tensor) -> Any:
        return self._rows_group if tensor.is_cuda else self._group

    def _begin(self, call: Any, tensor: Tensor, rank: int, tag: int) -> Pending:
        try:
            return Pending(rank, tensor, call([tensor], rank, tag), self.timeout)
        except RuntimeError as error:
            raise GangError(rank, "is gone: the connection to it is lost") from error

    # --- orders: header and body --------------------------------------------------------------------------------------

    def order(self, rank: int, op: Op, *arguments: int, body: Tensor | None = None) -> list[Pending]:
        """Tell a worker something. ``body``: (bytes,) uint8 on the CPU."""
        message = self.message(op, arguments, 0 if body is None else body.numel())
        if body is None:
            return [self.send(message, rank)]
        room = message[HEADER_INTS * 8 :]
        if room.numel() == body.numel():
            room.copy_(body)
            return [self.send(message, rank)]
        return [self.send(message, rank), self.send(body, rank)]

    @staticmethod
    def message(op: Op, arguments: tuple[int, ...], body_bytes: int) -> Tensor:
        """(bytes,) uint8 with the header filled in, and room for the body if it is small enough to be inline."""
        inline = HEADER_INTS * 8 + body_bytes <= INLINE_BYTES
        message = torch.empty(HEADER_INTS * 8 + (body_bytes if inline else 0), dtype=torch.uint8)
        fields = [int(op), body_bytes, int(inline), *arguments]
        message[: HEADER_INTS * 8].view(torch.int64).copy_(
            torch.tensor(fields + [0] * (HEADER_INTS - len(fields)), dtype=torch.int64)
        )
        return message

    def next_order(self) -> Order:
        """Wait for what rank 0 says next."""
        self.receive(self._buffer, 0).wait()
        fields = self._buffer[: HEADER_INTS * 8].view(torch.int64).tolist()
        op, body_bytes, inline = Op(fields[0]), fields[1], fields[2]
        if inline:
            body = self._buffer[HEADER_INTS * 8 : HEADER_INTS * 8 + body_bytes]
        else:
            body = torch.empty(body_bytes, dtype=torch.uint8)
            self.receive(body, 0).wait()
        return Order(op, tuple(fields[3:]), body)

    # --- answers that only say whether something went well ------------------------------------------------------------

    def answer(self, problem: str | None = None) -> None:
        """A worker's verdict on what it was told to do."""
        verdict = torch.zeros(VERDICT_BYTES, dtype=torch.uint8)
        text = (problem or "").encode()[: VERDICT_BYTES - 1]
        if problem is not None:
            verdict[0] = 1
            verdict[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        self.send(verdict, 0).wait()

    def verdict(self, rank: int) -> str | None:
        """What went wrong on ``rank``, or None."""
        verdict = torch.empty(VERDICT_BYTES, dtype=torch.uint8)
        self.receive(verdict, rank).wait()
        return bytes(verdict[1:].tolist()).rstrip(b"\0").decode(errors="replace") if verdict[0] else None
