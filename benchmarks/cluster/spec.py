"""What an emulated cluster looks like: ranks, nodes, link rates, CPU shares; and rates like those of real clusters."""

from __future__ import annotations

import time
from dataclasses import dataclass


class SpecError(ValueError):
    """The cluster cannot be built as asked for."""


@dataclass(frozen=True)
class ClusterSpec:
    """An emulated cluster.

    Attributes:
        nodes, ranks_per_node: how many.
        inter_mbit: rate of each node's link to the others, each way.
        intra_mbit: rate of each rank's link inside its node, each way; without effect for one rank a node.
        cpu: share of one core that each rank may use.
        shared_node: all ranks of a node share one network namespace, as torchrun starts them; their traffic inside
            the node then goes over loopback, unshaped.
    """

    nodes: int
    ranks_per_node: int = 1
    inter_mbit: float = 200.0
    intra_mbit: float = 1000.0
    cpu: float = 0.45
    shared_node: bool = False

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("inter_mbit", "intra_mbit", "cpu"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.world_size > 200:
            raise SpecError(f"{self.world_size} ranks; addresses are laid out for 200 at most")
        if self.cpu > 1:
            raise SpecError(f"cpu is {self.cpu}; a rank has one thread and can use one core at most")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def address(self, rank: int) -> str:
        """IP address of a rank; of its node where ranks of a node share one."""
        return f"10.77.0.{(rank // self.ranks_per_node if self.shared_node else rank) + 1}"


@dataclass(frozen=True)
class Reference:
    """What one GPU of a real cluster computes and gets of the links, each way.

    The ratio of the two is what decides how much communication hides, so links are set to keep it.
    """

    peak_flops: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    achieved: float = 0.4  # of the peak, in matrix products of training; an assumption

    def flop_per_byte(self, *, inter: bool) -> float:
        return self.peak_flops * self.achieved / (self.inter_bytes_per_s if inter else self.intra_bytes_per_s)


REFERENCES = {
    # Hecate's clusters (arXiv:2502.02581, section 5): 4 nodes of 8 GPUs each. Peaks are the vendor's dense fp16/bf16
    # tensor figures; NVLink's are both ways together, so half of it each way.
    "paper-a": Reference(125e12, 300e9 / 2, 100e9 / 8 / 8),  # V100, 100 Gbit/s a node
    "paper-b": Reference(312e12, 600e9 / 2, 400e9 / 8 / 8),  # A100, 400 Gbit/s a node
    "h100-pod": Reference(989e12, 900e9 / 2, 400e9 / 8),  # H100, 400 Gbit/s a GPU
}


def rates_like(reference: Reference, rank_flops: float, ranks_per_node: int) -> tuple[float, float]:
    """(inter_mbit, intra_mbit) that give ranks of ``rank_flops`` FLOP/s the reference's FLOP per byte."""
    inter = rank_flops / reference.flop_per_byte(inter=True) * ranks_per_node
    return inter * 8e-6, rank_flops / reference.flop_per_byte(inter=False) * 8e-6


def measure_flops(seconds: float = 1.0) -> float:
    """FLOP/s of fp32 matrix products in this process with one thread, whatever its CPU share leaves."""
    import torch

    torch.set_num_threads(1)
    side = 512
    a, b = torch.randn(side, side), torch.randn(side, side)
    a @ b
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        a @ b
        count += 1
    return count * 2 * side**3 / (time.perf_counter() - begin)
