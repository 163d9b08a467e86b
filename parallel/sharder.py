"""Who owns which expert, over all layers at once: heterogeneous sharding, Algorithm 2 of Hecate (arXiv:2502.02581).

The most loaded experts of a layer get copies anyway, so owners are chosen for the others: each layer's are spread so
that ranks are level, and a rank may own many experts of one layer and none of another, as long as it owns as many in
all as its slots say. Loads of such experts drift slowly; moving owners every hundred steps is enough (section 5.4).

Pure functions of integers, the same on every rank. Shape suffixes: L layers, E experts of a layer, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallel.placement import Bools, Ints, PlacementError

STAY_DIVISOR = 8
"""An owner keeps an expert if it exceeds the least loaded rank by at most this part of the layer's mean rows."""


class Move(NamedTuple):
    """An expert whose parameters and optimizer state go from rank ``src`` to rank ``dst``."""

    layer: int
    expert: int
    src: int
    dst: int


def plan_owners(
    load_LE: Ints,
    owner_LE: Ints,
    overlap_degree: int,
    slots_W: Sequence[int] | Ints,
    node_W: Sequence[int],
    *,
    more_free_first: bool = False,
) -> Ints:
    """(L, E) new owners; Algorithm 2 of Hecate (section 4.3).

    Layers come in the order of their most loaded expert without copies; its experts by load, each to the least loaded
    node with a free slot and there to the least loaded rank; ties go to fewer free slots, then to the lower number.
    Last, experts with copies go wherever slots remain.

    Two things are not the paper's. Experts with copies too go to the least loaded rank of their layer: loads drift, and
    an expert that no longer gets copies has all its rows on its owner. And an expert stays with its present owner if
    that one's rows are at most ``1 / STAY_DIVISOR`` of the mean above the least. With made-up loads that drift, the
    first made the busiest rank's rows 1.25 times the mean instead of 1.47; the second saves a third to a half of all
    moves.

    Args:
        load_LE: (L, E) loads expected, or anything in proportion to them within a layer.
        owner_LE: (L, E) present owners.
        overlap_degree: t, how many experts of each layer get copies.
        slots_W: (W,) experts that each rank owns, over all layers; together all experts there are.
        node_W: (W,) node of each rank.
        more_free_first: ties go to more free slots instead: late layers find room on more ranks.

    Raises:
        PlacementError: a shape does not fit, a load or slot is negative, an owner is no rank, or slots are not as many
            as experts.
    """
    slots, nodes = [int(slots) for slots in slots_W], [int(node) for node in node_W]
    _check(load_LE, owner_LE, slots, nodes, overlap_degree)
    world = len(slots)
    members = [[rank for rank in range(world) if nodes[rank] == node] for node in sorted(set(nodes))]
    copied_LE = copied_experts(load_LE, overlap_degree)
    sign = -1 if more_free_first else 1
    free, new_LE = slots.copy(), np.full_like(owner_LE, -1)
    rows_LW = [[0] * world for _ in load_LE]
    by_load_LE = np.argsort(-load_LE, axis=1, kind="stable")
    most_L = np.where(copied_LE, -1, load_LE).max(1)
    order = np.argsort(-most_L, kind="stable").tolist()

    slack_L = (np.where(copied_LE, 0, load_LE).sum(1) // (STAY_DIVISOR * world)).tolist()
    node_index = {nodes[ranks[0]]: index for index, ranks in enumerate(members)}

    def settle(layer: int, expert: int, ranks: list[int]) -> None:
        rows, home = rows_LW[layer], int(owner_LE[layer, expert])
        _, _, rank = min((rows[r], sign * free[r], r) for r in ranks if free[r])
        if home in ranks and free[home] and rows[home] <= rows[rank] + slack_L[layer]:
            rank = home
        new_LE[layer, expert] = rank
        free[rank] -= 1
        rows[rank] += int(load_LE[layer, expert])

    for layer in order:
        node_rows, node_free = [0] * len(members), [sum(free[rank] for rank in ranks) for ranks in members]
        for expert in by_load_LE[layer, ~copied_LE[layer, by_load_LE[layer]]].tolist():
            home = node_index[nodes[owner_LE[layer, expert]]]
            _, _, node = min((node_rows[n], sign * node_free[n], n) for n in range(len(members)) if node_free[n])
            if free[owner_LE[layer, expert]] and node_rows[home] <= node_rows[node] + slack_L[layer]:
                node = home
            settle(layer, expert, members[node])
            node_free[node] -= 1
            node_rows[node] += int(load_LE[layer, expert])
    for layer in order:
        for expert in by_load_LE[layer, copied_LE[layer, by_load_LE[layer]]].tolist():
            settle(layer, expert, list(range(world)))
    return new_LE


def copied_experts(load_LE: Ints, overlap_degree: int) -> Bools:
    """(L, E) True for the experts of each layer that get copies: the most loaded ones, ties to the lower number."""
    copied_LE = np.zeros(load_LE.shape, dtype=np.bool_)
    top_Lt = np.argsort(-load_LE, axis=1, kind="stable")[:, :overlap_degree]
    np.put_along_axis(copied_LE, top_Lt, True, axis=1)
    return copied_LE


def moves(old_LE: Ints, new_LE: Ints) -> list[Move]:
    """What has to travel from owners ``old_LE`` to owners ``new_LE``, by layer and expert."""
    return [
        Move(layer, expert, int(old_LE[layer, expert]), int(new_LE[layer, expert]))
        for layer, expert in np.argwhere(old_LE != new_LE).tolist()
    ]


def worth_moving(
    load_LE: Ints,
    old_LE: Ints,
    new_LE: Ints,
    overlap_degree: int,
    world_size: int,
    *,
    steps: int,
    ns_per_row: int,
    ns_per_move: int,
) -> bool:
    """Whether new owners save more time than moving to them takes.

    Args:
        load_LE: (L, E) rows expected of each expert in one step.
        overlap_degree: t; the t most loaded experts of each layer are left out, copies level them.
        steps: until owners are planned again.
        ns_per_row: what one row costs the rank that computes it, forward and backward.
        ns_per_move: what one expert with its optimizer state costs the rank that sends or receives it.
    """
    saved = busiest_rows(load_LE, old_LE, overlap_degree, world_size) - busiest_rows(
        load_LE, new_LE, overlap_degree, world_size
    )
    moved = old_LE != new_LE
    sent_W, received_W = (np.bincount(owner_LE[moved], minlength=world_size) for owner_LE in (old_LE, new_LE))
    busiest = int(np.maximum(sent_W, received_W).max())
    return int(saved.sum()) * ns_per_row * steps > busiest * ns_per_move


def busiest_rows(load_LE: Ints, owner_LE: Ints, overlap_degree: int, world_size: int) -> Ints:
    """(L,) rows of each layer's busiest rank, experts with copies left out."""
    rest_LE = np.where(copied_experts(load_LE, overlap_degree), 0, load_LE)
    rows_LW = np.zeros((len(load_LE), world_size), dtype=np.int64)
    np.add.at(rows_LW, (np.arange(len(load_LE))[:, None], owner_LE), rest_LE)
    busiest_L: Ints = rows_LW.max(1)
    return busiest_L


def _check(load_LE: Ints, owner_LE: Ints, slots: list[int], nodes: list[int], overlap_degree: int) -> None:
    world = len(slots)
    if load_LE.ndim != 2 or load_LE.shape != owner_LE.shape:
        raise PlacementError(f"load_LE has shape {load_LE.shape}, owner_LE {owner_LE.shape}; both must be (L, E)")
    if len(nodes) != world:
        raise PlacementError(f"node_W names {len(nodes)} ranks, slots_W {world}")
    if load_LE.size and load_LE.min() < 0:
        raise PlacementError(f"a load is {load_LE.min()}; loads are 0 or more")
    if owner_LE.size and not 0 <= owner_LE.min() <= owner_LE.max() < world:
        raise PlacementError(f"owners are {owner_LE.min()} to {owner_LE.max()}; ranks are 0 to {world - 1}")
    if min(slots, default=0) < 0 or sum(slots) != load_LE.size:
        raise PlacementError(f"slots_W is {slots}, {sum(slots)} in all; there are {load_LE.size} experts to own")
    if overlap_degree < 0:
        raise PlacementError(f"overlap_degree is {overlap_degree}; it must be 0 or more")
