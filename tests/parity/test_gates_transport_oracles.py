"""Transport solvers and the gates on them against POT, scipy's assignment, and what is measured of the paper's router.

Shape suffixes: T tokens, E experts, B columns of a semi-dual, N entries of its potential.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gates import GateInput, Mode, RoutingPlan
from gates.linear import LinearGate
from gates.metrics import agreement, max_vio
from gates.potentials import PotentialGate
from gates.solvers.assignment import balanced_assignment
from gates.solvers.plan_gradient import row_weights, transport_weights
from gates.solvers.sparse_ot import SemiDual, solve_dual, solve_semi_dual
from gates.solvers.sparse_simplex import project_sparse_simplex
from tests.routing_oracles import Array, draw, make_gate, train_on, visits

pytestmark = pytest.mark.unit


def quiet(function: Any, *args: Any, **options: Any) -> Any:
    """POT 0.9.7 prints shapes."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **options)


def surrogate_of(gate: LinearGate) -> LinearGate:
    surrogate = gate.causal_surrogate()
    assert isinstance(surrogate, LinearGate)
    return surrogate


def best_assignment(score: Array, capacity: NDArray[np.int64]) -> NDArray[np.int64]:
    """Expert of each token: scipy's assignment to columns that stand as often as their capacity."""
    optimize = pytest.importorskip("scipy.optimize")
    expert_of_column = np.repeat(np.arange(len(capacity)), capacity)
    rows, columns = optimize.linear_sum_assignment(score[:, expert_of_column], maximize=True)
    found: NDArray[np.int64] = expert_of_column[columns][np.argsort(rows)]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The projection


@pytest.mark.parametrize("k", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sparse_simplex_projection(k: int, scale: float) -> None:
    ot = pytest.importorskip("ot")
    value = draw(40, 12, seed=k) * scale
    theirs = quiet(ot.utils.projection_sparse_simplex, value.numpy().copy(), k, 1, axis=1)
    ours = project_sparse_simplex(value, k).dense(12).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert ((ours > 0).sum(1) <= k).all()
    np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-12)


def test_sparse_simplex_projection_is_the_nearest_of_all_supports() -> None:
    """Brute force: the projection onto each face of at most 2 of 5 entries."""
    value = draw(20, 5).numpy()
    ours = project_sparse_simplex(torch.from_numpy(value), 2).dense(5).numpy()
    for row, found in zip(value, ours, strict=True):
        nearest = np.inf
        for i in range(5):
            for j in range(5):
                p_i = min(1.0, max(0.0, 0.5 + (row[i] - row[j]) / 2)) if i != j else 1.0
                candidate = np.zeros(5)
                candidate[i] += p_i
                candidate[j] += 1 - p_i
                nearest = min(nearest, float(((candidate - row) ** 2).sum()))
        assert ((found - row) ** 2).sum() == pytest.approx(nearest, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Solvers. Raw plans are comparable for small gamma only: at gamma = 1 the semi-dual has kinks at its maximum.


def pot_semi_dual(score_BN: Tensor, gamma: float, row_mass: float, column_mass: float, k: int | None) -> Any:
    """Plan (N, B) and value of POT's semi-dual; k None: without a limit."""
    smooth = pytest.importorskip("ot.smooth")
    columns, rows = score_BN.shape
    kind = {"reg_type": "l2"} if k is None else {"reg_type": "sparsity_constrained", "max_nz": k}
    a, b = np.full(rows, row_mass), np.full(columns, column_mass)
    plan, log = quiet(smooth.smooth_ot_semi_dual, a, b, -score_BN.numpy().T, gamma, stopThr=1e-13, log=True, **kind)
    return plan, -float(log["res"]["fun"])


def solve(score_BN: Tensor, k: int, gamma: float, **options: Any) -> tuple[SemiDual, Array]:
    """With plan (N, B); columns have mass 1."""
    columns, rows = score_BN.shape
    options = {"row_mass": columns / rows, "column_mass": 1.0, "iterations": 200, **options}
    solved = solve_semi_dual(score_BN, k, gamma, **options)
    return solved, solved.columns.dense(rows).numpy().T * options["column_mass"]


@pytest.mark.parametrize("solver", ["lbfgs", "newton"])
@pytest.mark.parametrize("gamma", [0.01, 0.1])
@pytest.mark.parametrize("k", [2, 4])
def test_semi_dual_of_pot(k: int, gamma: float, solver: str) -> None:
    """Columns are 128 tokens, rows 8 experts."""
    score_BN = draw(128, 8).softmax(-1)
    theirs, value = pot_semi_dual(score_BN, gamma, 16.0, 1.0, k)
    solved, plan = solve(score_BN, k, gamma, solver=solver)
    assert solved.objective == pytest.approx(value, rel=1e-6)
    both, either = ((plan > 1e-9) & (theirs > 1e-9)).sum(), ((plan > 1e-9) | (theirs > 1e-9)).sum()
    assert both / either > 0.98
    np.testing.assert_allclose(plan.sum(0), 1, rtol=1e-12)
    assert solved.violation == pytest.approx(np.abs(plan.sum(1) - 16).max() / 16, abs=1e-12)


@pytest.mark.parametrize("capacity", [16, 20, 32])
def test_semi_dual_of_pot_by_experts(capacity: int) -> None:
    """Columns are 8 experts of mass 16, rows 128 tokens."""
    score_BN = draw(128, 8).softmax(-1).t().contiguous()
    theirs, value = pot_semi_dual(score_BN, 0.1, 1.0, 16.0, capacity)
    solved, plan = solve(score_BN, capacity, 0.1, row_mass=1.0, column_mass=16.0, iterations=500)
    assert solved.objective == pytest.approx(value, rel=1e-4)
    both, either = ((plan > 1e-9) & (theirs > 1e-9)).sum(), ((plan > 1e-9) | (theirs > 1e-9)).sum()
    assert both / either > 0.9
    assert ((plan > 0).sum(0) <= capacity).all()


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_no_limit_is_quadratic_transport(gamma: float) -> None:
    """Smooth, so that plans agree at any gamma; and the primal's value is the dual's."""
    score_BN = draw(128, 8).softmax(-1)
    theirs, value = pot_semi_dual(score_BN, gamma, 16.0, 1.0, None)
    solved, plan = solve(score_BN, 8, gamma)
    assert solved.objective == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(plan, theirs, atol=2e-5)
    np.testing.assert_allclose(plan.sum(1), 16, rtol=1e-5)
    primal = (plan * score_BN.numpy().T).sum() - gamma / 2 * (plan**2).sum()
    assert solved.objective == pytest.approx(-primal, rel=1e-5)  # the dual minimises cost


def test_small_gamma_is_the_linear_programme() -> None:
    """All columns at a vertex, whose |p|^2 is 1."""
    score_BN = draw(96, 6).softmax(-1)
    expert_T = best_assignment(score_BN.numpy(), np.full(6, 16))
    best = score_BN.numpy()[np.arange(96), expert_T].sum()
    for k in (1, 2, 6):
        solved, plan = solve(score_BN, k, 1e-3)
        assert solved.objective == pytest.approx(0.5e-3 * 96 - best, rel=1e-9)
        assert plan.argmax(0).tolist() == expert_T.tolist()
        np.testing.assert_allclose(plan.max(0), 1, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("gamma", [0.01, 0.1])
def test_dual_of_pot(k: int, gamma: float) -> None:
    smooth = pytest.importorskip("ot.smooth")
    score_BN = draw(64, 8, seed=3).softmax(-1)
    a, b = np.full(8, 8.0), np.ones(64)
    options = {"reg_type": "sparsity_constrained", "max_nz": k, "stopThr": 1e-13, "numItermax": 2000, "log": True}
    theirs, log = quiet(smooth.smooth_ot_dual, a, b, -score_BN.numpy().T, gamma, **options)
    alpha_N, beta_B, plan_BN, value = solve_dual(score_BN, k, gamma, row_mass=8.0, column_mass=1.0, iterations=2000)
    assert ((plan_BN > 0).sum(1) <= k).all()
    room = np.maximum(score_BN.numpy() + alpha_N.numpy() + beta_B.numpy()[:, None], 0)
    top = np.sort(room, 1)[:, -k:]
    by_hand = 8 * alpha_N.numpy().sum() + beta_B.numpy().sum() - (top**2).sum() / (2 * gamma)
    assert value == pytest.approx(by_hand, rel=1e-9)
    pot_room = np.maximum(score_BN.numpy() + log["alpha"] + log["beta"][:, None], 0)
    pot_value = 8 * log["alpha"].sum() + log["beta"].sum() - (np.sort(pot_room, 1)[:, -k:] ** 2).sum() / (2 * gamma)
    assert value == pytest.approx(pot_value, rel=1e-5)
    if k > 1 and gamma == 0.01:
        np.testing.assert_allclose(plan_BN.numpy(), theirs.T, atol=0.02)


def test_dual_without_limit_is_quadratic_transport() -> None:
    score_BN = draw(64, 8, seed=3).softmax(-1)
    theirs, value = pot_semi_dual(score_BN, 0.1, 8.0, 1.0, None)
    _, _, plan_BN, ours = solve_dual(score_BN, 8, 0.1, row_mass=8.0, column_mass=1.0, iterations=2000)
    assert ours == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(plan_BN.numpy(), theirs.T, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Assignment: sparse_ot with k = 1, and base


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 8), (96, 6), (512, 16), (5, 8), (1, 3)])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_balanced_assignment(num_tokens: int, num_experts: int, spread: float) -> None:
    rng = np.random.default_rng(num_tokens)
    score = rng.normal(size=(num_tokens, num_experts)) + spread * rng.normal(size=num_experts)
    capacity = rng.multinomial(num_tokens, np.full(num_experts, 1 / num_experts))
    found = balanced_assignment(torch.from_numpy(score), torch.from_numpy(capacity))
    assert found.expert_T.tolist() == best_assignment(score, capacity).tolist()
    assert np.bincount(found.expert_T.numpy(), minlength=num_experts).tolist() == capacity.tolist()
    assert (score + found.bonus_E.numpy()).argmax(1).tolist() == found.expert_T.tolist()


def test_sparse_ot_of_one_expert_is_the_assignment() -> None:
    for seed, (num_tokens, num_experts) in enumerate([(128, 8), (96, 6), (256, 16)]):
        gate = make_gate(num_experts, name="sparse_ot", k=1)
        logits_TE = draw(num_tokens, num_experts, seed=seed) + draw(num_experts, seed=9)
        plan = gate(GateInput(logits_TE)).plan
        assert plan.load_E.tolist() == [num_tokens // num_experts] * num_experts
        score = logits_TE.softmax(-1).numpy()
        expected = best_assignment(score, np.full(num_experts, num_tokens // num_experts))
        assert plan.expert_N.tolist() == expected.tolist()
        np.testing.assert_allclose(plan.weight_N.detach(), score[np.arange(num_tokens), expected], rtol=1e-12)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 8), (67, 8), (100, 6), (3, 5), (1, 4)])
def test_base(num_tokens: int, num_experts: int) -> None:
    gate = make_gate(num_experts, name="base")
    logits_TE = draw(num_tokens, num_experts, seed=num_tokens) + draw(num_experts, seed=9)
    score = logits_TE.numpy()
    capacity = np.full(num_experts, num_tokens // num_experts)
    capacity[np.argsort(-score.mean(0))[: num_tokens % num_experts]] += 1
    expected = best_assignment(score, capacity)
    plan = gate(GateInput(logits_TE, mode=Mode.TRAIN)).plan
    assert plan.expert_N.tolist() == expected.tolist()
    assert plan.load_E.tolist() == capacity.tolist()
    weight = 1 / (1 + np.exp(-score[np.arange(num_tokens), expected]))
    np.testing.assert_allclose(plan.weight_N.detach(), weight, rtol=1e-12)
    assert plan.residual_T is not None
    np.testing.assert_allclose(plan.residual_T.detach(), 1 - weight, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# What serves single tokens


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sparse_ot", "k": 1},
        {"name": "sparse_ot", "k": 2, "gamma": 0.1},
        {"name": "sparse_ot", "k": 2, "gamma": 0.1, "solver": "newton"},
        {"name": "sparse_ot", "k": 4, "gamma": 0.5, "similarity": "logits"},
        {"name": "base"},
        {"name": "sinkhorn"},
        {"name": "sinkhorn", "k": 2},
    ],
)
def test_frozen_potential_reproduces_the_plan_that_it_came_from(options: dict[str, Any]) -> None:
    gate = make_gate(8, **options)
    logits_TE = draw(128, 8, seed=5) + 0.5 * draw(8, seed=6)
    batch = train_on(gate, logits_TE).plan
    surrogate = surrogate_of(gate)
    together = surrogate(GateInput(logits_TE, mode=Mode.EVAL)).plan
    np.testing.assert_array_equal(visits(together), visits(batch))
    for t in range(0, 128, 9):
        alone = surrogate(GateInput(logits_TE[t : t + 1], mode=Mode.DECODE)).plan
        np.testing.assert_array_equal(visits(alone), visits(batch)[t : t + 1])


def test_potential_is_the_running_mean_without_the_zeros_that_it_starts_from() -> None:
    gate = make_gate(6, name="base", potential_decay=0.9)
    assert isinstance(gate, PotentialGate)
    mean, weights = np.zeros(6), 0.0
    for step in range(5):
        num_tokens = 60
        logits_TE = draw(num_tokens, 6, seed=step) + torch.arange(6) / 3
        out = train_on(gate, logits_TE)
        bonus_E = balanced_assignment(logits_TE, torch.full((6,), num_tokens // 6)).bonus_E.numpy()
        assert out.signals["tokens"].item() == num_tokens
        mean, weights = 0.9 * mean + 0.1 * bonus_E, 0.9 * weights + 0.1
        np.testing.assert_allclose(gate.potential.numpy(), mean / weights, rtol=1e-5, atol=1e-6)


def skewed_stream(num_tokens: int, num_experts: int, batches: int) -> list[Tensor]:
    skew_E = 0.5 * draw(num_experts, seed=100)
    return [draw(num_tokens, num_experts, seed=200 + i) + skew_E for i in range(batches)]


ONE_EXPERT_EACH: list[dict[str, Any]] = [
    {"name": "sparse_ot", "k": 1},
    {"name": "sparse_ot", "orientation": "expert"},
    {"name": "base"},
    {"name": "sinkhorn"},
    {"name": "expert_choice", "capacity_factor": 1.0},
]
MORE_EACH: list[dict[str, Any]] = [
    {"name": "sparse_ot"},
    {"name": "sparse_ot", "k": 4},
    {"name": "sparse_ot", "orientation": "expert", "capacity_factor": 2.0},
    {"name": "sinkhorn", "k": 2},
    {"name": "expert_choice"},
    {"name": "feature_choice"},
    {"name": "mutual_choice"},
    {"name": "mutual_choice", "load_cap": 1.0},
]


@pytest.mark.parametrize("options", [*ONE_EXPERT_EACH, *MORE_EACH])
def test_one_batch_makes_a_good_surrogate(options: dict[str, Any]) -> None:
    """T=512, E=16: the plan of the next batch by the numbers of the last (gates.md, section 7)."""
    before, after = skewed_stream(512, 16, 2)
    gate = make_gate(16, **options)
    train_on(gate, before)
    wanted = gate(GateInput(after)).plan
    served = surrogate_of(gate)(GateInput(after)).plan
    assert agreement(served, wanted).item() >= 0.65
    top_1_vio = float(torch.bincount(after.argmax(-1), minlength=16).max()) / 32 - 1
    assert top_1_vio > 1, "the stream is not skewed"
    if options in ONE_EXPERT_EACH:
        assert max_vio(served.load_E).item() < top_1_vio / 2


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25, 2.0])
def test_thresholds_of_experts_repeat_most_of_their_own_plan(capacity_factor: float) -> None:
    """orientation=expert: every token is covered, as many pairs as the plan has, and at factor 1 nearly its own."""
    (logits_TE,) = skewed_stream(512, 16, 1)
    gate = make_gate(16, name="sparse_ot", orientation="expert", capacity_factor=capacity_factor)
    plan = train_on(gate, logits_TE).plan
    again = surrogate_of(gate)(GateInput(logits_TE)).plan
    assert again.row_ptr_T1.diff().min() >= 1
    assert again.num_pairs == pytest.approx(plan.num_pairs, rel=0.01)
    assert agreement(again, plan).item() >= (0.95 if capacity_factor == 1 else 0.65)


# ----------------------------------------------------------------------------------------------------------------------
# Coverage, entropic routing, weights that are the plan


def test_transport_covers_tokens_that_expert_choice_leaves() -> None:
    """R5: T=128, E=8, capacity factor 1; how many are left depends a little on the draw."""
    options = {"name": "sparse_ot", "orientation": "expert", "capacity_factor": 1.0, "gamma": 1.0}
    uncovered = []
    for seed in range(4):
        logits_TE = draw(128, 8, seed=seed)
        out = make_gate(8, **options)(GateInput(logits_TE))
        uncovered.append(int((out.plan.row_ptr_T1.diff() == 0).sum()))
        assert out.metrics["uncovered_frac"].item() == pytest.approx(uncovered[-1] / 128)
        assert (out.plan.load_E <= 16).all()
        chosen = make_gate(8, name="expert_choice", capacity_factor=1.0)(GateInput(logits_TE)).plan
        assert int((chosen.row_ptr_T1.diff() == 0).sum()) > 10
    assert max(uncovered) <= 3
    assert np.mean(uncovered) <= 2


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sinkhorn(k: int, temperature: float) -> None:
    ot = pytest.importorskip("ot")
    num_tokens, num_experts = 120, 8
    logits_TE = draw(num_tokens, num_experts) + draw(num_experts, seed=9)
    options: dict[str, Any] = {"k": k, "temperature": temperature, "iterations": 1000, "tolerance": 1e-7}
    gate = make_gate(num_experts, name="sinkhorn", **options)
    assert isinstance(gate, PotentialGate)
    a, b = np.full(num_tokens, 1 / num_tokens), np.full(num_experts, 1 / num_experts)
    cost = -logits_TE.numpy()
    plan = ot.sinkhorn(a, b, cost, temperature, method="sinkhorn_log", stopThr=1e-13, numItermax=10000)
    out = train_on(gate, logits_TE)
    expected = np.argsort(-plan, 1)[:, :k]
    assert out.plan.expert_N.view(-1, k).tolist() == expected.tolist()
    scaling = temperature * np.log(plan) + cost  # f_t + g_e
    scaling -= scaling.mean(1, keepdims=True)
    assert np.ptp(scaling, axis=0).max() < 1e-9
    np.testing.assert_allclose(gate.potential.numpy(), scaling[0], atol=2e-6)
    score = logits_TE.numpy()
    weights = 1 / (1 + np.exp(-score)) if k == 1 else np.exp(score) / np.exp(score).sum(1, keepdims=True)
    ours = out.plan.weight_N.detach().view(-1, k).numpy()
    np.testing.assert_allclose(ours, np.take_along_axis(weights, expected, 1), rtol=1e-10)


def solved_plan(score_TE: Tensor, k: int, gamma: float) -> tuple[SemiDual, RoutingPlan]:
    num_tokens, num_experts = score_TE.shape
    solved = solve_semi_dual(
        score_TE, k, gamma, row_mass=num_tokens / num_experts, column_mass=1.0, solver="newton", iterations=200
    )
    dense_TE = solved.columns.dense(num_experts)
    return solved, RoutingPlan.from_mask(dense_TE > 0, dense_TE)


@pytest.mark.parametrize(("k", "gamma"), [(2, 0.01), (3, 0.05), (8, 0.1), (8, 1.0)])
def test_transport_weights_are_the_plan(k: int, gamma: float) -> None:
    score_TE = draw(64, 8, seed=1).softmax(-1)
    solved, plan = solved_plan(score_TE, k, gamma)
    assert solved.violation < 1e-8, "the marginals do not hold"
    ours = transport_weights(score_TE, plan, gamma)
    np.testing.assert_allclose(ours.numpy(), plan.weight_N.numpy(), atol=1e-8)
    by_row = row_weights(score_TE + solved.alpha_N, plan, gamma)
    np.testing.assert_allclose(by_row.numpy(), plan.weight_N.numpy(), atol=1e-9)


def test_gradient_of_transport_weights() -> None:
    """By finite differences of the weights on a fixed support, and of the solver itself."""
    gamma, num_tokens = 0.05, 24
    score_TE = draw(num_tokens, 4, seed=2).softmax(-1)
    solved, plan = solved_plan(score_TE, 3, gamma)
    assert solved.violation < 1e-8
    leaf_TE = score_TE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: transport_weights(s, plan, gamma), (leaf_TE,))
    assert torch.autograd.gradcheck(lambda s: row_weights(s, plan, gamma), (leaf_TE,))
    upstream_TE, direction_TE, eps = draw(num_tokens, 4, seed=3), draw(num_tokens, 4, seed=4), 1e-6
    weights_N = transport_weights(leaf_TE, plan, gamma)
    (grad_TE,) = torch.autograd.grad((weights_N * plan.pick(upstream_TE)).sum(), leaf_TE)
    values = []
    for sign in (1, -1):
        _, moved = solved_plan(score_TE + sign * eps * direction_TE, 3, gamma)
        assert torch.equal(moved.expert_N, plan.expert_N), "the support changed"
        values.append(float((moved.weight_N * moved.pick(upstream_TE)).sum()))
    slope = (values[0] - values[1]) / (2 * eps)
    assert float((grad_TE * direction_TE).sum()) == pytest.approx(slope, rel=1e-4)


def test_weights_of_the_plan_in_the_gate() -> None:
    gate = make_gate(8, name="sparse_ot", k=3, gamma=0.05, weights="plan", solver="newton", iterations=100)
    logits_TE = draw(64, 8, seed=1)
    out = gate(GateInput(logits_TE))
    _, plan = solved_plan(logits_TE.softmax(-1), 3, 0.05)
    np.testing.assert_array_equal(visits(out.plan), visits(plan))
    dense = out.plan.dense_weight_TE().detach().numpy()
    np.testing.assert_allclose(dense, plan.dense_weight_TE().numpy(), atol=1e-7)
    np.testing.assert_allclose(dense.sum(0), 8, atol=1e-6)
    np.testing.assert_allclose(dense.sum(1), 1, atol=1e-9)
