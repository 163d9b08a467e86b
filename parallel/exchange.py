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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from parallel.placement import Placement, PlacementError, check_materialises

Algorithm = Literal["flat", "chain", "tree", "two_level"]
ALGORITHMS: tuple[Algorithm, ...] = ("flat", "chain", "tree", "two_level")

MIN_PIECE_BYTES = 64 * 1024
MAX_PIECES = 32


class Transfer(NamedTuple):
    """One piece of one chunk going from ``src`` to ``dst`` in ``round``; sorted, they stand in canonical order."""

    round: int
    expert: int
    piece: int
    src: int
    dst: int


class Edge(NamedTuple):
    """A step of one chunk's tree; ``depth`` counts from 1 at the owner's children."""

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

Pairs = list[tuple[int, int]]
"""(parent, child), parents before their children."""


def _flat(order: Sequence[int], node_W: Sequence[int]) -> Pairs:
    return [(order[0], rank) for rank in order[1:]]


def _chain(order: Sequence[int], node_W: Sequence[int]) -> Pairs:
    return list(pairwise(order))


def _binomial(order: Sequence[int], node_W: Sequence[int]) -> Pairs:
    # In every round, each rank that has the chunk sends it to one that has not.
    pairs: Pairs = []
    have = 1
    while have < len(order):
        pairs += [(order[i], order[have + i]) for i in range(min(have, len(order) - have))]
        have *= 2
    return pairs


def _two_level(order: Sequence[int], node_W: Sequence[int]) -> Pairs:
    # A chain from node leader to node leader, and a chain inside each node: both kinds of link are busy at once.
    members: dict[int, list[int]] = defaultdict(list)
    for rank in order:
        members[node_W[rank]].append(rank)
    pairs = _chain([ranks[0] for ranks in members.values()], node_W)
    for ranks in members.values():
        pairs += _chain(ranks, node_W)
    return pairs


_TREES: dict[Algorithm, Callable[[Sequence[int], Sequence[int]], Pairs]] = {
    "flat": _flat,
    "chain": _chain,
    "tree": _binomial,
    "two_level": _two_level,
}


def _visiting_order(owner: int, others: Sequence[int], node_W: Sequence[int]) -> list[int]:
    """The owner, then the others node by node from the owner's on, so that a chain enters each node once.

    Inside a node, ranks stand in the order that begins after the owner: chains of different owners then load different
    links.
    """
    nodes, world = max(node_W) + 1, len(node_W)
    return [owner, *sorted(others, key=lambda r: ((node_W[r] - node_W[owner]) % nodes, (r - owner) % world))]


def _edges(pairs: Pairs) -> tuple[Edge, ...]:
    depth = {pairs[0][0]: 0}
    edges = []
    for parent, child in pairs:
        depth[child] = depth[parent] + 1
        edges.append(Edge(parent, child, depth[child]))
    return tuple(edges)


def gather_schedule(
    source: Placement, target: Placement, algorithm: Algorithm, pieces: int, node_W: Sequence[int]
) -> Schedule:
    """spAG(source, target): every holder that ``target`` has beyond ``source`` gets a copy from the owner's.

    Args:
        pieces: into how many parts each chunk is cut, at least 1.
        node_W: (W,) node of each rank.

    Raises:
        PlacementError: ``target`` is not ``source`` with copies added, or ``node_W`` has another length than W.
    """
    check_materialises(source, target)
    if len(node_W) != source.world_size:
        raise PlacementError(f"node_W names {len(node_W)} ranks, the placement has {source.world_size}")
    others: dict[int, list[int]] = defaultdict(list)
    for expert, rank in source.new_pairs(target):
        others[expert].append(rank)
    lay = _TREES[algorithm]
    trees = {
        expert: _edges(lay(_visiting_order(int(source.owner_E[expert]), ranks, node_W), node_W))
        for expert, ranks in others.items()
    }
    return Schedule(False, algorithm, pieces, trees)


def reduce_schedule(
    source: Placement, target: Placement, algorithm: Algorithm, pieces: int, node_W: Sequence[int]
) -> Schedule:
    """spRS(source, target): every owner gets the sum of its own chunk and those of the holders that ``target`` lacks.

    The trees of :func:`gather_schedule` backwards: a holder adds what its children send to its own, in canonical order,
    and sends the sum on. So the order of additions depends on the schedule alone, not on who was fast.

    Raises:
        PlacementError: ``source`` is not ``target`` with copies added, or ``node_W`` has another length than W.
    """
    return gather_schedule(target, source, algorithm, pieces, node_W).reversed()


# --- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkModel:
    """What a transfer costs, in integers, so that all ranks choose alike.

    Attributes:
        latency_ns: time of a round without bytes.
        bytes_per_s: of each rank's link, each way.
        node_bytes_per_s: of the link that the ranks of a node share towards other nodes, each way; None: no such limit.
    """

    latency_ns: int
    bytes_per_s: int
    node_bytes_per_s: int | None = None


def schedule_ns(schedule: Schedule, chunk_bytes: int, link: LinkModel, node_W: Sequence[int]) -> int:
    """Modelled duration: the busiest link's bytes, the wait of the deepest rank for its first piece, and latency."""
    if not schedule.trees:
        return 0
    busy: Counter[tuple[str, int]] = Counter()
    deepest = 0
    for edges in schedule.trees.values():
        for parent, child, depth in edges:
            deepest = max(deepest, depth)
            busy["send", parent] += 1
            busy["receive", child] += 1
            if link.node_bytes_per_s is not None and node_W[parent] != node_W[child]:
                busy["leave", node_W[parent]] += 1
                busy["enter", node_W[child]] += 1
    chunk_ns = {
        "rank": chunk_bytes * 10**9 // link.bytes_per_s,
        "node": chunk_bytes * 10**9 // (link.node_bytes_per_s or link.bytes_per_s),
    }
    slowest = max(
        count * chunk_ns["node" if kind in ("leave", "enter") else "rank"] for (kind, _), count in busy.items()
    )
    fill = (deepest - 1) * max(chunk_ns.values()) // schedule.pieces
    return slowest + fill + link.latency_ns * schedule.num_rounds


def choose_pieces(chunk_bytes: int, link: LinkModel, depth: int) -> int:
    """Pieces that make a pipeline ``depth`` ranks deep fastest: latency grows with them, idle time shrinks.

    (pieces + depth - 1) * (latency + bytes / pieces / rate) is least at sqrt((depth - 1) * bytes / (rate * latency)).
    """
    rate = min(link.bytes_per_s, link.node_bytes_per_s or link.bytes_per_s)
    best = math.isqrt(max(0, depth - 1) * chunk_bytes * 10**9 // (rate * max(1, link.latency_ns)))
    return max(1, min(best, chunk_bytes // MIN_PIECE_BYTES, MAX_PIECES))


def choose_schedule(
    source: Placement, target: Placement, chunk_bytes: int, link: LinkModel, node_W: Sequence[int]
) -> Schedule:
    """The spAG schedule from ``source`` to ``target`` with the least modelled time; of equals the first algorithm."""
    candidates = []
    for index, algorithm in enumerate(ALGORITHMS):
        whole = gather_schedule(source, target, algorithm, 1, node_W)
        deepest = max((edge.depth for edges in whole.trees.values() for edge in edges), default=0)
        schedule = Schedule(False, algorithm, choose_pieces(chunk_bytes, link, deepest), whole.trees)
        candidates.append((schedule_ns(schedule, chunk_bytes, link, node_W), index, schedule))
    return min(candidates, key=lambda candidate: candidate[:2])[2]
