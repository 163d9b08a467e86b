"""Projection onto sparse vectors of the simplex: the inner problem of sparsity-constrained optimal transport.

Shape suffixes: B problems, N entries, K kept entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gates.scores import top_k


class SparseRows(NamedTuple):
    """Rows with at most K non-zeros each.

    Attributes:
        index_BK: (B, K) int64 distinct positions, largest value first.
        value_BK: (B, K) values at these positions; 0 where a row has fewer than K non-zeros.
    """

    index_BK: Tensor
    value_BK: Tensor

    def dense(self, width: int) -> Tensor:
        """(B, N) with zeros everywhere else."""
        return self.value_BK.new_zeros(self.value_BK.shape[0], width).scatter(1, self.index_BK, self.value_BK)


def project_simplex_sorted(sorted_BK: Tensor) -> Tensor:
    """(B, K) Euclidean projection of rows that are sorted descending onto the simplex {p >= 0, sum p = 1}.

    Held, Wolfe and Crowder 1974; Duchi et al. 2008: p = max(v - tau, 0) with tau by the longest feasible prefix.
    """
    width = sorted_BK.shape[1]
    count_K = torch.arange(1, width + 1, device=sorted_BK.device, dtype=sorted_BK.dtype)
    tau_BK = (sorted_BK.cumsum(1) - 1) / count_K
    support_B1 = (sorted_BK > tau_BK).sum(1, keepdim=True).clamp_min(1)
    return (sorted_BK - tau_BK.gather(1, support_B1 - 1)).clamp_min(0)


def project_sparse_simplex(value_BN: Tensor, k: int) -> SparseRows:
    """Euclidean projection of each row onto {p >= 0, sum p = 1, at most k non-zeros}; ties go to the lower index.

    The k largest entries projected onto the simplex, zeros elsewhere (Kyrillidis et al., ICML 2013; Liu, Puigcerver and
    Blondel, ICLR 2023, equation 8).

    Raises:
        ValueError: ``k`` is not from 1 to N.
    """
    if not 1 <= k <= value_BN.shape[1]:
        raise ValueError(f"k: {k} must be from 1 to the {value_BN.shape[1]} entries")
    index_BK = top_k(value_BN, k)
    return SparseRows(index_BK, project_simplex_sorted(value_BN.gather(1, index_BK)))
