"""Entropic transport: log-domain Sinkhorn and Newton on the Schur complement, against POT and what theory says.

Shape suffixes: T rows, E columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gates.solvers.entropic import EntropicPlan, dual_objective, schur_newton, sinkhorn_log

pytestmark = pytest.mark.unit
Solver = Callable[..., EntropicPlan]
BOTH = pytest.mark.parametrize("solve", [sinkhorn_log, schur_newton])
T, E = 24, 6


def problem(seed: int = 0, rows: int = T, columns: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (T, E) and uneven marginals of mass 3, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    row_T = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.2
    column_E = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.2
    return score_TE, 3 * row_T / row_T.sum(), 3 * column_E / column_E.sum()


class TestAgainstPot:
    @BOTH
    @pytest.mark.parametrize("eta", [0.5, 5.0, 10.0])
    def test_plan_of_sinkhorn_log(self, solve: Solver, eta: float) -> None:
        ot = pytest.importorskip("ot")
        score_TE, row_T, column_E = problem()
        plan = solve(score_TE, eta, row_T, column_E, max_iterations=20_000, tolerance=1e-12)
        theirs = ot.sinkhorn(
            (row_T / 3).numpy(),
            (column_E / 3).numpy(),
            -score_TE.numpy(),
            1 / eta,
            method="sinkhorn_log",
            numItermax=20_000,
            stopThr=1e-13,
        )
        np.testing.assert_allclose(plan.log_plan_TE.exp().numpy(), 3 * theirs, atol=1e-9)

    @BOTH
    def test_a_vertex_at_high_eta(self, solve: Solver) -> None:
        """The unregularised optimum is worth at least the entropic plan, which trails by at most mass log(TE) / eta."""
        ot = pytest.importorskip("ot")
        eta, (score_TE, row_T, column_E) = 400.0, problem(1)
        plan = solve(score_TE, eta, row_T, column_E, max_iterations=20_000, tolerance=1e-8)
        best = -ot.emd2(row_T.numpy(), column_E.numpy(), -score_TE.numpy())
        value = float((plan.log_plan_TE.exp() * score_TE).sum())
        assert best - 3 * np.log(T * E) / eta <= value <= best + 1e-6


class TestProperties:
    @BOTH
    @pytest.mark.parametrize("shape", [(24, 6), (6, 24), (9, 9), (1, 5), (5, 1), (1, 1)])
    def test_marginals(self, solve: Solver, shape: tuple[int, int]) -> None:
        score_TE, row_T, column_E = problem(2, *shape)
        plan = solve(score_TE, 5.0, row_T, column_E, tolerance=1e-10)
        plan_TE = plan.log_plan_TE.exp()
        torch.testing.assert_close(plan_TE.sum(1), row_T, atol=3e-10, rtol=0)
        torch.testing.assert_close(plan_TE.sum(0), column_E, atol=3e-10, rtol=0)
        assert plan.marginal_error < 1.1e-10

    @BOTH
    def test_default_marginals_are_uniform(self, solve: Solver) -> None:
        plan_TE = solve(problem()[0], 3.0).log_plan_TE.exp()
        torch.testing.assert_close(plan_TE.sum(1), torch.full((T,), 1 / T, dtype=torch.float64), atol=1e-8, rtol=0)
        torch.testing.assert_close(plan_TE.sum(0), torch.full((E,), 1 / E, dtype=torch.float64), atol=1e-8, rtol=0)

    @BOTH
    def test_plan_follows_from_potentials(self, solve: Solver) -> None:
        score_TE, row_T, column_E = problem()
        plan = solve(score_TE, 7.0, row_T, column_E)
        x_T, y_E = plan.row_potential_T, plan.column_potential_E
        torch.testing.assert_close(plan.log_plan_TE, 7 * (score_TE + x_T[:, None] + y_E))
        assert float(y_E.mean()) == pytest.approx(0, abs=1e-12)
        objective = dual_objective(score_TE, x_T, y_E, 7.0, row_T, column_E)
        assert dual_objective(score_TE, x_T + 4, y_E - 4, 7.0, row_T, column_E) == pytest.approx(objective, abs=1e-9)

    @BOTH
    def test_shifts_of_the_score_go_into_the_potentials(self, solve: Solver) -> None:
        score_TE, row_T, column_E = problem()
        a_T, b_E = problem(5)[0][:, 0], problem(6)[0][0]
        plan = solve(score_TE, 5.0, row_T, column_E, tolerance=1e-12)
        moved = solve(score_TE + a_T[:, None] + b_E, 5.0, row_T, column_E, tolerance=1e-12)
        torch.testing.assert_close(moved.log_plan_TE, plan.log_plan_TE, atol=1e-8, rtol=0)
        y_E = plan.column_potential_E - b_E
        torch.testing.assert_close(moved.column_potential_E, y_E - y_E.mean(), atol=1e-9, rtol=0)

    @BOTH
    def test_dual_never_falls(self, solve: Solver) -> None:
        score_TE, row_T, column_E = problem()
        values = []
        for cap in range(1, 15):
            plan = solve(score_TE, 20.0, row_T, column_E, max_iterations=cap, tolerance=0)
            args = (plan.row_potential_T, plan.column_potential_E, 20.0, row_T, column_E)
            values.append(dual_objective(score_TE, *args))
        assert (np.diff(values) > -1e-12).all()
        assert values[-1] > values[0]

    def test_constant_scores_give_the_independent_plan(self) -> None:
        _, row_T, column_E = problem()
        plan = schur_newton(torch.full((T, E), 2.0, dtype=torch.float64), 50.0, row_T, column_E)
        torch.testing.assert_close(plan.log_plan_TE.exp(), row_T[:, None] * column_E / 3)

    def test_a_good_start_is_used(self) -> None:
        score_TE, row_T, column_E = problem()
        cold = sinkhorn_log(score_TE, 20.0, row_T, column_E, max_iterations=5000)
        warm = sinkhorn_log(score_TE, 20.0, row_T, column_E, start_E=cold.column_potential_E)
        assert warm.iterations <= 2 < cold.iterations


class TestNewton:
    @pytest.mark.parametrize("eta", [1.0, 10.0, 100.0])
    def test_few_steps_for_a_routing_problem(self, eta: float) -> None:
        score_TE = torch.randn(512, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        plan = schur_newton(score_TE, eta, tolerance=1e-12)
        assert plan.marginal_error < 1.1e-12
        assert plan.iterations <= 20  # 5 of them Sinkhorn's; 9, 9 and 15 seen

    def test_no_warmup_from_a_wild_start(self) -> None:
        score_TE, row_T, column_E = problem()
        start_E = torch.linspace(-30, 30, E, dtype=torch.float64)
        plan = schur_newton(score_TE, 10.0, row_T, column_E, warmup=0, start_E=start_E)
        assert plan.marginal_error < 1e-9

    def test_nearly_disconnected_columns(self) -> None:
        """Rows that all but refuse to share: the Laplacian's entries are some e^-200."""
        score_TE = -torch.rand(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        plan = schur_newton(score_TE, 3000.0)
        assert plan.marginal_error < 1e-9
        optimize = pytest.importorskip("scipy.optimize")
        _, best_T = optimize.linear_sum_assignment(-score_TE.numpy())
        np.testing.assert_array_equal(plan.log_plan_TE.argmax(1).numpy(), best_T)

    def test_fp32_stops_at_what_it_can_resolve(self) -> None:
        score_TE, row_T, column_E = (x.float() for x in problem())
        plan = schur_newton(score_TE, 5.0, row_T, column_E)
        assert plan.log_plan_TE.dtype == torch.float32
        assert plan.iterations < 20
        assert plan.marginal_error < 1e-5


class TestInputs:
    @BOTH
    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
    def test_empty(self, solve: Solver, shape: tuple[int, int]) -> None:
        plan = solve(torch.zeros(shape), 1.0)
        assert plan.log_plan_TE.shape == shape
        assert plan.marginal_error == 0
        assert plan.iterations == 0

    @BOTH
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, solve: Solver, bad: float) -> None:
        score_TE, row_T, column_E = problem()
        score_TE[3, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            solve(score_TE, 1.0, row_T, column_E)
        with pytest.raises(ValueError, match="finite"):
            solve(problem()[0], 1.0, row_T, torch.full((E,), bad))
        with pytest.raises(ValueError, match="finite"):
            solve(problem()[0], 1.0, start_E=torch.full((E,), bad))

    def test_impossible_marginals(self) -> None:
        score_TE, row_T, column_E = problem()
        with pytest.raises(ValueError, match="mass"):
            sinkhorn_log(score_TE, 1.0, row_T, 2 * column_E)
        with pytest.raises(ValueError, match="positive"):
            sinkhorn_log(score_TE, 1.0, row_T, torch.tensor([3.0, 0, 0, 0, 0, 0]))
        with pytest.raises(ValueError, match="marginals"):
            sinkhorn_log(score_TE, 1.0, column_E, row_T)
        with pytest.raises(ValueError, match="mass"):
            sinkhorn_log(torch.zeros(0, E), 1.0, None, column_E)

    @pytest.mark.parametrize("eta", [0.0, -1.0, float("nan"), float("inf")])
    def test_eta(self, eta: float) -> None:
        with pytest.raises(ValueError, match="eta"):
            sinkhorn_log(problem()[0], eta)

    @BOTH
    def test_cap(self, solve: Solver) -> None:
        score_TE, row_T, column_E = problem()
        extra = {"warmup": 0} if solve is schur_newton else {}
        assert solve(score_TE, 100.0, row_T, column_E, max_iterations=2, tolerance=0, **extra).iterations == 2
