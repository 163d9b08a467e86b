"""Sinkhorn-Newton-Sparse: entropic optimal transport at low temperature.

Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying, "Accelerating Sinkhorn algorithm with sparse Newton
iterations", ICLR 2024 (arXiv:2401.12253, algorithm 1). Problem and dual are those of ``gates.solvers.entropic``.

Stage 1: Sinkhorn iterations. Stage 2: Newton on both potentials, where minus the Hessian

    eta [[diag(P 1), P], [P^T, diag(P^T 1)]]

has only the largest entries of P; the diagonals are sums of all of P, so what is left stays diagonally dominant. It is
solved by conjugate gradients. Where the plan all but falls apart into blocks these do not converge (not in the paper:
one random 200 x 200 assignment of five at eta = 1200); from there on rows are eliminated and steps are exact. Pays off
for eta times the score's range in the hundreds and more; below, Sinkhorn alone is quicker, and with few columns
``schur_newton`` is.

Shape suffixes: T rows, E columns, V = T + E variables, Z kept entries of the plan (each twice in the system).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gates.solvers.entropic import (
    EntropicPlan,
    Evaluation,
    Problem,
    backtrack,
    check_problem,
    exp_normal,
    laplacian_step,
    sinkhorn_steps,
)


@dataclass(frozen=True)
class SparseNewtonPlan(EntropicPlan):
    """The same, and what it took: ``iterations`` is the sum of Sinkhorn iterations and Newton steps.

    Attributes:
        newton_steps: of stage 2.
        cg_iterations: of all of its linear systems.
    """

    newton_steps: int
    cg_iterations: int


@torch.no_grad()
def sinkhorn_newton_sparse(
    score_TE: Tensor,
    eta: float,
    row_T: Tensor | None = None,
    column_E: Tensor | None = None,
    *,
    sinkhorn_iterations: int = 20,
    max_newton_steps: int = 200,
    tolerance: float = 1e-10,
    density: float | None = None,
    max_cg_iterations: int = 1000,
) -> SparseNewtonPlan:
    """The entropic plan by SNS, in fp64.

    Args:
        score_TE: (T, E) finite scores (costs times -1).
        eta: inverse temperature, above 0.
        row_T: (T,) r, positive; None: 1/T each.
        column_E: (E,) c, positive, with the mass of r; None: 1/E each.
        sinkhorn_iterations: of stage 1, at most; at least 1.
        max_newton_steps: of stage 2, at most.
        tolerance: largest marginal error (a share of the mass) to stop at.
        density: share of the plan's entries that the Hessian keeps. None: 8 (T + E) entries, 16/n for n x n.
            The paper has 2/n, and 15/n for L1 costs, where the best plan is not unique; 2/n takes more Newton steps and
            CG iterations here even for a random assignment, and is not enough for squared distances in the plane.
        max_cg_iterations: for each system; rounding makes small ones take more than V.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density: {density} must be above 0 and at most 1")
    if sinkhorn_iterations < 1:
        raise ValueError(f"sinkhorn_iterations: {sinkhorn_iterations} must be at least 1, which makes the plan finite")
    problem = check_problem(score_TE.double(), eta, row_T, column_E)
    u_T, v_E, done = sinkhorn_steps(problem, torch.zeros_like(problem.column_E), sinkhorn_iterations, tolerance)
    steps, cg_total = 0, 0
    if problem.K_TE.numel():
        z_V, steps, cg_total = _newton(
            problem, torch.cat([u_T, v_E]), max_newton_steps, tolerance, density, max_cg_iterations
        )
        u_T, v_E = z_V.split(problem.K_TE.shape)
    plan = problem.finish(u_T, v_E, done + steps)
    return SparseNewtonPlan(**vars(plan), newton_steps=steps, cg_iterations=cg_total)


def _newton(
    problem: Problem, z_V: Tensor, max_steps: int, tolerance: float, density: float | None, max_cg: int
) -> tuple[Tensor, int, int]:
    """Stage 2 from z = (u, v): z, Newton steps, CG iterations."""
    num_rows, num_columns = problem.K_TE.shape
    keep = 8 * (num_rows + num_columns) if density is None else math.ceil(density * num_rows * num_columns)
    keep = min(keep, num_rows * num_columns)
    target_V, cg_total = torch.cat([problem.row_T, problem.column_E]), 0
    allowed = problem.allowed(tolerance)
    value, sums_V, plan_TE = _evaluate(problem, target_V, z_V)
    exact = False
    for step in range(max_steps):
        gradient_V = target_V - sums_V
        error = float(gradient_V.abs().sum())
        if not error > allowed:
            return z_V, step, cg_total
        share = error / problem.mass
        if not exact:
            # Where the plan all but falls apart into blocks so does the system: undamped steps would be endless.
            system = sparsify(plan_TE, sums_V * (1 + 1e-3 * share**2), keep)
            step_V, cg_iterations = conjugate_gradients(system, gradient_V, min(0.1, share), max_cg)
            cg_total += cg_iterations
            exact = cg_iterations == max_cg
        if exact:
            step_V = exact_step(plan_TE, sums_V, gradient_V, share)
        rounding = 16 * torch.finfo(z_V.dtype).eps * (problem.mass + float(target_V @ z_V.abs()))
        found = backtrack(
            lambda z_V: _evaluate(problem, target_V, z_V), z_V, step_V, value, float(gradient_V @ step_V), rounding
        )
        if found is None:
            return z_V, step, cg_total  # not even a tiny step gains: this is as near as rounding lets it come
        z_V, (value, sums_V, plan_TE) = found
    return z_V, max_steps, cg_total


def exact_step(plan_TE: Tensor, sums_V: Tensor, gradient_V: Tensor, share: float) -> Tensor:
    """(V,) Newton's step of the whole Hessian: rows eliminated, a dense system in the columns. T E^2 + E^3 / 3."""
    num_rows = plan_TE.shape[0]
    row_T = sums_V[:num_rows].clamp_min(torch.finfo(sums_V.dtype).tiny)
    gradient_T, gradient_E = gradient_V.split(plan_TE.shape)
    step_E = laplacian_step(plan_TE, row_T, gradient_E - plan_TE.t() @ (gradient_T / row_T), share)
    return torch.cat([(gradient_T - plan_TE @ step_E) / row_T, step_E])


def _evaluate(problem: Problem, target_V: Tensor, z_V: Tensor) -> Evaluation:
    """eta f; the plan's row and column sums (V,); the plan. An overflow gives the value -inf."""
    u_T, v_E = z_V.split(problem.K_TE.shape)
    plan_TE = exp_normal(problem.K_TE + u_T[:, None] + v_E)
    sums_V = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
    return float(target_V @ z_V - sums_V[: len(u_T)].sum()), sums_V, plan_TE


class SparseSystem(NamedTuple):
    """A symmetric positive semi-definite matrix: sparse rows, and its diagonal once more for the preconditioner."""

    matrix_VV: Tensor
    diagonal_V: Tensor


def sparsify(plan_TE: Tensor, sums_V: Tensor, keep: int) -> SparseSystem:
    """Minus the Hessian (over eta) with the plan's ``keep`` largest entries; ``sums_V``: of all rows and columns."""
    (num_rows, num_columns), device = plan_TE.shape, plan_TE.device
    weight_Z, flat_Z = plan_TE.flatten().topk(keep, sorted=False)
    row_Z, column_Z = flat_Z // num_columns, flat_Z % num_columns + num_rows
    diagonal_V = sums_V.clamp_min(torch.finfo(sums_V.dtype).tiny)  # far from the optimum one may underflow
    on_V = torch.arange(num_rows + num_columns, device=device)
    index = torch.stack([torch.cat([on_V, row_Z, column_Z]), torch.cat([on_V, column_Z, row_Z])])
    values = torch.cat([diagonal_V, weight_Z, weight_Z])
    matrix_VV = torch.sparse_coo_tensor(index, values, (len(on_V), len(on_V)), check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return SparseSystem(matrix_VV.to_sparse_csr(), diagonal_V)  # some 5 times as fast as COO


def conjugate_gradients(
    system: SparseSystem, right_V: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Solve system x = right with Jacobi preconditioning, from 0; returns x and the iterations done.

    The system may be singular: rounding apart, iterates stay in its range if ``right_V`` is. Stopped early they still
    point uphill.
    """
    x_V, residual_V = torch.zeros_like(right_V), right_V
    inverse_V = 1 / system.diagonal_V
    direction_V = preconditioned_V = inverse_V * residual_V
    rho = float(residual_V @ preconditioned_V)
    stop = tolerance**2 * rho
    for iteration in range(max_iterations):
        if not rho > stop:
            return x_V, iteration
        image_V = torch.mv(system.matrix_VV, direction_V)
        curvature = float(direction_V @ image_V)
        if not curvature > 0:
            return x_V if iteration else preconditioned_V, iteration
        x_V = torch.add(x_V, direction_V, alpha=rho / curvature)
        residual_V = torch.add(residual_V, image_V, alpha=-rho / curvature)
        preconditioned_V = inverse_V * residual_V
        rho, before = float(residual_V @ preconditioned_V), rho
        direction_V = torch.add(preconditioned_V, direction_V, alpha=rho / before)
    return x_V, max_iterations
