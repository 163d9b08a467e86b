"""How chunks travel: canonical point-to-point schedules for sparse all-gather and sparse reduce-scatter.

Each expert's chunk spreads along a tree from its owner to its other holders; a reduction runs the same tree backwards.
An algorithm is only a choice of tree: flat (the owner sends every copy), chain (each holder passes it on), binomial
tree, or two-level (node leaders first). Chunks are cut into pieces, so that a rank passes on the first piece while
later ones are still coming in.

A schedule is a list of rounds. A piece that is sent in a round was there before that round; so rounds may run one
after another (one grouped call each, as NCCL needs it) or as eagerly as data arrives (gloo), from one list in one
order. :mod:`parallel.exchange_check` proves a schedule on one process.

Pure functions of integers, the same on every rank. Shape suffixes: W ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, repeat
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from parallel.placement import Placement, PlacementError, check_materialises

Algorithm = Literal["flat", "chain", "tree", "two_level"]
ALGORITHMS: tuple[Algorithm, ...] = ("flat", "chain", "tree", "two_level")

MIN_PIECE_BYTES = 64 * 1024
MAX_PIECES = 32
SHARED_LINK_PERCENT = 85
"""What several TCP streams together get of a link: between 53 and 81 % at 200 Mbit/s where one alone got 93 %."""


class Transfer(NamedTuple):
    """One piece of one chunk going from ``src`` to ``dst`` in ``round``; sorted, they stand in canonical order."""

    round: int
    expert: int
    piece: int
    src: int
    dst: int


def piece_of(chunk: Tensor, piece: int, pieces: int) -> Tensor:
    """(X,) chunk -> the view of its ``piece``-th of ``pieces`` parts; parts differ by at most one number in size."""
    size = chunk.numel()
    return chunk[piece * size // pieces : (piece + 1) * size // pieces]


class Edge(NamedTuple):
    """A link of one chunk's tree; ``depth`` is the step that takes it, from 1, later than the one to ``parent``."""

    parent: int
    child: int
    depth: int


@dataclass(frozen=True)
class Schedule:
    """Transfers of one collective.

    Attributes:
        reduces: False: receivers take a copy, from parent to child. True: they add what comes, from child to parent.
        algorithm: how the trees were laid.
        pieces: into how many parts each chunk is cut.
        trees: the edges of each expert that travels, parents before their children.
    """

    reduces: bool
    algorithm: Algorithm
    pieces: int
    trees: dict[int, tuple[Edge, ...]]

    def transfers(self, rank: int | None = None) -> list[Transfer]:
        """All transfers, or those that ``rank`` sends or receives, in canonical order."""
        return sorted(self._transfers(rank))

    def _transfers(self, rank: int | None) -> Iterator[Transfer]:
        for expert, edges in self.trees.items():
            deepest = max(edge.depth for edge in edges)
            for parent, child, depth in edges:
                if rank is not None and rank != parent and rank != child:
                    continue
                begin = deepest - depth if self.reduces else depth - 1
                src, dst = (child, parent) if self.reduces else (parent, child)
                for piece in range(self.pieces):
                    yield Transfer(begin + piece, expert, piece, src, dst)

    def reversed(self) -> Schedule:
        """The spRS that belongs to this spAG, or the other way round: the same trees backwards."""
        return Schedule(not self.reduces, self.algorithm, self.pieces, self.trees)

    @property
    def num_rounds(self) -> int:
        deepest = max((edge.depth for edges in self.trees.values() for edge in edges), default=0)
        return deepest + self.pieces - 1 if deepest else 0

    def sent_bytes_W(self, chunk_bytes: int, world_size: int) -> list[int]:
        """(W,) payload bytes that each rank sends."""
        sent = [0] * world_size
        for edges in self.trees.values():
            for parent, child, _ in edges:
                sent[child if self.reduces else parent] += chunk_bytes
        return sent


# --- trees ------------------------------------------------------------------------------------------------------------


def _flat(order: Sequence[int], node_W: Sequence[int]) -> list[Edge]:
    return [Edge(order[0], rank, 1) for rank in order[1:]]


def _chain(order: Sequence[int], node_W: Sequence[int], begin: int = 1) -> list[Edge]:
    return list(map(Edge._make, zip(order, order[1:], count(begin), strict=False)))


def _binomial(order: Sequence[int], node_W: Sequence[int]) -> list[Edge]:
    # In every step, each rank that has the chunk sends it to one that has not. A depth is a step and not a number of
    # hops: a rank serves its children one after another, the one with most ranks behind it first.
    edges: list[Edge] = []
    have = step = 1
    while have < len(order):
        edges += map(Edge._make, zip(order[:have], order[have : 2 * have], repeat(step), strict=False))
        have, step = 2 * have, step + 1
    return edges


def _two_level(order: Sequence[int], node_W: Sequence[int]) -> list[Edge]:
    # A chain from node leader to node leader, and a chain inside each node: both kinds of link are busy at once.
    members: dict[int, list[int]] = defaultdict(list)
    for rank in order:
        members[node_W[rank]].append(rank)
    edges = _chain([ranks[0] for ranks in members.values()], node_W)
    for leader_depth, ranks in enumerate(members.values()):
        edges += _chain(ranks, node_W, leader_depth + 1)
    return edges


_TREES: dict[Algorithm, Callable[[Sequence[int], Sequence[int]], list[Edge]]] = {
    "flat": _flat,
    "chain": _chain,
    "tree": _binomial,
    "two_level": _two_level,
}


def _visiting_orders(source: Placement, target: Placement, node_W: Sequence[int]) -> dict[int, list[int]]:
    """For each expert that travels the owner, then its new holders node by node from the owner's on.

    So a chain enters each node once. Each node is walked through from the owner's place in its own node on: chains of
    different owners enter and end at different ranks, and where all nodes are alike and all experts go everywhere, all
    ranks send equally much.
    """
    check_materialises(source, target)
    if len(node_W) != source.world_size:
        raise PlacementError(f"node_W names {len(node_W)} ranks, the placement has {source.world_size}")
    node = np.array(node_W, dtype=np.int64)
    same_WW = node[:, None] == node
    place_W = np.tril(same_WW, -1).sum(1)
    expert_N, rank_N = np.nonzero(target.holders_EW & ~source.holders_EW)
    owner_N = source.owner_E[expert_N]
    nodes_on_N = (node[rank_N] - node[owner_N]) % (node.max(initial=0) + 1)
    places_on_N = (place_W[rank_N] - place_W[owner_N]) % same_WW.sum(1)[rank_N]
    sorted_N = np.lexsort((places_on_N, nodes_on_N, expert_N))
    orders: dict[int, list[int]] = {}
    for expert, owner, rank in np.stack((expert_N, owner_N, rank_N), 1)[sorted_N].tolist():
        orders.setdefault(expert, [owner]).append(rank)
    return orders


def gather_schedule(
    source: Placement, target: Placement, algorithm: Algorithm, pieces: int, node_W: Sequence[int]
) -> Schedule:
    """spAG(source, target): every holder that ``target`` has beyond ``source`` gets a copy from the owner's.

    Args:
        pieces: into how many parts each chunk is cut, at least 1.
        node_W: (W,) node of each rank.

    Raises:
        PlacementError: ``target`` is not ``source`` with copies added, or ``node_W`` has another length than W.
        ValueError: no pieces.
    """
    return _lay(_visiting_orders(source, target, node_W), algorithm, pieces, node_W)


def _lay(orders: dict[int, list[int]], algorithm: Algorithm, pieces: int, node_W: Sequence[int]) -> Schedule:
    if pieces < 1:
        raise ValueError(f"pieces is {pieces}: a chunk is cut into 1 piece or more")
    lay = _TREES[algorithm]
    return Schedule(False, algorithm, pieces, {expert: tuple(lay(order, node_W)) for expert, order in orders.items()})


def reduce_schedule(
    source: Placement, target: Placement, algorithm: Algorithm, pieces: int, node_W: Sequence[int]
) -> Schedule:
    """spRS(source, target): every owner gets the sum of its own chunk and those of the holders that ``target`` lacks.

    The trees of :func:`gather_schedule` backwards: a holder adds what its children send to its own, in canonical order,
    and sends the sum on. So the order of additions depends on the schedule alone, not on who was fast.

    Raises:
        PlacementError: ``source`` is not ``target`` with copies added, or ``node_W`` has another length than W.
        ValueError: no pieces.
    """
    return gather_schedule(target, source, algorithm, pieces, node_W).reversed()


# --- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkModel:
    """What a transfer costs, in integers, so that all ranks choose alike.

    Attributes:
        latency_ns: time of a round without bytes, when rounds follow each other closely.
        bytes_per_s: of each rank's link, each way.
        node_bytes_per_s: of the link that the ranks of a node share towards other nodes, each way; None: no such limit.
    """

    latency_ns: int
    bytes_per_s: int
    node_bytes_per_s: int | None = None


def schedule_ns(schedule: Schedule, chunk_bytes: int, link: LinkModel, node_W: Sequence[int]) -> int:
    """Modelled duration: the busiest link's bytes, the wait of the last rank for its first piece, and latency."""
    if not schedule.trees:
        return 0
    rank_ns = chunk_bytes * 10**9 // link.bytes_per_s
    node_ns = chunk_bytes * 10**9 // link.node_bytes_per_s if link.node_bytes_per_s is not None else 0
    sends_W, receives_W = [0] * len(node_W), [0] * len(node_W)
    leaves, enters = [0] * (max(node_W) + 1), [0] * (max(node_W) + 1)
    for edges in schedule.trees.values():
        for parent, child, _ in edges:
            sends_W[parent] += 1
            receives_W[child] += 1
            if node_W[parent] != node_W[child]:
                leaves[node_W[parent]] += 1
                enters[node_W[child]] += 1
    busiest_ns = max(max(sends_W + receives_W) * rank_ns, max(leaves + enters) * node_ns)
    widest = max(schedule.trees.values(), key=len)
    fill_ns = _fill_ns(widest, rank_ns, max(rank_ns, node_ns), node_W) // schedule.pieces
    return busiest_ns + fill_ns + link.latency_ns * schedule.num_rounds


def _fill_ns(edges: Sequence[Edge], rank_ns: int, node_ns: int, node_W: Sequence[int]) -> int:
    # One chunk by itself, uncut, each rank sending to one child after another.
    root = edges[0].parent
    came, free = {root: 0}, {root: 0}
    for parent, child, _ in edges:
        hop_ns = rank_ns if node_W[parent] == node_W[child] else node_ns
        came[child] = free[child] = free[parent] = free[parent] + hop_ns
    return max(came.values()) - max(free[rank] - came[rank] for rank in came)


def choose_pieces(chunk_bytes: int, link: LinkModel, depth: int) -> int:
    """Pieces that make a pipeline ``depth`` ranks deep fastest: latency grows with them, idle time shrinks.

    (pieces + depth - 1) * (latency + bytes / pieces / rate) is least at sqrt((depth - 1) * bytes / (rate * latency)).
    """
    rate = min(link.bytes_per_s, link.node_bytes_per_s or link.bytes_per_s)
    best = math.isqrt(max(0, depth - 1) * chunk_bytes * 10**9 // (rate * max(1, link.latency_ns)))
    return max(1, min(best, chunk_bytes // MIN_PIECE_BYTES, MAX_PIECES))


def _shares_links(schedule: Schedule) -> bool:
    """Does any rank send to several others, or receive from several?"""
    pairs = {(edge.parent, edge.child) for edges in schedule.trees.values() for edge in edges}
    return any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1))


def choose_schedule(
    source: Placement, target: Placement, chunk_bytes: int, link: LinkModel, node_W: Sequence[int]
) -> Schedule:
    """The spAG schedule from ``source`` to ``target`` with the least modelled time; of equals the first algorithm.

    Where a rank sends to or receives from several others at once, :data:`SHARED_LINK_PERCENT` of the rate are expected.
    """
    orders = _visiting_orders(source, target, node_W)
    candidates = []
    for index, algorithm in enumerate(ALGORITHMS):
        whole = _lay(orders, algorithm, 1, node_W)
        schedule = replace(whole, pieces=choose_pieces(chunk_bytes, link, whole.num_rounds))
        cost = schedule_ns(schedule, chunk_bytes, link, node_W)
        candidates.append((cost * 100 // SHARED_LINK_PERCENT if _shares_links(schedule) else cost, index, schedule))
    return min(candidates, key=lambda candidate: candidate[:2])[2]
