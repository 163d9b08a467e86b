"""Sparse all-gather and sparse reduce-scatter over torch.distributed, as handles.

A :class:`Communicator` runs one collective after another on a thread of its own, in the order in which they were
submitted; every rank submits the same ones in the same order. The caller computes meanwhile and waits on the handle.
It has a process group of its own, so nothing that other threads send can come between.

Why not torch's collectives: a group broadcast needs every rank for every expert, gloo has no coalescing (trying it
breaks later collectives silently), and its reduce-scatter reaches half of a link. Point-to-point along the schedules of
:mod:`parallel.exchange` moves only what a placement asks for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cuda_exchange import CudaRounds
from parallel.exchange import Schedule, Transfer, piece_of
from parallel.partial_sums import PartialSums
from parallel.topology import Topology

STAGING_BYTES = 8 * 2**20
"""How much a rank receives ahead of adding it up."""


class CommunicationError(RuntimeError):
    """A peer did not send or take what it should have; says which, in which collective."""


@dataclass
class Handle:
    """A collective under way.

    Attributes:
        label: what it is, for error texts and traces ("spAG layer 3").
        sent_bytes: payload that this rank sends in it.
        submitted_s, began_s, ended_s: when (``time.perf_counter``); NaN as long as it has not.
        waited_s: how long callers of :meth:`wait` were held up: the part of it that nothing hid.
    """

    label: str
    sent_bytes: int
    submitted_s: float
    began_s: float = float("nan")
    ended_s: float = float("nan")
    waited_s: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event, repr=False)
    _error: BaseException | None = field(default=None, repr=False)
    _event: torch.cuda.Event | None = field(default=None, repr=False)

    def wait(self) -> None:
        """Return when this rank's part is over; may be called again. On CUDA, make the current stream wait for it.

        Raises:
            CommunicationError: it failed; names the peer.
        """
        if not self._done.is_set():
            begin = time.perf_counter()
            self._done.wait()
            self.waited_s += time.perf_counter() - begin
        if self._error is not None:
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    @property
    def done(self) -> bool:
        """Is this rank's part over? On CUDA: queued."""
        return self._done.is_set()

    @property
    def duration_s(self) -> float:
        """Seconds from its first byte to its last on this rank."""
        return self.ended_s - self.began_s

    @property
    def hidden_s(self) -> float:
        """The part of :attr:`duration_s` in which nobody waited for it."""
        return max(0.0, self.duration_s - self.waited_s)


class Communicator:
    """Runs sparse collectives in the background. All ranks must construct it at the same point.

    Attributes:
        sent_bytes: payload bytes that this rank has sent, by kind ("spAG", "spRS", and what callers count).
        log: handles of finished collectives since the last :meth:`take_log`, in order.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size = topology.rank, topology.world_size
        self.sent_bytes: Counter[str] = Counter()
        self._group, self._cuda = group, None
        if group is None and topology.world_size > 1:
            on_cuda = topology.device.type == "cuda"
            self._group = dist.new_group(backend="nccl" if on_cuda else "gloo", timeout=topology.timeout)
            self._cuda = CudaRounds(topology.device, self._group) if on_cuda else None
        self._log: list[Handle] = []
        self._jobs: queue.SimpleQueue[tuple[Handle, Callable[[], None]] | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="communicator", daemon=True)
        self._thread.start()

    def gather(self, schedule: Schedule, chunks: Mapping[int, Tensor], label: str = "spAG") -> Handle:
        """Run an spAG schedule: afterwards each chunk that this rank receives equals its owner's, bit for bit.

        Args:
            schedule: from :func:`parallel.exchange.gather_schedule`.
            chunks: by expert, for every expert that this rank holds afterwards: a contiguous 1-d tensor; all of one
                size and dtype. They must not change until the handle is done.
        """
        return self._submit("spAG", schedule, chunks, label, self._gather)

    def reduce(
        self, schedule: Schedule, chunks: Mapping[int, Tensor], label: str = "spRS", dtype: torch.dtype | None = None
    ) -> Handle:
        """Run an spRS schedule: afterwards the owner's chunk is the sum over its holders.

        Args:
            schedule, chunks: as in :meth:`gather`, but chunks of copies may be of a narrower dtype than owned ones.
            dtype: of owned chunks, in which sums are made and travel; None: all chunks are of one dtype.
        """
        return self._submit("spRS", schedule, chunks, label, partial(self._reduce, dtype=dtype), dtype)

    def take_log(self) -> list[Handle]:
        """Finished collectives since the last call."""
        taken, self._log = self._log, []
        return taken

    def close(self) -> None:
        """End the thread when all that was submitted is over."""
        self._jobs.put(None)
        self._thread.join()

    def _submit(
        self,
        kind: str,
        schedule: Schedule,
        chunks: Mapping[int, Tensor],
        label: str,
        run: Callable[[list[Transfer], int, Mapping[int, Tensor], str], None],
        dtype: torch.dtype | None = None,
    ) -> Handle:
        mine = schedule.transfers(self.rank)
        sent = sum(
            piece.numel() * (dtype or piece.dtype).itemsize
            for piece in (piece_of(chunks[t.expert], t.piece, schedule.pieces) for t in mine if t.src == self.rank)
        )
        self.sent_bytes[kind] += sent
        handle = Handle(label, sent, time.perf_counter())
        if mine and self._cuda is not None:
            handle.began_s = handle.submitted_s
            sums = PartialSums(chunks, schedule.pieces, dtype) if schedule.reduces else None
            handle._event = self._cuda.run(mine, self.rank, schedule.pieces, chunks, sums)
            handle.ended_s = time.perf_counter()  # of queueing; the host does not wait for the device
            handle._done.set()
            self._log.append(handle)
        elif mine:
            self._jobs.put((handle, lambda: run(mine, schedule.pieces, chunks, label)))
        else:  # nothing to send or receive here: over at once, in the same order on every rank all the same
            handle.began_s = handle.ended_s = handle.submitted_s
            handle._done.set()
            self._log.append(handle)
        return handle

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            handle, run = job
            handle.began_s = time.perf_counter()
            try:
                if self._failed is not None:
                    raise CommunicationError(f"{handle.label}: not begun, because {self._failed}")
                run()
            except BaseException as error:  # told to whoever waits; what follows would wait for the same peer
                handle._error = error
                self._failed = self._failed or error
            handle.ended_s = time.perf_counter()
            self._log.append(handle)
            handle_done = handle._done
            del job, run, handle  # or the chunks' memory would be kept until the next collective
            handle_done.set()

    # --- on gloo: everything that can go is under way at once -----------------------------------------------------

    def _gather(self, mine: list[Transfer], pieces: int, chunks: Mapping[int, Tensor], label: str) -> None:
        comes = {t.expert for t in mine if t.dst == self.rank}
        coming: dict[tuple[int, int], _Arrival] = {}
        leaving, forwarded = [], []
        # What was here from the start goes at once, so that no link idles while another one is waited for.
        for t in mine:
            part = piece_of(chunks[t.expert], t.piece, pieces)
            if t.dst == self.rank:
                coming[t.expert, t.piece] = _Arrival(t, self._receive(t, part, pieces))
            elif t.expert in comes:
                forwarded.append((t, part))
            else:
                leaving.append((t, self._send(t, part, pieces)))
        for t, part in forwarded:
            coming[t.expert, t.piece].wait(label)
            leaving.append((t, self._send(t, part, pieces)))
        for arrival in coming.values():
            arrival.wait(label)
        _wait_sent(leaving, label)

    def _reduce(
        self, mine: list[Transfer], pieces: int, chunks: Mapping[int, Tensor], label: str, dtype: torch.dtype | None
    ) -> None:
        sums = PartialSums(chunks, pieces, dtype)
        missing = Counter((t.expert, t.piece) for t in mine if t.dst == self.rank)
        parents = {(t.expert, t.piece): t for t in mine if t.src == self.rank}
        arriving = deque(t for t in mine if t.dst == self.rank)
        arrivals: deque[tuple[_Arrival, Tensor]] = deque()
        leaves = deque(t for key, t in parents.items() if not missing[key])
        widened: deque[tuple[Transfer, dist.Work, int]] = deque()
        leaving = []
        coming_bytes = widened_bytes = 0
        while leaves or arriving or arrivals:
            while arriving and (not arrivals or coming_bytes < STAGING_BYTES):
                t = arriving.popleft()
                stage = sums.room(t)
                arrivals.append((_Arrival(t, self._receive(t, stage, pieces)), stage))
                coming_bytes += stage.nbytes
            while leaves and widened_bytes < STAGING_BYTES:
                t = leaves.popleft()
                part = sums.take(t)
                work = self._send(t, part, pieces)
                if sums.widens(t):
                    widened.append((t, work, part.nbytes))
                    widened_bytes += part.nbytes
                else:
                    leaving.append((t, work))
            if leaves and (not arrivals or leaves[0] < arrivals[0][0].transfer):
                # Every rank waits in canonical order. So the first transfer that is not over is under way on both of
                # its sides, and nobody waits in a circle.
                t, work, size = widened.popleft()
                _wait_sent([(t, work)], label)
                widened_bytes -= size
                continue
            if not arrivals:
                continue
            arrival, stage = arrivals.popleft()
            arrival.wait(label)
            coming_bytes -= stage.nbytes
            sums.add(arrival.transfer, stage)
            key = (arrival.transfer.expert, arrival.transfer.piece)
            missing[key] -= 1
            if not missing[key] and key in parents:
                leaving.append((parents[key], self._send(parents[key], sums.take(parents[key]), pieces)))
        _wait_sent([*leaving, *((t, work) for t, work, _ in widened)], label)

    # A tag for each piece: between two ranks, messages may then overtake each other within a collective.

    def _send(self, t: Transfer, part: Tensor, pieces: int) -> dist.Work:
        work = dist.isend(part, group=self._group, group_dst=t.dst, tag=t.expert * pieces + t.piece)
        assert work is not None
        return work

    def _receive(self, t: Transfer, part: Tensor, pieces: int) -> dist.Work:
        work = dist.irecv(part, group=self._group, group_src=t.src, tag=t.expert * pieces + t.piece)
        assert work is not None
        return work


@dataclass
class _Arrival:
    transfer: Transfer
    work: dist.Work
    here: bool = False

    def wait(self, label: str) -> None:
        if not self.here:
            _wait(self.work, f"{label}: rank {self.transfer.src} did not send expert {self.transfer.expert}")
            self.here = True


def _wait_sent(leaving: list[tuple[Transfer, dist.Work]], label: str) -> None:
    for t, work in leaving:
        _wait(work, f"{label}: rank {t.dst} did not take expert {t.expert}")


def _wait(work: dist.Work, what: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise CommunicationError(f"{what} ({error})") from error
