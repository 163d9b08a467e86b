"""What a step costs by formula: time on links and cores, and memory. A model, not a measurement.

Links have a rate and a latency, each way, and nothing is lost to protocol or congestion; a rank computes at one rate,
whatever the shape; copies hide under attention and nothing else does. Hecate (arXiv:2502.02581, sections 3 and 5) gives
the volumes and the overlap. Use it to compare policies with each other.

Shape suffixes: L layers, E experts, W ranks, N nodes. Of two W, the first is the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.placement import Bools, Ints

Floats = NDArray[np.float64]

OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and two Adam moments."""


@dataclass(frozen=True)
class ClusterModel:
    """Equal nodes of equal ranks.

    Attributes:
        rank_bytes_per_s: of a rank's link inside its node, each way.
        node_bytes_per_s: of the link that a node's ranks share towards other nodes, each way.
        latency_s: of one exchange.
        flop_per_s: achieved by a rank.
    """

    name: str
    nodes: int
    ranks_per_node: int
    rank_bytes_per_s: float
    node_bytes_per_s: float
    flop_per_s: float
    latency_s: float = 50e-6

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node_W(self) -> Ints:
        """(W,) node of each rank."""
        return np.arange(self.world_size) // self.ranks_per_node

    def exchange_s(self, sent_bytes_WW: Floats) -> float:
        """Time of an exchange between all ranks: that of the busiest rank's or node's link, each way.

        Args:
            sent_bytes_WW: (W, W) bytes from each rank to each; what stays on a rank is free, and so is nothing at all.
        """
        node_W = self.node_W
        off_rank = sent_bytes_WW * ~np.eye(self.world_size, dtype=np.bool_)
        if not off_rank.any():
            return 0.0
        off_node = off_rank * (node_W[:, None] != node_W)
        per_rank = max(off_rank.sum(0).max(), off_rank.sum(1).max())
        per_node = max(
            float(off_node.sum(axis).reshape(self.nodes, self.ranks_per_node).sum(1).max()) for axis in (0, 1)
        )
        return float(self.latency_s + max(per_rank / self.rank_bytes_per_s, per_node / self.node_bytes_per_s))

    def copies_s(self, source_EW: Bools, target_EW: Bools, chunk_bytes: float) -> float:
        """Time of a sparse all-gather from holders to holders, or of its reversal, node leaders first.

        Every rank receives each copy once, every node each expert that it lacked once; holders pass chunks on.
        """
        new_EW = target_EW & ~source_EW
        if not new_EW.any():
            return 0.0
        shape = (len(new_EW), self.nodes, self.ranks_per_node)
        enters_N = (new_EW.reshape(shape).any(2) & ~source_EW.reshape(shape).any(2)).sum(0)
        per_rank, per_node = int(new_EW.sum(0).max()) * chunk_bytes, int(enters_N.max()) * chunk_bytes
        return self.latency_s + max(per_rank / self.rank_bytes_per_s, per_node / self.node_bytes_per_s)


@dataclass(frozen=True)
class ModelShape:
    """A model with a MoE layer in every block.

    Attributes:
        width, expert_hidden: D and F; an expert has ``matrices`` of D x F.
        tokens_per_rank: of a step, in sequences of ``sequence`` tokens.
        number_bytes: of parameters, gradients and activations.
    """

    name: str
    layers: int
    experts: int
    width: int
    expert_hidden: int
    sequence: int
    tokens_per_rank: int
    experts_per_token: int = 2
    matrices: int = 2
    number_bytes: int = 2

    @property
    def rows_per_rank(self) -> int:
        return self.tokens_per_rank * self.experts_per_token

    @property
    def row_bytes(self) -> int:
        return self.width * self.number_bytes

    @property
    def expert_parameters(self) -> int:
        return self.matrices * self.width * self.expert_hidden

    @property
    def expert_bytes(self) -> int:
        return self.expert_parameters * self.number_bytes

    @property
    def state_bytes(self) -> int:
        """What travels when an expert changes its owner: parameters and optimizer state."""
        return self.expert_parameters * (self.number_bytes + OPTIMIZER_BYTES)

    def row_s(self, cluster: ClusterModel) -> float:
        """Forward time of one row in its expert; backward takes twice that."""
        return 2 * self.expert_parameters / cluster.flop_per_s

    def attention_s(self, cluster: ClusterModel) -> float:
        """Forward time of a block's attention: four D x D projections, scores and mixing; backward takes twice that."""
        flop = self.tokens_per_rank * (8 * self.width**2 + 4 * self.sequence * self.width)
        return flop / cluster.flop_per_s

    def overlap_degree(self, cluster: ClusterModel) -> int:
        """t, experts whose copies hide under attention on the slower kind of link (Hecate, section 4.2)."""
        rate = min(cluster.rank_bytes_per_s, cluster.node_bytes_per_s)
        return min(self.experts, math.floor(self.attention_s(cluster) * rate / self.expert_bytes))


def memory_ratio(copies_L: Floats, owned: float, number_bytes: int, *, keep: bool) -> float:
    """Memory of experts (parameters, gradients, optimizer) on a rank with copies, as a multiple of without.

    Kept, the copies of all layers are there at once, and the gradients of the largest layer's; released, parameters and
    gradients of the largest layer's alone. With what Hecate reports in section 5.4 (5.73 times the parameters: 4.73
    copies for each owned expert; 90.2% fewer copies when released: the largest of 12 layers 18% above their mean) this
    is 1.65 kept and 1.116 released. The paper measured 1.64 and 1.116, and does not say what it counted.

    Args:
        copies_L: (L,) copies on the rank in each layer.
        owned: experts that the rank owns over all layers.
    """
    largest = float(copies_L.max(initial=0))
    held = float(copies_L.sum()) + largest if keep else 2 * largest
    return 1 + held * number_bytes / (owned * (2 * number_bytes + OPTIMIZER_BYTES))


# --- the paper's clusters and models ----------------------------------------------------------------------------------

# Tensor-core peaks of V100 and A100 in half precision, of which 40% are taken to be achieved; NVLink counts both ways.
CLUSTER_A = ClusterModel("A: 4 x 8 V100", 4, 8, 150e9, 12.5e9, 0.4 * 125e12)
CLUSTER_B = ClusterModel("B: 4 x 8 A100", 4, 8, 300e9, 50e9, 0.4 * 312e12)

# Table 1 of Hecate; F = 2 D, GShard top-2. The paper gives no batch; 8192 tokens a rank are 4 sequences of GPT-MoE.
GPT_MOE_S = ModelShape("GPT-MoE-S", 12, 64, 768, 1536, 2048, 8192)
GPT_MOE_L = ModelShape("GPT-MoE-L", 12, 64, 1536, 3072, 2048, 8192)
BERT_MOE = ModelShape("BERT-MoE", 12, 64, 1024, 2048, 512, 8192)
BERT_MOE_DEEP = ModelShape("BERT-MoE-Deep", 24, 64, 1024, 2048, 512, 8192)
