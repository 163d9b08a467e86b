"""The entries of a quadratic transport plan on a fixed support, as a differentiable function of the scores.

On its support S the plan of ``max <P, s> - gamma/2 |P|^2`` with row sums 1 and column sums a is affine in the scores:
P_ij = (s_ij + alpha_i + beta_j) / gamma with the alpha, beta that meet the sums. Written out, autograd gives the
implicit derivative: the upstream gradient projected onto {matrices on S with zero row and column sums}, divided by
gamma. Only where both marginals hold is that the plan which chose S; small gamma sees to it.

Shape suffixes: T tokens (rows), E experts (columns), N entries of the support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gates.plan import RoutingPlan


def transport_weights(score_TE: Tensor, support: RoutingPlan, gamma: float, row_sum: float = 1.0) -> Tensor:
    """(N,) entries of the plan on ``support``, differentiable; never below 0.

    Args:
        score_TE: (T, E) similarities.
        support: the pairs that are not zero.
        gamma: weight of the quadratic term.
        row_sum: of every row with pairs; columns share the total evenly.
    """
    token_N, expert_N = support.token_N(), support.expert_N
    size_T = support.row_ptr_T1.diff()
    inverse_T = 1 / size_T.clamp_min(1).to(score_TE.dtype)
    covered = (size_T > 0).sum()
    with torch.no_grad():
        mask_TE = torch.zeros_like(score_TE)
        mask_TE[token_N, expert_N] = 1
        curvature_EE = torch.diag(mask_TE.sum(0)) - mask_TE.t() @ (mask_TE * inverse_T.unsqueeze(1))
        # Singular along each group of experts that tokens connect; the pseudo-inverse leaves their common level alone.
        inverse_EE = torch.linalg.pinv(curvature_EE.double(), hermitian=True, rtol=1e-9).to(score_TE.dtype)
        used_E = mask_TE.any(0)
    centred_N = _centred(score_TE[token_N, expert_N] / gamma, token_N, inverse_T)
    level_N = row_sum * inverse_T[token_N]
    target_E = used_E * (row_sum * covered / used_E.sum().clamp_min(1))
    sums_E = score_TE.new_zeros(score_TE.shape[1]).index_add(0, expert_N, centred_N + level_N)
    beta_E = inverse_EE @ (target_E - sums_E)
    weight_N = centred_N + level_N + _centred(beta_E[expert_N], token_N, inverse_T)
    return weight_N.clamp_min(0)


def row_weights(score_TE: Tensor, support: RoutingPlan, gamma: float, row_sum: float = 1.0) -> Tensor:
    """(N,) as :func:`transport_weights`, with column potentials that are part of the scores already: each row alone."""
    token_N = support.token_N()
    inverse_T = 1 / support.row_ptr_T1.diff().clamp_min(1).to(score_TE.dtype)
    centred_N = _centred(score_TE[token_N, support.expert_N] / gamma, token_N, inverse_T)
    return (centred_N + row_sum * inverse_T[token_N]).clamp_min(0)


def _centred(value_N: Tensor, token_N: Tensor, inverse_T: Tensor) -> Tensor:
    """``value_N`` minus its mean over the entries of the same row."""
    mean_T = torch.zeros_like(inverse_T).index_add(0, token_N, value_N) * inverse_T
    return value_N - mean_T[token_N]
