"""Sinkhorn-Newton-Sparse, against POT, scipy's assignment, a dense Hessian and the other entropic solvers.

Shape suffixes: T rows, E columns, V = T + E.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gates.solvers.entropic import dual_objective, schur_newton
from gates.solvers.sns import conjugate_gradients, exact_step, sinkhorn_newton_sparse, sparsify

pytestmark = pytest.mark.unit


def problem(seed: int = 0, rows: int = 30, columns: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (T, E) in [-1, 0] and uneven marginals of mass 2, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    score_TE = -torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    row_T = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.2
    column_E = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.2
    return score_TE, 2 * row_T / row_T.sum(), 2 * column_E / column_E.sum()


class TestAgainstOthers:
    @pytest.mark.parametrize("eta", [5.0, 60.0])
    def test_plan_of_pot(self, eta: float) -> None:
        ot = pytest.importorskip("ot")
        score_TE, row_T, column_E = problem()
        plan = sinkhorn_newton_sparse(score_TE, eta, row_T, column_E, sinkhorn_iterations=5)
        theirs = ot.sinkhorn(
            (row_T / 2).numpy(),
            (column_E / 2).numpy(),
            -score_TE.numpy(),
            1 / eta,
            method="sinkhorn_log",
            numItermax=50_000,
            stopThr=1e-13,
        )
        assert plan.newton_steps > 0
        np.testing.assert_allclose(plan.log_plan_TE.exp().numpy(), 2 * theirs, atol=1e-8)

    def test_vertex_of_emd(self) -> None:
        ot = pytest.importorskip("ot")
        eta, (score_TE, row_T, column_E) = 2000.0, problem(1)
        plan = sinkhorn_newton_sparse(score_TE, eta, row_T, column_E)
        assert plan.marginal_error < 1e-9
        vertex = ot.emd(row_T.numpy(), column_E.numpy(), -score_TE.numpy())
        assert np.abs(plan.log_plan_TE.exp().numpy() - vertex).sum() < 0.05

    @pytest.mark.parametrize("seed", range(3))
    def test_assignment(self, seed: int) -> None:
        """Where the plan is all but a permutation, it is the best one; elsewhere it is worth almost as much."""
        optimize = pytest.importorskip("scipy.optimize")
        eta, size, score_TE = 1200.0, 40, problem(seed, 40, 40)[0]
        plan = sinkhorn_newton_sparse(score_TE, eta)
        assert plan.marginal_error < 1.1e-10
        plan_TE = size * plan.log_plan_TE.exp()
        _, best_T = optimize.linear_sum_assignment(-score_TE.numpy())
        best = float(score_TE[torch.arange(size), torch.from_numpy(best_T)].sum())
        assert best - size * np.log(size) / eta <= float((plan_TE * score_TE).sum()) <= best + 1e-8
        clear_T = (plan_TE.amax(1) > 0.95).numpy()
        assert clear_T.mean() > 0.3
        np.testing.assert_array_equal(plan_TE.argmax(1).numpy()[clear_T], best_T[clear_T])

    @pytest.mark.parametrize("density", [None, 0.1, 1.0])
    def test_potentials_of_schur_newton(self, density: float | None) -> None:
        score_TE, row_T, column_E = problem(2)
        ours = sinkhorn_newton_sparse(score_TE, 100.0, row_T, column_E, density=density)
        theirs = schur_newton(score_TE, 100.0, row_T, column_E, tolerance=1e-12)
        torch.testing.assert_close(ours.row_potential_T, theirs.row_potential_T, atol=1e-7, rtol=0)
        torch.testing.assert_close(ours.column_potential_E, theirs.column_potential_E, atol=1e-7, rtol=0)

    def test_a_plan_that_all_but_falls_into_blocks(self) -> None:
        """Conjugate gradients gave up at every step here: all 126 of them, and of others the last was not enough."""
        score_TE = problem(3, 100, 100)[0]
        ours = sinkhorn_newton_sparse(score_TE, 1200.0)
        assert ours.marginal_error < 1.1e-10
        assert ours.cg_iterations >= 1000  # else it is no such problem any more
        assert ours.newton_steps < 60
        theirs = schur_newton(score_TE, 1200.0, tolerance=1e-12)
        torch.testing.assert_close(ours.log_plan_TE.exp(), theirs.log_plan_TE.exp(), atol=1e-10, rtol=0)


class TestProperties:
    @pytest.mark.parametrize("shape", [(30, 20), (8, 40), (1, 4), (4, 1), (1, 1)])
    def test_marginals(self, shape: tuple[int, int]) -> None:
        score_TE, row_T, column_E = problem(3, *shape)
        plan = sinkhorn_newton_sparse(score_TE, 80.0, row_T, column_E, sinkhorn_iterations=3)
        plan_TE = plan.log_plan_TE.exp()
        torch.testing.assert_close(plan_TE.sum(1), row_T, atol=3e-10, rtol=0)
        torch.testing.assert_close(plan_TE.sum(0), column_E, atol=3e-10, rtol=0)

    @pytest.mark.parametrize("sinkhorn_iterations", [1, 5])
    def test_dual_never_falls(self, sinkhorn_iterations: int) -> None:
        score_TE, row_T, column_E = problem(4)
        values = []
        for cap in range(15):
            plan = sinkhorn_newton_sparse(
                score_TE,
                200.0,
                row_T,
                column_E,
                sinkhorn_iterations=sinkhorn_iterations,
                max_newton_steps=cap,
                tolerance=0,
                density=0.1,
            )
            args = (plan.row_potential_T, plan.column_potential_E, 200.0, row_T, column_E)
            values.append(dual_objective(score_TE, *args))
        assert (np.diff(values) > -1e-12).all()
        assert values[-1] > values[0]

    def test_shifts_of_the_score_go_into_the_potentials(self) -> None:
        score_TE, row_T, column_E = problem()
        a_T, b_E = problem(5)[0][:, 0], problem(6)[0][0]
        plan = sinkhorn_newton_sparse(score_TE, 50.0, row_T, column_E)
        moved = sinkhorn_newton_sparse(score_TE + a_T[:, None] + b_E, 50.0, row_T, column_E)
        torch.testing.assert_close(moved.log_plan_TE.exp(), plan.log_plan_TE.exp(), atol=1e-8, rtol=0)
        y_E = plan.column_potential_E - b_E
        torch.testing.assert_close(moved.column_potential_E, y_E - y_E.mean(), atol=1e-7, rtol=0)

    def test_no_newton_where_sinkhorn_is_enough(self) -> None:
        plan = sinkhorn_newton_sparse(problem()[0], 1.0)
        assert (plan.newton_steps, plan.cg_iterations) == (0, 0)
        assert plan.marginal_error < 1e-10


class TestSystem:
    def test_diagonals_are_sums_of_the_whole_plan(self) -> None:
        plan_TE = problem()[0].neg()
        sums_V = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
        dense_VV = sparsify(plan_TE, sums_V, keep=70).matrix_VV.to_dense()
        torch.testing.assert_close(dense_VV.diagonal(), sums_V)
        kept_TE = dense_VV[:30, 30:]
        torch.testing.assert_close(kept_TE, plan_TE * (plan_TE >= plan_TE.flatten().topk(70).values[-1]))
        torch.testing.assert_close(dense_VV, dense_VV.t())
        assert float(torch.linalg.eigvalsh(dense_VV)[0]) > 0  # entries are missing: no more singular

    def test_unsparsified_it_is_the_hessian(self) -> None:
        score_TE, row_T, column_E = problem(7, 5, 4)
        z_V = 0.1 * torch.arange(9, dtype=torch.float64)

        def objective(z_V: Tensor) -> Tensor:
            return row_T @ z_V[:5] + column_E @ z_V[5:] - (score_TE + z_V[:5, None] + z_V[5:]).exp().sum()

        plan_TE = (score_TE + z_V[:5, None] + z_V[5:]).exp()
        ours_VV = sparsify(plan_TE, torch.cat([plan_TE.sum(1), plan_TE.sum(0)]), keep=20).matrix_VV.to_dense()
        torch.testing.assert_close(ours_VV, -torch.autograd.functional.hessian(objective, z_V))

    def test_exact_steps_solve_the_whole_hessian(self) -> None:
        plan_TE = problem()[0].neg()
        sums_V = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
        hessian_VV = sparsify(plan_TE, sums_V, keep=plan_TE.numel()).matrix_VV
        right_V = torch.mv(hessian_VV, torch.linspace(-1, 1, 50, dtype=torch.float64))
        step_V = exact_step(plan_TE, sums_V, right_V, share=0.0)
        torch.testing.assert_close(torch.mv(hessian_VV, step_V), right_V)

    def test_conjugate_gradients(self) -> None:
        plan_TE = problem()[0].neg()
        sums_V = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
        right_V = torch.linspace(-1, 1, 50, dtype=torch.float64)
        system = sparsify(plan_TE, sums_V, keep=200)
        x_V, iterations = conjugate_gradients(system, right_V, tolerance=1e-12, max_iterations=100)
        torch.testing.assert_close(x_V, torch.linalg.solve(system.matrix_VV.to_dense(), right_V))
        assert iterations < 100

    def test_conjugate_gradients_of_a_singular_system(self) -> None:
        """All entries kept: the kernel is (1, -1), and a right side without a part in it has solutions."""
        plan_TE = problem()[0].neg()
        sums_V = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
        system = sparsify(plan_TE, sums_V, keep=plan_TE.numel())
        right_V = torch.mv(system.matrix_VV, torch.linspace(-1, 1, 50, dtype=torch.float64))
        x_V, _ = conjugate_gradients(system, right_V, tolerance=1e-12, max_iterations=100)
        torch.testing.assert_close(torch.mv(system.matrix_VV, x_V), right_V, atol=1e-10, rtol=0)


class TestInputs:
    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
    def test_empty(self, shape: tuple[int, int]) -> None:
        plan = sinkhorn_newton_sparse(torch.zeros(shape), 1.0)
        assert plan.log_plan_TE.shape == shape
        assert plan.iterations == 0

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad: float) -> None:
        score_TE, row_T, column_E = problem()
        row_T[0] = bad
        with pytest.raises(ValueError, match="finite"):
            sinkhorn_newton_sparse(score_TE, 1.0, row_T, column_E)
        score_TE[0, 0] = bad
        with pytest.raises(ValueError, match="finite"):
            sinkhorn_newton_sparse(score_TE, 1.0)

    @pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
    def test_density(self, density: float) -> None:
        with pytest.raises(ValueError, match="density"):
            sinkhorn_newton_sparse(problem()[0], 1.0, density=density)

    def test_no_sinkhorn_iteration(self) -> None:
        with pytest.raises(ValueError, match="sinkhorn_iterations"):
            sinkhorn_newton_sparse(problem()[0], 1.0, sinkhorn_iterations=0)

    def test_scores_whose_exponential_overflows(self) -> None:
        score_TE = problem()[0] + 3
        plan = sinkhorn_newton_sparse(score_TE, 1000.0, sinkhorn_iterations=1)
        assert plan.marginal_error < 1e-9

    def test_fp64_whatever_comes_in(self) -> None:
        plan = sinkhorn_newton_sparse(problem()[0].half(), 300.0)
        assert plan.log_plan_TE.dtype == torch.float64
        assert plan.marginal_error < 1e-10

    def test_caps(self) -> None:
        plan = sinkhorn_newton_sparse(
            problem()[0], 500.0, sinkhorn_iterations=2, max_newton_steps=3, tolerance=0, max_cg_iterations=4
        )
        assert plan.newton_steps == 3
        assert plan.iterations == 5
        assert plan.cg_iterations <= 12
