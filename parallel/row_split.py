"""Which holder computes which rows: how many rows each rank sends to each rank, per expert.

Every rank knows how many rows every rank has for every expert (one small all-gather), so each works out its own part of
one common answer and nobody has to ask. Integers only, the same on every rank.

Two rules. ``even`` is Hecate's (arXiv:2502.02581, section 4.4): rows stay where they are if their rank holds the
expert; else they are split evenly over the holders of the same node; else over all holders. ``balanced`` knows the
load: it decides first how many rows of an expert each holder computes, so that ranks end up as level as the copies
allow, and keeps rows at home as far as that leaves room.

Shape suffixes: W ranks, E experts. Of two W, the first is the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from parallel.placement import Bools, Ints, Placement

SplitRule = Literal["even", "balanced"]


class RowSplit(NamedTuple):
    """One rank's part of the common answer.

    Attributes:
        sent_WE: (W, E) rows that this rank sends to each rank (itself included), by expert.
        received_WE: (W, E) rows that this rank computes, by the rank that they come from and expert.
    """

    sent_WE: Ints
    received_WE: Ints


def split_rows(count_WE: Ints, placement: Placement, rank: int, node_W: Sequence[int], rule: SplitRule) -> RowSplit:
    """How the rows go, as ``rank`` sees it.

    Args:
        count_WE: (W, E) rows that each rank has for each expert.
        placement: who holds what while the layer runs.
        node_W: (W,) node of each rank.
    """
    if rule == "balanced":
        return split_by_quota(count_WE, quotas(count_WE.sum(0), placement), rank, node_W)
    return _split_even(count_WE, placement, rank, np.asarray(node_W))


# --- even -------------------------------------------------------------------------------------------------------------


def _split_even(count_WE: Ints, placement: Placement, rank: int, node_W: Ints) -> RowSplit:
    holders_EW = placement.holders_EW
    source_W, expert_E = np.arange(placement.world_size), np.arange(placement.num_experts)

    # What I send: the candidates for my rows of each expert, and my share for each of them.
    near_EW = _on_node(holders_EW, node_W, node_W[rank])
    candidates_EW = np.where(near_EW.any(1, keepdims=True), near_EW, holders_EW)
    at_home_E = holders_EW[:, rank]
    candidates_EW = np.where(at_home_E[:, None], source_W == rank, candidates_EW)
    sent_EW = np.where(
        candidates_EW,
        _share(
            count_WE[rank][:, None],
            candidates_EW.sum(1)[:, None],
            candidates_EW.cumsum(1) - 1,
            (rank + expert_E)[:, None],
        ),
        0,
    )

    # What I get: from each source, my share of what it splits over its candidates, if I am among them.
    received_WE = np.zeros_like(count_WE)
    mine_E = np.flatnonzero(at_home_E)
    for node in range(int(node_W.max()) + 1):
        sources = np.flatnonzero((node_W == node) & (source_W != rank))
        held_there_EW = _on_node(holders_EW[mine_E], node_W, node)
        on_node_E = held_there_EW.any(1)
        if node == node_W[rank]:  # I am a candidate, beside the other holders of this node
            among_EW = held_there_EW
            experts = np.arange(mine_E.size)
        else:  # I am one where that node has no holder
            among_EW = holders_EW[mine_E]
            experts = np.flatnonzero(~on_node_E)
        if not sources.size or not experts.size:
            continue
        chosen = mine_E[experts]
        size_E, place_E = among_EW[experts].sum(1), among_EW[experts, :rank].sum(1)
        rows = _share(count_WE[np.ix_(sources, chosen)], size_E, place_E, sources[:, None] + chosen)
        received_WE[np.ix_(sources, chosen)] = np.where(holders_EW[chosen][:, sources].T, 0, rows)
    received_WE[rank] = np.where(at_home_E, count_WE[rank], 0)
    return RowSplit(np.ascontiguousarray(sent_EW.T), received_WE)


def _on_node(holders_EW: Bools, node_W: Ints, node: int) -> Bools:
    on_node: Bools = holders_EW & (node_W == node)
    return on_node


def _share(rows: Ints, parts: Ints, place: Ints, shift: Ints) -> Ints:
    """Rows for the ``place``-th of ``parts`` even parts; the remainder begins at another part for each source."""
    parts = np.maximum(parts, 1)
    share: Ints = rows // parts + (((place - shift) % parts) < rows % parts)
    return share


# --- balanced ---------------------------------------------------------------------------------------------------------


SWEEPS = 3
"""Times that copied experts are poured anew; one sweep left ranks up to a third above level, three a few percent."""


def quotas(load_E: Ints, placement: Placement) -> Ints:
    """(E, W) rows of each expert that each holder computes, so that the busiest rank has little.

    Experts with one holder go there. Then the others, those with fewest holders first, fill up their holders to a
    common level; and again, each in turn, now that the others lie where they lie.
    """
    quota_EW = np.zeros((placement.num_experts, placement.world_size), dtype=np.int64)
    single = placement.copies_E == 0
    experts = np.arange(placement.num_experts)
    quota_EW[experts[single], placement.owner_E[single]] = load_E[single]
    level_W = quota_EW.sum(0)
    several = np.flatnonzero(~single)
    order = several[np.lexsort((-load_E[several], placement.copies_E[several]))]
    for _ in range(SWEEPS):
        for expert in order:
            ranks = np.flatnonzero(placement.holders_EW[expert])
            level_W -= quota_EW[expert]
            quota_EW[expert, ranks] = fill_up(level_W[ranks], int(load_E[expert]))
            level_W += quota_EW[expert]
    return quota_EW


def fill_up(level_M: Ints, rows: int) -> Ints:
    """(M,) how ``rows`` are spread over bins already filled to ``level_M``, so that the highest ends lowest."""
    order = np.argsort(level_M, kind="stable")
    sorted_M = level_M[order]
    # With the j + 1 lowest bins raised to a common height, this many rows are needed to reach bin j.
    needed = sorted_M * np.arange(1, sorted_M.size + 1) - sorted_M.cumsum()
    used = int(np.searchsorted(needed, rows, side="right"))
    height, rest = divmod(int(sorted_M[:used].sum()) + rows, used)
    added = np.zeros_like(level_M)
    added[order[:used]] = height - sorted_M[:used]
    added[order[:rest]] += 1
    return added


def split_by_quota(count_WE: Ints, quota_EW: Ints, rank: int, node_W: Sequence[int]) -> RowSplit:
    """How the rows go, as ``rank`` sees it, where each rank computes ``quota_EW`` (E, W) rows of each expert."""
    nodes = np.asarray(node_W)
    sent_WE, received_WE = np.zeros_like(count_WE), np.zeros_like(count_WE)
    single_E = (quota_EW > 0).sum(1) == 1
    experts, only_E = np.arange(quota_EW.shape[0]), quota_EW.argmax(1)
    sent_WE[only_E[single_E], experts[single_E]] = count_WE[rank, single_E]
    mine_E = single_E & (only_E == rank)
    received_WE[:, mine_E] = count_WE[:, mine_E]
    for expert in np.flatnonzero(~single_E & quota_EW.any(1)):
        rows_WW = _transport(count_WE[:, expert], quota_EW[expert], nodes)
        sent_WE[:, expert] = rows_WW[rank]
        received_WE[:, expert] = rows_WW[:, rank]
    return RowSplit(sent_WE, received_WE)


def _transport(supply_W: Ints, demand_W: Ints, node_W: Ints) -> Ints:
    """(W, W) rows from each source to each holder: at home first, then inside the node, then in the order of ranks."""
    home = np.minimum(supply_W, demand_W)
    rows_WW = np.diag(home)
    supply_W, demand_W = supply_W - home, demand_W - home
    groups = [np.flatnonzero(node_W == node) for node in range(int(node_W.max()) + 1)]
    for ranks in [*(g for g in groups if g.size > 1), np.arange(node_W.size)]:
        have, want = supply_W[ranks], demand_W[ranks]
        moved = min(int(have.sum()), int(want.sum()))
        if moved:
            # Lay both out on one line of rows; where their intervals overlap, rows go.
            have_end = np.minimum(have.cumsum(), moved)
            want_end = np.minimum(want.cumsum(), moved)
            have_begin, want_begin = np.r_[0, have_end[:-1]], np.r_[0, want_end[:-1]]
            overlap = np.minimum(have_end[:, None], want_end) - np.maximum(have_begin[:, None], want_begin)
            overlap = np.maximum(overlap, 0)
            rows_WW[np.ix_(ranks, ranks)] += overlap
            supply_W[ranks] -= overlap.sum(1)
            demand_W[ranks] -= overlap.sum(0)
    return rows_WW
