"""Ranks, nodes and devices: who this process is and how it talks to the others.

One :class:`Topology` value is made at start and passed on; nothing else reads torchrun's environment variables.
Backends: gloo for CPU tensors, NCCL for CUDA tensors. A single process gets a group of one, so that every caller
has one code path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from moe.errors import ConfigError
from parallel.late_ranks import in_words, late_ranks


@dataclass(frozen=True)
class Topology:
    """This process among all.

    Attributes:
        rank, world_size: position among all processes.
        local_rank, local_world_size: position among the processes of this node.
        device: where this rank computes.
        device_reason: why that device was chosen, for the start banner.
        checkpoint_group: a CPU group for background saves, so that their collectives never interleave with training's.
        patient_group: a CPU group that waits for days, for work that one rank does while the others wait.
        timeout: how long a collective may wait for a late rank before it fails.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    device_reason: str
    checkpoint_group: dist.ProcessGroup | None
    patient_group: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(seconds=600)

    @staticmethod
    def alone() -> Topology:
        """A world of this process, on the CPU, whatever process groups there are."""
        return Topology(0, 1, 0, 1, torch.device("cpu"), "one process", None)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        return self.rank // self.local_world_size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` over all ranks, in place; integer tensors stay exact."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            # An object gather needs no device guess, which dist.barrier makes on CUDA.
            self.gather_objects(self.rank)

    @contextmanager
    def first_rank_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block while the others wait, then they run it: for work that leaves a cache behind.

        An error on rank 0 is raised on rank 0 only after the others have been told, so that nobody waits for it. The
        wait may take days; a rank that dies meanwhile still ends it at once.
        """
        problem: BaseException | None = None
        if self.is_first:
            try:
                yield
            except BaseException as error:
                problem = error
            self._tell_waiting(problem is not None)
            if problem is not None:
                raise problem
        else:
            if self._tell_waiting(False):
                raise SystemExit(PEER_FAILED_EXIT_CODE)
            yield
        if self.world_size > 1:
            # A rank with a file system of its own may take as long as the first one did.
            dist.all_gather_object([None] * self.world_size, self.rank, group=self.patient_group)

    def _tell_waiting(self, failed: bool) -> bool:
        """Rank 0's ``failed`` on every rank."""
        if self.world_size == 1:
            return failed
        box = [failed]
        dist.broadcast_object_list(box, src=0, group=self.patient_group)
        return box[0]


def is_timeout(error: BaseException) -> bool:
    """Has a collective waited longer than it may? gloo raises a plain RuntimeError for it."""
    return "Timed out waiting" in str(error)


def lost_a_peer(error: BaseException) -> bool:
    """Does this look like the other end of somebody else's failure? gloo and NCCL raise plain RuntimeErrors for it."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


PATIENCE = timedelta(days=7)
PEER_FAILED_EXIT_CODE = 3
"""Exit code of a rank that stops only because another one failed and has said why."""


def choose_device(local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """The device of this rank and the reason: CUDA where every rank of this node has a device of its own, else the CPU.

    All or none: a rank on a CUDA device and one on the CPU would wait for each other in different backends.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device"
    count = torch.cuda.device_count()
    if count < local_world_size:
        return torch.device("cpu"), f"{count} CUDA device(s) for {local_world_size} ranks on this node"
    return torch.device("cuda", local_rank), "CUDA is available"


def check_one_kind_of_device(kinds: Sequence[str]) -> None:
    """Refuse to mix devices.

    Args:
        kinds: "cpu" or "cuda" of every rank.

    Raises:
        ConfigError: they differ; names the first rank of each kind.
    """
    if len(set(kinds)) > 1:
        named = ", ".join(f"rank {kinds.index(kind)} on {kind}" for kind in sorted(set(kinds)))
        raise ConfigError(
            [
                f"ranks compute on different kinds of device ({named}): give every node as many CUDA devices as"
                " --nproc-per-node, or hide them all with CUDA_VISIBLE_DEVICES="
            ]
        )


@contextmanager
def connect(timeout_s: float = 600.0) -> Iterator[Topology]:
    """Join the process group that torchrun describes (or make a group of one) and leave it at the end.

    Args:
        timeout_s: how long a collective may wait for a late rank before it fails.
    """
    env = os.environ
    rank, world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    local_rank, local_world = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))
    device, reason = choose_device(local_rank, local_world)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    store: dist.Store = dist.HashStore()
    if "RANK" in env:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)
        patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        kinds = [device.type] * world_size
        dist.all_gather_object(kinds, device.type, group=checkpoint_group)
        check_one_kind_of_device(kinds)
        yield Topology(
            rank, world_size, local_rank, local_world, device, reason, checkpoint_group, patient_group, timeout
        )
    except RuntimeError as error:
        if world_size > 1 and (is_timeout(error) or lost_a_peer(error)):
            error.add_note(in_words(late_ranks(store, rank, world_size)))
        raise
    finally:
        # A rank that fails must not wait in the shutdown handshake for ranks that still compute.
        if dist.is_initialized():
            dist.destroy_process_group()
