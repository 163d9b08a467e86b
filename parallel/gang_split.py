"""Which rank of a serving gang computes which rows, and in what order the rows stand for that.

Rank 0 has all rows of a pass, sorted by expert. The rows of an expert go to its holders by
:func:`parallel.row_split.quotas`, which levels ranks; of one expert's rows the lowest rank takes the first. An expert
that has one holder is computed in one product, as one process would compute it.

Shape suffixes: E experts, W ranks, N rows, S (rank, expert) pairs of the placement, e experts held by one rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.placement import Ints, Placement
from parallel.row_split import quotas


class GangSplit(NamedTuple):
    """How the rows of one layer are spread.

    Attributes:
        row_N: (N,) which row of those sorted by expert stands at each place, rank after rank, and within a rank in the
            order in which it holds experts.
        rows_W: rows of each rank; they sum to N.
        load_We: rows of each expert that the rank holds, in that order.
    """

    row_N: Ints
    rows_W: list[int]
    load_We: list[Ints]


class HolderTable:
    """A placement as the split needs it, worked out once.

    Attributes:
        placement: the placement.
        held_We: experts of each rank, owned ones first.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.held_We = [placement.held_by(rank) for rank in range(placement.world_size)]
        self._expert_S = np.array([e for held in self.held_We for e in held], dtype=np.int64)
        self._rank_S = np.repeat(np.arange(placement.world_size), [len(held) for held in self.held_We])
        self._begins_W = np.cumsum([len(held) for held in self.held_We])[:-1]

    def split(self, load_E: Ints) -> GangSplit:
        """Spread ``load_E`` (E,) rows over their holders; the same loads give the same split."""
        quota_EW = quotas(load_E, self.placement)
        begin_EW = (quota_EW.cumsum() - quota_EW.ravel()).reshape(quota_EW.shape)
        size_S: Ints = quota_EW[self._expert_S, self._rank_S]
        first_S: Ints = size_S.cumsum() - size_S
        shift_S: Ints = begin_EW[self._expert_S, self._rank_S] - first_S
        row_N: Ints = np.repeat(shift_S, size_S) + np.arange(int(size_S.sum()))
        return GangSplit(row_N, quota_EW.sum(0).tolist(), np.split(size_S, self._begins_W))
