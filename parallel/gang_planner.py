"""Which experts a serving gang holds more than once, from the loads that it has measured.

Unlike in training, copies stay until the next plan, and the loads are sums over many passes. So both planners of
:mod:`parallel.planner` are asked, and what leaves the busiest rank least rows wins.

Shape suffixes: L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parallel.placement import Ints, Placement
from parallel.planner import plan_copies, plan_spill
from parallel.row_split import quotas

WORTH_PERCENT = 3
"""A layer is left as it is unless its busiest rank gets rid of this much of its rows."""


def plan_layer(current: Placement, load_E: Ints, max_copies: int) -> Placement:
    """Copies for one layer, at most ``max_copies`` on a rank besides what it owns.

    Args:
        current: owners, and the copies that there are; they are dropped where others do better.
        load_E: (E,) rows of each expert since the last plan.

    Returns:
        ``current`` itself where nothing gains :data:`WORTH_PERCENT`; of equals the placement with fewer copies.
    """
    if not max_copies or not load_E.any():
        return current
    sharding, node_W = current.sharding(), [0] * current.world_size
    candidates = [plan_spill(sharding, load_E, max_copies).placement]
    candidates += [plan_copies(sharding, load_E, t, max_copies, node_W) for t in range(1, min(8, load_E.size) + 1)]
    best = min(candidates, key=lambda placement: (busiest_rows(load_E, placement), int(placement.copies_E.sum())))
    before, after = busiest_rows(load_E, current), busiest_rows(load_E, best)
    return best if (before - after) * 100 >= before * WORTH_PERCENT and after < before else current


def busiest_rows(load_E: Ints, placement: Placement) -> int:
    """Rows of the rank that computes most of ``load_E`` (E,) under ``placement``."""
    return int(quotas(load_E, placement).sum(0).max())


def expected_rows(load_LE: Ints, placements: Sequence[Placement]) -> Ints:
    """(L, W) rows that each rank would have computed of ``load_LE`` under these placements."""
    return np.stack([quotas(load_E, placement).sum(0) for load_E, placement in zip(load_LE, placements, strict=True)])


def imbalance_of(rows_LW: Ints) -> float:
    """The busiest rank's rows over the mean's, layers added up, as layers wait for each other; 1.0 without rows."""
    total = int(rows_LW.sum())
    return float(rows_LW.max(1).sum() * rows_LW.shape[1] / total) if total else 1.0
