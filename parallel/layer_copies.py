"""The copies of one MoE layer through a step: planned, gathered, used, released, and their gradients brought home."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.collectives import Communicator, Handle
from parallel.exchange import Schedule
from parallel.placement import Placement
from parallel.sharded_experts import ShardedExperts

Scheduler = Callable[[Placement, Placement, int], Schedule]
"""(source, target, bytes of a chunk) -> the spAG schedule; a pure function, the same on every rank."""


class LayerCopies:
    """What happens to the copies of one layer: planned, gathered, (released and gathered again,) released, reduced.

    Attributes:
        label: "layer 3", for error texts and traces.
        placement: P' of the step; equal to the sharding when nothing is copied.
    """

    def __init__(
        self,
        label: str,
        experts: ShardedExperts,
        sharding: Placement,
        comm: Communicator,
        scheduler: Scheduler,
        dtype: torch.dtype,
    ) -> None:
        self.label, self.experts, self.placement = label, experts, sharding
        self._sharding, self._comm, self._scheduler, self._dtype = sharding, comm, scheduler, dtype
        self._gathering: Handle | None = None
        self._reducing: Handle | None = None
        self._leaving_bytes = 0
        self._here = False

    @property
    def sharding(self) -> Placement:
        return self._sharding

    def reshard(self, sharding: Placement) -> None:
        """Other owners from now on, and no copies; the experts themselves have moved."""
        self._sharding = self.placement = sharding
        self._here = False

    @property
    def chunk_bytes(self) -> int:
        """What one copy is on the way."""
        return self.experts.chunk_numel * self._dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """What one token is on the way."""
        return self.experts.dim * self._dtype.itemsize

    def plan(self, placement: Placement) -> None:
        """Hold what ``placement`` says from the next :meth:`gather` on."""
        if placement != self.placement:
            self._here = False
            self.placement = placement

    def extend(self, placement: Placement) -> None:
        """Hold what ``placement`` says from now on: copies that are here stay, the others begin to come."""
        if placement == self.placement:
            return
        self.wait()
        rank, source = self._comm.rank, self.placement
        here = self.experts.copies()
        self.placement = placement
        chunks = self.experts.make_room(placement.copied_to(rank), self._dtype)
        for expert, copy in here.items():
            chunks[expert].copy_(copy)
        self._send(source, chunks)

    def gather(self) -> None:
        """Begin to copy what the placement asks for, unless that has begun already."""
        if self._here:
            return
        self._here = True
        self._send(self._sharding, self.experts.make_room(self.placement.copied_to(self._comm.rank), self._dtype))

    def _send(self, source: Placement, chunks: dict[int, Tensor]) -> None:
        schedule = self._scheduler(source, self.placement, self.chunk_bytes)
        self._gathering = self._comm.gather(schedule, chunks, f"spAG {self.label}")

    def wait(self) -> None:
        """Copies are here when this returns."""
        self.gather()
        assert self._gathering is not None
        self._gathering.wait()

    def release(self) -> None:
        """Free the copies; :meth:`gather` brings the same ones back."""
        if self._here:
            self.wait()  # memory that is being written cannot be freed
            self._here = False
            self.experts.release()

    def reduce(self) -> None:
        """Begin to add the copies' gradients to their owners'."""
        self.finish()
        grads = self.experts.take_grad_chunks()
        self._leaving_bytes = sum(grads[expert].nbytes for expert in self.experts.copied)
        chunk_bytes = self.experts.chunk_numel * self.experts.chunks_eX.element_size()
        gather = self._scheduler(self._sharding, self.placement, chunk_bytes)
        dtype = self.experts.chunks_eX.dtype
        self._reducing = self._comm.reduce(gather.reversed(), grads, f"spRS {self.label}", dtype)

    @property
    def copy_bytes(self) -> int:
        """Memory of copies and their gradients at the moment, those on their way home included."""
        return self.experts.copy_bytes + (self._leaving_bytes if self._reducing and not self._reducing.done else 0)

    def finish(self) -> None:
        """Gradients of owned experts are complete, as far as :meth:`reduce` was called, when this returns."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None
