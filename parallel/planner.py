"""Which experts to copy where for one run of a layer: by predicted loads, by true ones on top, or by true ones alone.

``plan_copies`` is Algorithm 1 of Hecate (arXiv:2502.02581, section 4.2): the most loaded experts, as many as hide
under attention, get copies in proportion to their load. ``plan_more_copies`` is its calibration, once the gate has
spoken. ``plan_spill`` needs no prediction: rows above the mean leave the busiest ranks for the idlest, with the expert
that they need (least-loaded spill, arXiv:2601.17111; UltraEP, arXiv:2606.04101); it can also level what predicted
copies left.

Pure functions of integers with a rule for every tie: every rank that knows the same loads finds the same placement.
Shape suffixes: E experts of a layer, W ranks, t experts chosen for copies, N nodes, P places in a node.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallel.placement import Bools, Ints, Placement, PlacementError

MAX_LOAD = 2**40
"""Loads below this leave room in 64 bits for all products here, up to thousands of ranks."""

QUOTIENT_BITS = 16
"""Loads per holder are compared to this many binary digits behind the point."""


def rows_per_rank(load_E: Ints, placement: Placement) -> Ints:
    """(W,) rows that each rank computes when the holders of an expert share its rows evenly.

    Who holds an expert keeps its own rows, so that is exact where every rank has as many rows for the expert.

    Args:
        load_E: (E,) rows of each expert, over all ranks; a rest smaller than the number of holders does not count.

    Raises:
        PlacementError: ``load_E`` does not fit the placement.
    """
    _check(placement, load_E, range(placement.world_size))
    rows_W: Ints = load_E // (placement.copies_E + 1) @ placement.holders_EW
    return rows_W


# --- by predicted loads -----------------------------------------------------------------------------------------------


def plan_copies(
    sharding: Placement, load_E: Ints, overlap_degree: int, max_copies: int, node_W: Sequence[int]
) -> Placement:
    """Copies for the most loaded experts; Algorithm 1 of Hecate, its gaps closed.

    If memory allows, the ``overlap_degree`` most loaded experts go everywhere. Else all slots are shared out among them
    in proportion to load, by largest remainder; what exceeds an expert's W - 1 possible copies goes one by one to the
    most rows per holder. Copies prefer nodes that hold none and have most free slots, then ranks with most free slots.
    Ties go to the lower expert, node and rank.

    Args:
        sharding: who owns what. If it has copies already, they stay, and their experts count by rows per holder.
        load_E: (E,) rows expected of each expert, or anything in proportion to them; experts without load get no copy.
        overlap_degree: t, how many experts may get copies.
        max_copies: m, how many copies one rank may hold besides what it owns.
        node_W: (W,) node of each rank.

    Raises:
        PlacementError: a shape does not fit, loads are not integers from 0 to ``MAX_LOAD``, or a number is negative.
    """
    _check(sharding, load_E, node_W, overlap_degree=overlap_degree, max_copies=max_copies)
    holders_EW = sharding.holders_EW.copy()
    free_W = np.maximum(max_copies - sharding.copies_W, 0)
    share_E = load_E // holders_EW.sum(1)
    top_t = np.argsort(-share_E, kind="stable")[:overlap_degree]
    top_t = top_t[(share_E[top_t] > 0) & ~holders_EW[top_t].all(1)]
    if (np.count_nonzero(~holders_EW[top_t], axis=0) <= free_W).all():
        holders_EW[top_t] = True
    else:
        room_t = np.count_nonzero(~holders_EW[top_t], axis=1)
        wanted_t = _share_slots(share_E[top_t], room_t, int(free_W.sum()))
        _spread(holders_EW, top_t, wanted_t, free_W, node_W)
    return Placement(sharding.owner_E, holders_EW)


def _share_slots(load_t: Ints, room_t: Ints, slots: int) -> Ints:
    """(t,) copies of each expert: slots in proportion to load, at most ``room_t``."""
    total = int(load_t.sum())
    wanted_t = slots * load_t // total
    remainder_t = slots * load_t - wanted_t * total
    wanted_t[np.argsort(-remainder_t, kind="stable")[: slots - int(wanted_t.sum())]] += 1
    wanted_t = np.minimum(wanted_t, room_t)
    left = min(slots, int(room_t.sum())) - int(wanted_t.sum())
    if left:
        # An expert's next copy is claimed by its rows per holder; the highest claims of all experts get the slots.
        expert_N = np.repeat(np.arange(load_t.size), room_t - wanted_t)
        place_N = np.arange(expert_N.size) - np.repeat(
            (room_t - wanted_t).cumsum() - (room_t - wanted_t), room_t - wanted_t
        )
        claim_N = (load_t[expert_N] << QUOTIENT_BITS) // (wanted_t[expert_N] + place_N + 1)
        wanted_t += np.bincount(expert_N[np.argsort(-claim_N, kind="stable")[:left]], minlength=load_t.size)
    return wanted_t


def _spread(holders_EW: Bools, top_t: Ints, wanted_t: Ints, free_W: Ints, node_W: Sequence[int]) -> None:
    """Give each expert its copies, as far as slots last; ``holders_EW`` is written to."""
    # Ranks stand in a table of nodes, so that one sort ranks the places of all nodes. Places beyond a smaller node's
    # last rank are never free. Free slots are counted in units large enough to carry a place or a node as the rest.
    table_NP = _node_table(node_W)
    nodes, places = table_NP.shape
    unit = nodes * places
    free_NP = np.where(table_NP >= 0, free_W[table_NP], 0) * unit
    free_M, rank_M, place_P = free_NP.reshape(-1), table_NP.reshape(-1), np.arange(places)
    node_begin_M = np.arange(unit) // places * places
    holds_tNP = holders_EW[top_t][:, table_NP] & (table_NP >= 0)
    open_tNP = 1 - holds_tNP.astype(np.int64)
    # A node's first place comes before all others if the node holds none yet.
    never = np.iinfo(np.int64).max // 4
    start_tNP = np.tile(place_P * unit + np.arange(nodes)[:, None], (top_t.size, 1, 1))
    start_tNP[..., 0] -= np.where(holds_tNP.any(2), 0, never)
    chosen_t: list[Ints] = []
    for wanted, open_NP, start_NP in zip(wanted_t.tolist(), open_tNP, start_tNP, strict=True):
        # Places of each node, those with most free slots first; negative where there is one.
        sorted_NP = place_P - free_NP * open_NP
        sorted_NP.sort(1)
        closed_NP = sorted_NP >= 0
        wanted = min(wanted, unit - int(np.count_nonzero(closed_NP)))
        if not wanted:
            chosen_t.append(place_P[:0])
            continue
        # When a node gives its j-th place, j of its slots are gone.
        key_NP = start_NP - np.add.reduce(free_NP, 1, keepdims=True)
        np.putmask(key_NP, closed_NP, never)
        taken = key_NP.reshape(-1).argpartition(wanted - 1)[:wanted]
        taken = node_begin_M.take(taken) + sorted_NP.reshape(-1).take(taken) % unit
        free_M[taken] -= unit
        chosen_t.append(rank_M.take(taken))
    holders_EW[np.repeat(top_t, [chosen.size for chosen in chosen_t]), np.concatenate(chosen_t)] = True


def _node_table(node_W: Sequence[int]) -> Ints:
    """(N, P) ranks of each node, ascending; -1 where a node has fewer than the largest."""
    size_N = np.bincount(node_W)
    size_N = size_N[size_N > 0]
    table_NP = np.full((size_N.size, int(size_N.max())), -1, dtype=np.int64)
    table_NP[np.arange(table_NP.shape[1]) < size_N[:, None]] = np.argsort(node_W, kind="stable")
    return table_NP


# --- by true loads, on top of predicted ones --------------------------------------------------------------------------


def plan_more_copies(
    current: Placement,
    load_E: Ints,
    overlap_degree: int,
    max_copies: int,
    node_W: Sequence[int],
    *,
    ns_per_row: int,
    ns_per_copy: int,
) -> Placement:
    """More copies now that the true loads are known, if they pay: calibration (Hecate, section 4.2).

    Nothing hides these copies. They are made only if the rows that the busiest rank gets rid of take longer than the
    copies that one rank receives.

    Args:
        current: the placement by predicted loads; its copies stay.
        load_E: (E,) true rows of each expert, over all ranks.
        overlap_degree, max_copies, node_W: as for :func:`plan_copies`; copies that are there count against the memory.
        ns_per_row: what one row costs the rank that computes it, forward and backward.
        ns_per_copy: what one copy costs the rank that receives it, its gradient's way home included.

    Returns:
        The placement with more copies, or ``current`` itself if they do not pay.

    Raises:
        PlacementError: as :func:`plan_copies`.
    """
    before, world = int(rows_per_rank(load_E, current).max()), current.world_size
    # No rank can end below the mean, except by the rests of experts with copies, which rows_per_rank leaves out.
    rests = (overlap_degree + int(np.count_nonzero(current.copies_E))) * (world - 1)
    if (before - max(0, int(load_E.sum()) - rests) // world) * ns_per_row <= ns_per_copy:
        return current  # a level layer would not pay for one copy
    more = plan_copies(current, load_E, overlap_degree, max_copies, node_W)
    received = int((more.copies_W - current.copies_W).max())
    after = int(rows_per_rank(load_E, more).max())
    return more if (before - after) * ns_per_row > received * ns_per_copy else current


# --- by true loads alone ----------------------------------------------------------------------------------------------


class Spill(NamedTuple):
    """Copies, and the rows for which they are made.

    Attributes:
        placement: who holds what.
        quota_EW: (E, W) rows of each expert that each rank computes.
    """

    placement: Placement
    quota_EW: Ints


def plan_spill(
    current: Placement,
    load_E: Ints,
    max_copies: int,
    *,
    settled_EW: Ints | None = None,
    min_rows: int = 1,
    level_num: int = 1,
    level_den: int = 1,
) -> Spill:
    """Copies that let the busiest ranks spill rows to the idlest until none is much above the mean.

    The busiest rank's hottest expert is copied to the rank with fewest rows, which takes as many of its rows as fit
    below the level, and so on; what is left to spill goes to the rank that has just room for it. So every copy finishes
    a busy rank, an expert or an idle rank, and copies are few. After least-loaded spill (LLEP, arXiv:2601.17111), which
    always takes the least loaded rank, and so runs out of slots where memory is short.

    Args:
        current: who holds what already. Rows of experts with copies stay as ``settled_EW`` says; others spill.
        load_E: (E,) true rows of each expert, over all ranks.
        max_copies: copies that one rank may hold besides what it owns, those of ``current`` included.
        settled_EW: (E, W) rows of the experts that have copies, as their holders share them, of which
            :func:`even_quotas` is one way; needed only if there are any.
        min_rows: no copy is made to move fewer rows.
        level_num, level_den: the level that is good enough, as a ratio of the mean, at least 1.

    Raises:
        PlacementError: a shape does not fit, loads are not integers from 0 to ``MAX_LOAD``, a number is negative, the
            level is below the mean, or ``settled_EW`` does not share out an expert that has copies.
    """
    _check(current, load_E, range(current.world_size), max_copies=max_copies, min_rows=min_rows)
    if not 1 <= level_den <= level_num:
        raise PlacementError(f"the level {level_num}/{level_den} of the mean cannot be reached; it must be at least 1")
    world, total = current.world_size, int(load_E.sum())
    quota_EW = np.zeros_like(current.holders_EW, dtype=np.int64)
    copied = np.flatnonzero(current.copies_E)
    if settled_EW is not None:
        quota_EW[copied] = settled_EW[copied]
    for expert in copied[quota_EW[copied].sum(1) != load_E[copied]][:1]:
        raise PlacementError(
            f"expert {expert} has copies and {load_E[expert]} rows, settled_EW shares out {quota_EW[expert].sum()}"
        )
    level = max(-(-total // world), total * level_num // (world * level_den))
    loads, owners = load_E.tolist(), current.owner_E.tolist()
    rows_W, owned_W = quota_EW.sum(0).tolist(), [list[int]() for _ in range(world)]
    single = np.flatnonzero(current.copies_E == 0)
    quota_EW[single, current.owner_E[single]] = load_E[single]
    for expert in single[np.argsort(-load_E[single], kind="stable")].tolist():
        rows_W[owners[expert]] += loads[expert]
        owned_W[owners[expert]].append(expert)
    least, slots_W = max(1, min_rows), (max_copies - current.copies_W).tolist()
    idle = sorted((level - rows_W[r], r, slots_W[r]) for r in range(world) if slots_W[r] > 0 and rows_W[r] < level)
    spilled: list[tuple[int, int, int]] = []
    for rank in sorted((r for r in range(world) if rows_W[r] > level), key=lambda r: (-rows_W[r], r)):
        excess = rows_W[rank] - level
        for expert in owned_W[rank]:
            left = min(excess, loads[expert])
            while left >= least and idle and idle[-1][0] >= least:
                # The tightest room that takes all of it; else the largest room. So slots last.
                room, taker, slots = idle.pop(min(bisect_left(idle, (left, -1, 0)), len(idle) - 1))
                moved = min(left, room)
                spilled.append((expert, taker, moved))
                left, excess = left - moved, excess - moved
                if slots > 1 and room > moved:
                    insort(idle, (room - moved, taker, slots - 1))
            if excess < least:
                break
    holders_EW = current.holders_EW.copy()
    for expert, taker, moved in spilled:
        quota_EW[expert, owners[expert]] -= moved
        quota_EW[expert, taker] = moved
        holders_EW[expert, taker] = True
    return Spill(Placement(current.owner_E, holders_EW), quota_EW)


def even_quotas(count_WE: Ints, placement: Placement, node_W: Sequence[int]) -> Ints:
    """(E, W) rows that each holder computes if rows stay at home, else are split evenly on their node, else over all.

    Hecate's rule (section 4.4), summed over sources; so :func:`plan_spill` can build on copies made before the gate.

    Args:
        count_WE: (W, E) rows that each rank has for each expert.
    """
    nodes = np.asarray(node_W)
    several = placement.copies_E > 0
    quota_EW = np.zeros(placement.holders_EW.shape, dtype=np.int64)
    quota_EW[np.arange(placement.num_experts), placement.owner_E] = count_WE.sum(0)
    held_EW, count_EW = placement.holders_EW[several], count_WE[:, several].T
    shared_EW = np.where(held_EW, count_EW, 0)
    away_EW = count_EW - shared_EW
    far_E = np.zeros(len(held_EW), dtype=np.int64)
    for node in sorted(set(node_W)):
        near_EW = held_EW & (nodes == node)
        rows_E = away_EW[:, nodes == node].sum(1)
        shared_EW += _evenly(np.where(near_EW.any(1), rows_E, 0), near_EW)
        far_E += np.where(near_EW.any(1), 0, rows_E)
    quota_EW[several] = shared_EW + _evenly(far_E, held_EW)
    return quota_EW


def _evenly(rows_E: Ints, takers_EW: Bools) -> Ints:
    """(E, W) each expert's rows over its takers; the first ones get one more."""
    base_E, rest_E = np.divmod(rows_E, np.maximum(takers_EW.sum(1), 1))
    more_EW = takers_EW.cumsum(1) <= rest_E[:, None]
    shares_EW: Ints = np.where(takers_EW, base_E[:, None] + more_EW, 0)
    return shares_EW


def _check(sharding: Placement, load_E: Ints, node_W: Sequence[int], **at_least_0: int) -> None:
    if load_E.shape != (sharding.num_experts,):
        raise PlacementError(f"load_E has shape {load_E.shape}, the placement has {sharding.num_experts} experts")
    if load_E.dtype.kind not in "iu" or (load_E.size and not 0 <= load_E.min() <= load_E.max() < MAX_LOAD):
        raise PlacementError(f"loads must be integers from 0 to {MAX_LOAD - 1}, not {load_E.dtype} {load_E}")
    if len(node_W) != sharding.world_size:
        raise PlacementError(f"node_W names {len(node_W)} ranks, the placement has {sharding.world_size}")
    for name, value in at_least_0.items():
        if value < 0:
            raise PlacementError(f"{name} is {value}; it must be 0 or more")
