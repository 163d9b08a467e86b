"""A doubly stochastic matrix near the best permutation of a square score, as a differentiable function of it.

    P = exp((A + x + y) / tau), with x and y such that rows and columns add up to 1

At low temperatures Sinkhorn iterations are far from that in any number that one can afford to differentiate through. So
P is found by Newton on one potential (``gates.solvers.entropic.schur_newton``), for hundreds of experts by
Sinkhorn-Newton-Sparse (``gates.solvers.sns``), and its gradient by implicit differentiation: dP = P (dA + dx + dy) /
tau where dx and dy keep the sums, hence

    dL/dA = P (G - a - b) / tau,   with a, b such that this has rows and columns of sum 0,   G = dL/dP

(Eisenberger et al., "A unified framework for implicit Sinkhorn differentiation", CVPR 2022; Mena et al., "Learning
latent permutations with Gumbel-Sinkhorn networks", ICLR 2018, for the relaxation).

Shape suffixes: E rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gates.solvers.entropic import EntropicPlan, exp_normal, schur_newton
from gates.solvers.sns import sinkhorn_newton_sparse

SPARSE_FROM = 384
"""Experts from which on Sinkhorn-Newton-Sparse is the faster one (benchmarks/gates/permutation_time.py)."""
_DAMPING = 1e-12
"""Beside weights of about 1: where the matrix all but is a permutation, nothing is left to solve for but rounding."""


class _RelaxedPermutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_EE: Tensor, tau: float) -> Tensor:
        plan_EE = exp_normal(solve(score_EE, tau).log_plan_TE)
        ctx.save_for_backward(plan_EE)
        ctx.tau = tau
        return plan_EE.to(score_EE.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_EE: Tensor) -> tuple[Tensor, None]:
        (plan_EE,) = ctx.saved_tensors
        flow_EE = plan_EE * upstream_EE.to(plan_EE.dtype)
        row_E, column_E = flow_EE.sum(1), flow_EE.sum(0)
        # Rows eliminated: (I - P^T P) b = columns - P^T rows. Singular along 1, which changes nothing: b_last = 0.
        weight_EE = plan_EE.t() @ plan_EE
        weight_EE.fill_diagonal_(0)  # the diagonal is the others' sum: 1 less its own would cancel
        system_EE = torch.diag(weight_EE.sum(1) + _DAMPING) - weight_EE
        right_E = column_E - plan_EE.t() @ row_E
        b_E = torch.zeros_like(right_E)
        if len(right_E) > 1:
            factor_EE = torch.linalg.cholesky(system_EE[:-1, :-1])
            b_E[:-1] = torch.cholesky_solve(right_E[:-1, None], factor_EE)[:, 0]
        a_E = row_E - plan_EE @ b_E
        gradient_EE = (flow_EE - plan_EE * (a_E[:, None] + b_E)) / ctx.tau
        return gradient_EE.to(upstream_EE.dtype), None


def relaxed_permutation(score_EE: Tensor, tau: float) -> Tensor:
    """(E, E) rows and columns of sum 1, nearer to the permutation of most score the smaller ``tau`` is.

    Args:
        score_EE: (E, E) finite scores, fp32 or fp64; solved for in fp64.
        tau: temperature in units of the score, above 0.
    """
    found: Tensor = _RelaxedPermutation.apply(score_EE, tau)
    return found


def solve(score_EE: Tensor, tau: float) -> EntropicPlan:
    """The plan behind :func:`relaxed_permutation`, with its potentials and marginal error.

    By SNS where a dense system of E equations costs more than many sparse ones.
    """
    ones_E = torch.ones(score_EE.shape[0], dtype=torch.float64, device=score_EE.device)
    solver = sinkhorn_newton_sparse if score_EE.shape[0] >= SPARSE_FROM else schur_newton
    return solver(score_EE.detach().double(), 1 / tau, ones_E, ones_E, tolerance=1e-10)
