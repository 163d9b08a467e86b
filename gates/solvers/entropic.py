"""Optimal transport with entropic regularisation: log-domain Sinkhorn, and Newton after rows are eliminated.

    max over plans P with P 1 = r and P^T 1 = c:   <S, P> - (1/eta) sum_te P_te (log P_te - 1)

Its dual is concave: max over x, y of  f(x, y) = r.x + c.y - (1/eta) sum_te exp(eta (S_te + x_t + y_e)), where that
exponential is the plan. f does not change along (x + a, y - a); results have mean(y) = 0. A cost is a score times -1.

Sinkhorn: Cuturi, "Sinkhorn Distances", NeurIPS 2013; in the log domain as in Peyre and Cuturi, "Computational Optimal
Transport", 2019, section 4.4. Newton: Brauer, Clason, Lorenz and Wirth, "A Sinkhorn-Newton method for entropic optimal
transport", 2017 (arXiv:1710.06635), here on one potential only, the other being known for each value of it.

Shape suffixes: T rows (tokens), E columns (experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ARMIJO, _HALVINGS = 1e-4, 40
_LONGEST_STEP = 100.0  # of a potential in units of the temperature: the plan's entries change by e^100

Evaluation = tuple[float, Tensor, Tensor]  # the objective, and what its next step needs


@dataclass(frozen=True)
class EntropicPlan:
    """A plan of transport and the potentials that it follows from.

    Attributes:
        row_potential_T: x, in units of the score.
        column_potential_E: y, with mean 0. As S + y, it is the score by which rows choose when columns are scarce.
        log_plan_TE: eta (S + x + y); the plan is its exponential.
        marginal_error: L1 distance of the plan's row and column sums from r and c, as a share of the mass.
        iterations: Sinkhorn iterations and Newton steps.
    """

    row_potential_T: Tensor
    column_potential_E: Tensor
    log_plan_TE: Tensor
    marginal_error: float
    iterations: int


class Problem(NamedTuple):
    """A checked problem in units of the temperature: the plan is exp(K + u + v), with u = eta x and v = eta y."""

    K_TE: Tensor
    row_T: Tensor
    column_E: Tensor
    eta: float

    @property
    def mass(self) -> float:
        return float(self.row_T.sum())

    def allowed(self, tolerance: float) -> float:
        """The marginal error to stop at, in mass: never less than the dtype can resolve for exponents of this size."""
        eps = torch.finfo(self.K_TE.dtype).eps
        return self.mass * max(tolerance, eps * float(self.K_TE.abs().amax())) if self.K_TE.numel() else 0.0

    def finish(self, u_T: Tensor, v_E: Tensor, iterations: int) -> EntropicPlan:
        shift = v_E.mean() if v_E.numel() else 0.0
        u_T, v_E = u_T + shift, v_E - shift
        log_plan_TE = self.K_TE + u_T[:, None] + v_E
        plan_TE, error = exp_normal(log_plan_TE), 0.0
        if plan_TE.numel():
            off = (plan_TE.sum(1) - self.row_T).abs().sum() + (plan_TE.sum(0) - self.column_E).abs().sum()
            error = float(off) / self.mass
        return EntropicPlan(u_T / self.eta, v_E / self.eta, log_plan_TE, error, iterations)


def check_problem(score_TE: Tensor, eta: float, row_T: Tensor | None, column_E: Tensor | None) -> Problem:
    """The problem with default marginals filled in (uniform, mass 1), in fp32 or fp64.

    Raises:
        ValueError: something is not finite, a marginal is not positive, the two masses differ, or shapes do not match.
    """
    if score_TE.dim() != 2:
        raise ValueError(f"scores must be a matrix, got shape {tuple(score_TE.shape)}")
    if not (eta > 0 and math.isfinite(eta)):
        raise ValueError(f"eta: {eta} must be positive and finite")
    K_TE = score_TE.detach().to(torch.promote_types(score_TE.dtype, torch.float32)) * eta
    if not bool(K_TE.isfinite().all()):
        raise ValueError("scores times eta must be finite")
    num_rows, num_columns = K_TE.shape
    mass = 1.0 if K_TE.numel() else 0.0
    row_T = K_TE.new_full((num_rows,), mass / max(num_rows, 1)) if row_T is None else row_T
    column_E = K_TE.new_full((num_columns,), mass / max(num_columns, 1)) if column_E is None else column_E
    row_T, column_E = row_T.detach().to(K_TE), column_E.detach().to(K_TE)
    if row_T.shape != (num_rows,) or column_E.shape != (num_columns,):
        raise ValueError(f"marginals {tuple(row_T.shape)} and {tuple(column_E.shape)} for scores {tuple(K_TE.shape)}")
    for name, marginal in (("row", row_T), ("column", column_E)):
        if not bool(marginal.isfinite().all()) or bool((marginal < 0).any()):
            raise ValueError(f"{name} marginal must be finite and positive")
        if K_TE.numel() and not bool((marginal > 0).all()):
            raise ValueError(f"{name} marginal must be positive: leave out what gets no mass")
    total_r, total_c = float(row_T.double().sum()), float(column_E.double().sum())
    if abs(total_r - total_c) > 1e-5 * max(total_r, total_c):
        raise ValueError(f"row marginal has mass {total_r}, column marginal {total_c}")
    return Problem(K_TE, row_T, column_E * (total_r / total_c) if total_c else column_E, eta)


def exp_normal(logits: Tensor) -> Tensor:
    """exp, but nothing below the smallest normal numbers: a CPU takes 4 times as long over those, for nothing."""
    return logits.clamp_min(math.log(torch.finfo(logits.dtype).tiny) + 8).exp_()


def logsumexp(logits_TE: Tensor, dim: int) -> Tensor:
    """torch.logsumexp of finite logits, by ``exp_normal``."""
    peak = logits_TE.amax(dim, keepdim=True)
    return exp_normal(logits_TE - peak).sum(dim).log_() + peak.squeeze(dim)


def dual_objective(
    score_TE: Tensor,
    row_potential_T: Tensor,
    column_potential_E: Tensor,
    eta: float,
    row_T: Tensor | None = None,
    column_E: Tensor | None = None,
) -> float:
    """f(x, y), concave, of which every solver here climbs to the maximum."""
    K_TE, row_T, column_E, _ = check_problem(score_TE, eta, row_T, column_E)
    plan_TE = (K_TE + eta * (row_potential_T[:, None] + column_potential_E)).exp()
    return float(row_T @ row_potential_T + column_E @ column_potential_E - plan_TE.sum() / eta)


def backtrack(
    evaluate: Callable[[Tensor], Evaluation], z_V: Tensor, step_V: Tensor, value: float, slope: float, rounding: float
) -> tuple[Tensor, Evaluation] | None:
    """The first of z + step, z + step / 2, ... that gains enough (Armijo), and what is there; None if none does."""
    length = min(1.0, _LONGEST_STEP / max(float(step_V.abs().amax()), 1.0))
    for _ in range(_HALVINGS):
        trial_V = z_V + length * step_V
        evaluation = evaluate(trial_V)
        if evaluation[0] - value >= _ARMIJO * length * slope - rounding:
            return trial_V, evaluation
        length /= 2
    return None


@torch.no_grad()
def sinkhorn_log(
    score_TE: Tensor,
    eta: float,
    row_T: Tensor | None = None,
    column_E: Tensor | None = None,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-9,
    start_E: Tensor | None = None,
) -> EntropicPlan:
    """Sinkhorn in the log domain: rows are normalised, then columns, until the rows stay within the tolerance.

    Args:
        score_TE: (T, E) finite scores; fp64 where eta times their range exceeds some 50.
        eta: inverse temperature, above 0.
        row_T: (T,) r, positive; None: 1/T each.
        column_E: (E,) c, positive, with the mass of r; None: 1/E each.
        max_iterations: cap, each of one normalisation of rows and one of columns.
        tolerance: largest marginal error (a share of the mass) to stop at.
        start_E: (E,) first column potential y; None: zeros.
    """
    problem = check_problem(score_TE, eta, row_T, column_E)
    v_E = _start(problem, start_E)
    u_T, v_E, iterations = sinkhorn_steps(problem, v_E, max_iterations, tolerance)
    return problem.finish(u_T, v_E, iterations)


def sinkhorn_steps(problem: Problem, v_E: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """At most ``steps`` iterations from v; returns u, v and the number done. Columns are exact unless that is 0."""
    K_TE, row_T, column_E, _ = problem
    u_T = torch.zeros_like(row_T)
    if not K_TE.numel():
        return u_T, v_E, 0
    log_row_T, log_column_E, allowed = row_T.log(), column_E.log(), problem.allowed(tolerance)
    for step in range(steps):
        lse_T = logsumexp(K_TE + v_E, 1)
        # After an iteration columns are exact, and the rows' sums come free with the next one.
        if step and float(((u_T + lse_T).exp() - row_T).abs().sum()) <= allowed:
            return u_T, v_E, step
        u_T = log_row_T - lse_T
        v_E = log_column_E - logsumexp(K_TE + u_T[:, None], 0)
    return u_T, v_E, steps


@torch.no_grad()
def schur_newton(
    score_TE: Tensor,
    eta: float,
    row_T: Tensor | None = None,
    column_E: Tensor | None = None,
    *,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
    warmup: int = 5,
    start_E: Tensor | None = None,
) -> EntropicPlan:
    """Newton on the column potential alone: for each y the best x is known, which leaves a problem in R^E.

    Minus the Hessian is the Schur complement diag(P^T 1) - P^T diag(1/r) P of the joint system, a graph Laplacian. A
    step costs T E^2 + E^3 / 3 and some passes over the plan. Few are needed (for scores in [0, 1] some 8 at eta = 10,
    70 at 10,000), so this is the choice for E up to some hundreds. Rows of the result are exact. Arguments as for
    ``sinkhorn_log``.

    Args:
        warmup: Sinkhorn iterations before, of which ``max_iterations`` does not count any.
    """
    problem = check_problem(score_TE, eta, row_T, column_E)
    u_T, v_E, done = sinkhorn_steps(problem, _start(problem, start_E), warmup, tolerance)
    if not problem.K_TE.numel():
        return problem.finish(u_T, v_E, 0)
    allowed = problem.allowed(tolerance)
    value, plan_TE, lse_T = _semi_dual(problem, v_E)
    for _ in range(max_iterations):
        gradient_E = problem.column_E - plan_TE.sum(0)
        if float(gradient_E.abs().sum()) <= allowed:
            break
        share = float(gradient_E.abs().sum()) / problem.mass
        step_E = laplacian_step(plan_TE, problem.row_T, gradient_E, share)
        rounding = 16 * torch.finfo(v_E.dtype).eps * (1 + float(problem.row_T @ lse_T.abs()))
        found = backtrack(
            lambda v_E: _semi_dual(problem, v_E), v_E, step_E, value, float(gradient_E @ step_E), rounding
        )
        if found is None:
            break  # not even a tiny step gains: this is as near as rounding lets it come
        v_E, (value, plan_TE, lse_T) = found
        done += 1
    return problem.finish(problem.row_T.log() - lse_T, v_E, done)


def _start(problem: Problem, start_E: Tensor | None) -> Tensor:
    if start_E is None:
        return torch.zeros_like(problem.column_E)
    if start_E.shape != problem.column_E.shape or not bool(start_E.isfinite().all()):
        raise ValueError(f"first column potential must be finite and of shape {tuple(problem.column_E.shape)}")
    return start_E.detach().to(problem.column_E) * problem.eta


def _semi_dual(problem: Problem, v_E: Tensor) -> Evaluation:
    """max over u of eta f, up to a constant; the plan with exact rows; logsumexp of K + v over each row."""
    logits_TE = problem.K_TE + v_E
    lse_T = logsumexp(logits_TE, 1)
    plan_TE = exp_normal(logits_TE - lse_T[:, None]) * problem.row_T[:, None]
    return float(problem.column_E @ v_E - problem.row_T @ lse_T), plan_TE, lse_T


def laplacian_step(plan_TE: Tensor, row_T: Tensor, right_E: Tensor, share: float) -> Tensor:
    """(E,) solution of (diag(P^T 1) - P^T diag(1/row) P + damping) step = right, whose last entry is 0.

    Args:
        row_T: the plan's row sums.
        share: marginal error as a share of the mass, by which damping dies out.
    """
    weight_EE = plan_TE.t() @ (plan_TE / row_T[:, None])
    # The diagonal from the weights, not P^T 1 less the weight's own: near a vertex of the polytope that cancels.
    weight_EE.fill_diagonal_(0)
    scale = float(row_T.sum()) / right_E.numel()
    # Damping dies out with the gradient, but for what a factorisation needs where the plan all but falls into blocks.
    number = torch.finfo(plan_TE.dtype)
    diagonal_E = weight_EE.sum(1) * (1 + 50 * number.eps) + 1e-2 * scale * share**2 + number.tiny
    # Constant vectors are in the kernel, hence one column less. Adding a multiple of 1 1^T would drown small weights.
    factor_EE, failed = torch.linalg.cholesky_ex((torch.diag(diagonal_E) - weight_EE)[:-1, :-1])
    if int(failed):
        return right_E / scale
    step_E = torch.cholesky_solve(right_E[:-1, None], factor_EE)[:, 0]
    return torch.cat([step_E, step_E.new_zeros(1)])
