"""Optimal transport with at most k non-zeros a column, by its concave semi-dual.

Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023 (arXiv:2209.15466, sections 3 and 4):

    max over alpha:  alpha . a - sum_j b_j max_k(alpha + s_j; gamma b_j)
    max_k(u; c) = max over p in the simplex with at most k non-zeros of  u . p - c/2 |p|^2

where column j of the plan is b_j p_j. Columns meet their marginals by construction; rows meet theirs where the
semi-dual is smooth at its maximum, which small gamma and large k make likely.

Shape suffixes: B columns (problems), N rows (entries of alpha), K non-zeros of a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gates.solvers.sparse_simplex import SparseRows, project_simplex_sorted, project_sparse_simplex

Solver = Literal["lbfgs", "adam", "newton"]
_NEWTON_TOLERANCE = 1e-11


class SemiDual(NamedTuple):
    """A plan and the potential that it follows from.

    Attributes:
        alpha_N: (N,) the dual variable.
        columns: p_j of each column, (B, K); times b_j they are the plan.
        objective: the semi-dual's value.
        violation: largest difference between a row's sum and ``a``, as a share of the mean of ``a``.
        evaluations: how often the objective was evaluated.
    """

    alpha_N: Tensor
    columns: SparseRows
    objective: float
    violation: float
    evaluations: int


def solve_semi_dual(
    score_BN: Tensor,
    k: int,
    gamma: float,
    *,
    row_mass: float,
    column_mass: float,
    solver: Solver = "lbfgs",
    iterations: int = 20,
    learning_rate: float = 1e-2,
    start_N: Tensor | None = None,
) -> SemiDual:
    """Maximise the semi-dual for marginals that are the same for all rows and for all columns.

    Args:
        score_BN: (B, N) similarity (minus cost) of each column and row, fp32 or fp64; B, N >= 1.
        k: most non-zeros of a column.
        gamma: weight of the quadratic term, above 0.
        row_mass: a, of each of N rows; N * a = B * b.
        column_mass: b, of each of B columns.
        solver: "lbfgs": torch.optim.LBFGS with a strong Wolfe line search. "adam": as the reference does it. "newton":
            semi-smooth Newton in fp64, an N x N system a step; needs k >= 2.
        iterations: of the solver, at most.
        learning_rate: of Adam.
        start_N: (N,) first alpha; None: zeros.
    """
    if gamma <= 0:
        raise ValueError(f"gamma: {gamma} must be above 0")
    dtype = score_BN.dtype
    # Newton's last steps gain less than fp32 can tell in a sum over thousands of columns.
    wide_BN = score_BN.detach().double() if solver == "newton" else score_BN.detach()
    problem = _Problem(wide_BN, k, gamma * column_mass, row_mass, column_mass)
    alpha_N = torch.zeros_like(wide_BN[0]) if start_N is None else start_N.to(wide_BN).clone()
    with torch.no_grad():
        alpha_N = _SOLVERS[solver](problem, alpha_N, iterations, learning_rate)
        value, gradient_N, columns = problem.evaluate(alpha_N)
    violation = float(gradient_N.abs().max()) / row_mass
    columns = SparseRows(columns.index_BK, columns.value_BK.to(dtype))
    return SemiDual(alpha_N.to(dtype), columns, float(value), violation, problem.evaluations)


class _Problem:
    """The semi-dual divided by the total mass, so that step sizes do not depend on the number of tokens."""

    def __init__(self, score_BN: Tensor, k: int, scale: float, row_mass: float, column_mass: float) -> None:
        self.score_BN, self.k, self.scale = score_BN, k, scale
        self.row_mass, self.column_mass = row_mass, column_mass
        self.evaluations = 0

    def evaluate(self, alpha_N: Tensor) -> tuple[Tensor, Tensor, SparseRows]:
        """Value, gradient a - sum_j b p_j (Danskin), and the columns."""
        self.evaluations += 1
        columns = project_sparse_simplex((self.score_BN + alpha_N) / self.scale, self.k)
        index_BK, p_BK = columns
        picked_BK = (self.score_BN.gather(1, index_BK) + alpha_N[index_BK]) * p_BK
        inner = picked_BK.sum() - 0.5 * self.scale * p_BK.square().sum()
        rows_N = torch.zeros_like(alpha_N).index_add_(0, index_BK.reshape(-1), p_BK.reshape(-1))
        value = self.row_mass * alpha_N.sum() - self.column_mass * inner
        return value, self.row_mass - self.column_mass * rows_N, columns

    def curvature(self, columns: SparseRows) -> Tensor:
        """(N, N) minus the generalised Hessian: sum_j b / scale (diag(m_j) - m_j m_j^T / |m_j|) over supports m_j."""
        index_BK, p_BK = columns
        support_BK = (p_BK > 0).to(p_BK.dtype)
        m_BN = torch.zeros_like(self.score_BN).scatter_(1, index_BK, support_BK)
        size_B1 = support_BK.sum(1, keepdim=True).clamp_min(1)
        hessian_NN = torch.diag(m_BN.sum(0)) - m_BN.t() @ (m_BN / size_B1)
        return hessian_NN * (self.column_mass / self.scale)


def _lbfgs(problem: _Problem, alpha_N: Tensor, iterations: int, _: float) -> Tensor:
    parameter = torch.nn.Parameter(alpha_N)
    total = problem.row_mass * alpha_N.numel()
    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=iterations,
        history_size=min(20, iterations),
        tolerance_grad=1e-7 * problem.row_mass / total,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient_N, _ = problem.evaluate(parameter.detach())
        parameter.grad = -gradient_N / total
        return -float(value) / total

    optimizer.step(closure)
    return parameter.detach()


def _adam(problem: _Problem, alpha_N: Tensor, iterations: int, learning_rate: float) -> Tensor:
    parameter = torch.nn.Parameter(alpha_N)
    optimizer = torch.optim.Adam([parameter], lr=learning_rate)
    for _ in range(iterations):
        parameter.grad = -problem.evaluate(parameter.detach())[1]
        optimizer.step()
    return parameter.detach()


def _newton(problem: _Problem, alpha_N: Tensor, iterations: int, learning_rate: float) -> Tensor:
    value, gradient_N, columns = problem.evaluate(alpha_N)
    eye_NN = torch.eye(alpha_N.numel(), dtype=alpha_N.dtype, device=alpha_N.device)
    for _step in range(iterations):
        if float(gradient_N.abs().max()) <= _NEWTON_TOLERANCE * problem.row_mass:
            break
        curvature_NN = problem.curvature(columns)
        # The system is singular along (1, ..., 1), and where supports do not overlap.
        damping = 1e-6 * float(curvature_NN.diagonal().mean()) + 1e-12
        step_N = torch.linalg.solve(curvature_NN + damping * eye_NN, gradient_N)
        slope = float(gradient_N @ step_N)
        length = 1.0
        for _halving in range(25):
            trial = problem.evaluate(alpha_N + length * step_N)
            rounding = 16 * torch.finfo(alpha_N.dtype).eps * (abs(float(value)) + problem.row_mass)
            if float(trial[0] - value) >= 1e-4 * length * slope - rounding or float(trial[1].abs().max()) == 0:
                break
            length /= 2
        else:
            # A kink: no step along this direction rises. One column more or less is as near as the marginals get where
            # its best k change; from farther off, where columns hardly curve, other directions are left to try.
            if float(gradient_N.abs().max()) <= problem.column_mass:
                return alpha_N
            return _lbfgs(problem, alpha_N, iterations, learning_rate)
        alpha_N = alpha_N + length * step_N
        value, gradient_N, columns = trial
    return alpha_N


_SOLVERS: dict[str, Callable[[_Problem, Tensor, int, float], Tensor]] = {
    "lbfgs": _lbfgs,
    "adam": _adam,
    "newton": _newton,
}


def solve_dual(
    score_BN: Tensor, k: int, gamma: float, *, row_mass: float, column_mass: float, iterations: int = 100
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The full dual: neither marginal holds exactly, but no column exceeds k non-zeros (same paper, section 3.3).

        max over alpha, beta: a sum alpha + b sum beta - 1/(2 gamma) sum_j (k largest of [alpha + beta_j + s_j]_+)^2

    Returns:
        alpha (N,), beta (B,), the plan (B, N) and the dual's value.
    """
    score_BN = score_BN.detach()
    columns, rows = score_BN.shape
    both = torch.nn.Parameter(torch.zeros(rows + columns, dtype=score_BN.dtype, device=score_BN.device))
    optimizer = torch.optim.LBFGS(
        [both], max_iter=iterations, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    k = min(k, rows)

    def plan_and_value() -> tuple[Tensor, Tensor]:
        alpha_N, beta_B = both.detach().split([rows, columns])
        room_BN = (score_BN + alpha_N + beta_B.unsqueeze(1)).clamp_min(0)
        index_BK = project_sparse_simplex(room_BN, k).index_BK
        kept_BN = torch.zeros_like(room_BN).scatter_(1, index_BK, room_BN.gather(1, index_BK))
        value = row_mass * alpha_N.sum() + column_mass * beta_B.sum() - kept_BN.square().sum() / (2 * gamma)
        return kept_BN / gamma, value

    def closure() -> float:
        plan_BN, value = plan_and_value()
        both.grad = -torch.cat([row_mass - plan_BN.sum(0), column_mass - plan_BN.sum(1)])
        return -float(value)

    with torch.no_grad():
        optimizer.step(closure)
        plan_BN, value = plan_and_value()
    alpha_N, beta_B = both.detach().split([rows, columns])
    return alpha_N, beta_B, plan_BN, float(value)


__all__ = ["SemiDual", "Solver", "project_simplex_sorted", "solve_dual", "solve_semi_dual"]
