"""Gaussian mixture of experts: likelihood against plain loops, what the gate's gradient can see, Voronoi loss, MLE."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from benchmarks.gates import gaussian_moe as gm
from benchmarks.gates.gaussian_moe import GateSpec, Mixture
from benchmarks.gates.rates import AUTHORS, THREE, fit_rate, near

pytestmark = pytest.mark.unit

DENSE, TOP1 = GateSpec(), GateSpec(top_k=1)


def random_mixture(reps: int, experts: int, width: int, seed: int = 0) -> Mixture:
    theta_RP = torch.randn(reps, 2 * experts * (width + 1) + experts + 1, generator=Generator().manual_seed(seed))
    return Mixture.unpack(theta_RP.double(), experts, width)


def loop_log_density(mix: Mixture, spec: GateSpec, r: int, x_D: np.ndarray, y: float) -> float:
    """One sample, by the definition, one expert after another."""
    part = {f.name: getattr(mix, f.name)[r].numpy() for f in dataclasses.fields(mix)}
    experts, tau = len(part["gate_bias_RE"]), math.exp(part["log_tau_R"])
    logits = []
    for e in range(experts):
        score = sum(w * v for w, v in zip(part["gate_slope_RED"][e], x_D, strict=True))
        score = 1 / (1 + math.exp(-score)) if spec.sigmoid else score
        logits.append((score + part["gate_bias_RE"][e]) / tau)
    chosen = sorted(range(experts), key=lambda e: -logits[e])[: spec.top_k]
    total = sum(math.exp(logits[e]) for e in chosen)
    density = 0.0
    for e in chosen:
        var = math.exp(part["log_var_RE"][e])
        mean = sum(w * v for w, v in zip(part["slope_RED"][e], x_D, strict=True)) + part["intercept_RE"][e]
        density += math.exp(logits[e]) / total * math.exp(-((y - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
    return math.log(density)


def gradient(spec: GateSpec, mix: Mixture, x_RND: Tensor, y_RN: Tensor) -> Mixture:
    theta_RP = mix.pack()
    objective = gm.negative_log_likelihood(spec, mix.slope_RED.shape[1], x_RND, y_RN)
    _, gradient_RP = gm.with_gradient(objective, torch.ones_like(theta_RP[0]), 1)(theta_RP, torch.arange(len(theta_RP)))
    return Mixture.unpack(gradient_RP, *mix.slope_RED.shape[1:])


@pytest.mark.parametrize("spec", [DENSE, TOP1, GateSpec(top_k=2), GateSpec(sigmoid=True), GateSpec(2, sigmoid=True)])
def test_log_density_is_that_of_a_plain_loop(spec: GateSpec) -> None:
    mix, rng = random_mixture(2, 3, 2), np.random.default_rng(0)
    x_RND, y_RN = rng.normal(size=(2, 7, 2)), rng.normal(size=(2, 7))
    expected = [[loop_log_density(mix, spec, r, x_RND[r, n], y_RN[r, n]) for n in range(7)] for r in range(2)]
    found_RN = gm.log_density(mix, spec, torch.tensor(x_RND), torch.tensor(y_RN))
    np.testing.assert_allclose(found_RN.numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("spec", [DENSE, TOP1, GateSpec(top_k=2)])
def test_density_integrates_to_one(spec: GateSpec) -> None:
    y_N = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density_RN = gm.log_density(
        random_mixture(1, 3, 1), spec, torch.full((1, len(y_N), 1), 0.3).double(), y_N[None]
    ).exp()
    assert torch.trapezoid(density_RN[0], y_N).item() == pytest.approx(1, abs=1e-9)


def test_sample_follows_the_gate_and_the_experts() -> None:
    truth = Mixture.of([[0], [0]], [math.log(3), 0], [[2], [-2]], [10, -10], [0.5, 1.5])
    x_RND, y_RN = gm.sample(truth, DENSE, 2, 20_000, -1, 1, Generator().manual_seed(0))
    first_RN = y_RN > 0
    assert first_RN.double().mean().item() == pytest.approx(0.75, abs=0.01)
    rest_RN = y_RN - torch.where(first_RN, 2 * x_RND[..., 0] + 10, -2 * x_RND[..., 0] - 10)
    assert rest_RN[first_RN].std().item() == pytest.approx(0.5, abs=0.02)
    assert rest_RN[~first_RN].std().item() == pytest.approx(1.5, abs=0.04)


def test_top1_likelihood_has_no_gradient_in_the_gate() -> None:
    """The softmax over the one logit kept is 1 whatever that logit is; the choice itself is constant almost everywhere.

    So maximum likelihood by gradients leaves the gate of K = 1 where it was started, and a rate measured for it is the
    rate at which the start approached the truth. With K = 2 of 3 there is a gradient.
    """
    x_RND, y_RN = gm.sample(THREE, DENSE, 3, 200, -1, 1, Generator().manual_seed(0))
    start = near(THREE, 3, 0.5, 0.5, Generator().manual_seed(1), [0, 1, 2])
    top1, top2 = gradient(TOP1, start, x_RND, y_RN), gradient(GateSpec(top_k=2), start, x_RND, y_RN)
    assert not top1.gate_slope_RED.any()
    assert not top1.gate_bias_RE.any()
    assert (top1.slope_RED != 0).any()
    assert (top2.gate_slope_RED != 0).any(1).all()
    fitted, _ = gm.fit(TOP1, [start], x_RND, y_RN, 50)
    assert torch.equal(fitted.gate_slope_RED, start.gate_slope_RED)
    assert not torch.equal(fitted.slope_RED, start.slope_RED)


def test_standard_temperature_gate_has_a_ridge_that_the_sigmoid_bends() -> None:
    mix = random_mixture(1, 3, 1)
    scaled = dataclasses.replace(
        mix,
        gate_slope_RED=2 * mix.gate_slope_RED,
        gate_bias_RE=2 * mix.gate_bias_RE,
        log_tau_R=mix.log_tau_R + math.log(2),
    )
    x_RND = torch.linspace(-3, 3, 9, dtype=torch.float64)[None, :, None]
    same, bent = (
        [gm.gate_log_weights(each, spec, x_RND) for each in (mix, scaled)] for spec in (DENSE, GateSpec(sigmoid=True))
    )
    torch.testing.assert_close(same[0], same[1])
    assert (bent[0] - bent[1]).abs().max() > 0.01


def test_information_is_singular_along_the_ridge_only() -> None:
    truth = Mixture.of([[2.5], [-1.5], [0]], [-0.25, 0, 0], [[3], [-3], [3]], [-3, 0, 3], [0.3] * 3, 0.5)
    for sigmoid in (False, True):
        spec = GateSpec(sigmoid=sigmoid, learn_tau=True)
        x_RND, y_RN = gm.sample(truth, spec, 1, 4000, -4, 4, Generator().manual_seed(0))
        free_P = gm.free_parameters(truth, spec).bool()
        values = torch.linalg.eigvalsh(gm.score_information(truth, spec, x_RND[0], y_RN[0])[free_P][:, free_P])
        assert (values < 1e-12 * values[-1]).sum() == (0 if sigmoid else 1)


def test_voronoi_loss_is_zero_at_the_truth_and_grows_off_it() -> None:
    for truth in (AUTHORS, THREE):
        at = gm.voronoi(truth, truth)
        assert at.loss_R.item() == pytest.approx(0, abs=1e-14)
        assert at.size_RJ.unique().tolist() == [1]
        off = gm.voronoi(dataclasses.replace(truth, slope_RED=truth.slope_RED + 0.1), truth)
        mass = truth.gate_bias_RE.exp().sum().item()
        assert off.loss_R.item() == pytest.approx(0.1 * mass)
        torch.testing.assert_close(off.error_RJ["a"], torch.full_like(off.error_RJ["a"], 0.1))


def test_voronoi_loss_ignores_labels_and_translations_of_the_gate() -> None:
    fitted = near(THREE, 5, 0.2, 0.2, Generator().manual_seed(0), [0, 1, 2, 2])
    order = [2, 0, 3, 1]
    other = Mixture(
        gate_slope_RED=fitted.gate_slope_RED[:, order] + 3.7,
        gate_bias_RE=fitted.gate_bias_RE[:, order] - 1.3,
        slope_RED=fitted.slope_RED[:, order],
        intercept_RE=fitted.intercept_RE[:, order],
        log_var_RE=fitted.log_var_RE[:, order],
        log_tau_R=fitted.log_tau_R,
    )
    one, two = gm.voronoi(fitted, THREE), gm.voronoi(other, THREE)
    torch.testing.assert_close(one.loss_R, two.loss_R)
    assert torch.equal(one.size_RJ, two.size_RJ)
    for name, error_RJ in one.error_RJ.items():
        torch.testing.assert_close(error_RJ, two.error_RJ[name])


def test_voronoi_loss_of_a_shared_expert_takes_the_higher_powers() -> None:
    """Two copies of the last expert at -d and +d in a single parameter: cell of size 2, r = 4."""
    for name, power in (("slope_RED", 2), ("intercept_RE", 4), ("gate_slope_RED", 4)):
        copies = near(AUTHORS, 1, 0, 0, Generator(), [0, 1, 1])
        getattr(copies, name)[0, 1] -= 0.5
        getattr(copies, name)[0, 2] += 0.5
        result = gm.voronoi(copies, AUTHORS)
        assert result.size_RJ.tolist() == [[1, 2]]
        assert result.loss_R.item() == pytest.approx(0.5**power)
        key = {"slope_RED": "a", "intercept_RE": "b", "gate_slope_RED": "b1"}[name]
        assert result.farthest_RJ[key].tolist() == [[0, pytest.approx(0.5)]]


def test_voronoi_loss_of_a_lost_expert_is_infinite() -> None:
    result = gm.voronoi(near(AUTHORS, 1, 0, 0, Generator(), [1, 1]), AUTHORS)
    assert result.size_RJ.tolist() == [[0, 2]]
    assert result.loss_R.item() == math.inf
    assert result.error_RJ["a"].tolist() == [[math.inf, 0.0]]


def test_minimise_finds_every_row_of_a_batch() -> None:
    """Rosenbrock's function with another minimum in each row, and one coordinate held."""
    at_R = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def objective(theta_AP: Tensor, rows_A: Tensor) -> Tensor:
        return (at_R[rows_A] - theta_AP[:, 0]) ** 2 + 100 * (theta_AP[:, 1] - theta_AP[:, 0] ** 2) ** 2

    start_RP = torch.tensor([[-1.2, 1.0, 7.0]], dtype=torch.float64).repeat(3, 1)
    end = gm.minimise(objective, start_RP, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), 300)
    torch.testing.assert_close(end.theta_RP[:, 0], at_R, atol=1e-5, rtol=0)
    torch.testing.assert_close(end.theta_RP[:, 1], at_R**2, atol=1e-5, rtol=0)
    assert end.theta_RP[:, 2].tolist() == [7.0] * 3


@pytest.mark.parametrize("spec", [DENSE, TOP1, GateSpec(top_k=2), GateSpec(sigmoid=True, learn_tau=True)])
def test_mle_lowers_the_likelihood_of_each_small_sample(spec: GateSpec) -> None:
    x_RND, y_RN = gm.sample(THREE, spec, 4, 60, -1, 1, Generator().manual_seed(0))
    starts = [near(THREE, 4, 0.3, 0.3, Generator().manual_seed(seed), [0, 1, 2], tau=0.1) for seed in (1, 2)]
    fitted, end = gm.fit(spec, starts, x_RND, y_RN, 50)
    for start in starts:
        before_R = -gm.log_density(start, spec, x_RND, y_RN).mean(1)
        assert (end.value_R < before_R).all()
    torch.testing.assert_close(end.value_R, -gm.log_density(fitted, spec, x_RND, y_RN).mean(1))
    moved_tau = (fitted.log_tau_R[None] != torch.stack([start.log_tau_R for start in starts])).all()
    assert bool(moved_tau) == spec.learn_tau


def test_mle_keeps_the_best_of_the_starts_for_each_replication() -> None:
    """Each start is poor (it lacks an expert) in another replication."""
    x_RND, y_RN = gm.sample(THREE, DENSE, 2, 200, -1, 1, Generator().manual_seed(0))
    starts = []
    for poor in (0, 1):
        rows = [near(THREE, 1, 0, 0, Generator(), [2, 2, 2] if r == poor else [0, 1, 2]).pack() for r in range(2)]
        starts.append(Mixture.unpack(torch.cat(rows), 3, 1))
    alone_SR = torch.stack([gm.fit(DENSE, [start], x_RND, y_RN, 30)[1].value_R for start in starts])
    assert alone_SR.argmin(0).tolist() == [1, 0]
    torch.testing.assert_close(gm.fit(DENSE, starts, x_RND, y_RN, 30)[1].value_R, alone_SR.amin(0))


def test_mle_of_one_expert_is_least_squares() -> None:
    truth = Mixture.of([[0, 0]], [0], [[2, -1]], [0.5], [0.7])
    x_RND, y_RN = gm.sample(truth, DENSE, 2, 50, -1, 1, Generator().manual_seed(0))
    fitted, _ = gm.fit(DENSE, [near(truth, 2, 0, 0.5, Generator().manual_seed(1), [0])], x_RND, y_RN, 100)
    for r in range(2):
        design_N3 = np.column_stack([x_RND[r].numpy(), np.ones(50)])
        weight_3, square, *_ = np.linalg.lstsq(design_N3, y_RN[r].numpy(), rcond=None)
        np.testing.assert_allclose([*fitted.slope_RED[r, 0], fitted.intercept_RE[r, 0]], weight_3, atol=1e-6)
        assert fitted.log_var_RE[r, 0].exp().item() == pytest.approx(square[0] / 50, rel=1e-5)


def test_fit_rate_recovers_a_power_law() -> None:
    sizes, rng = [100, 1000, 10_000, 100_000], np.random.default_rng(0)
    error_SR = 3 * np.array(sizes)[:, None] ** -0.25 * np.exp(0.3 * rng.normal(size=(4, 40)))
    slope, low, high = fit_rate(sizes, error_SR)
    assert slope == pytest.approx(-0.25, abs=0.03)
    assert low < -0.25 < high
    assert high - low < 0.1
    exact = fit_rate(sizes, np.repeat(np.array(sizes)[:, None] ** -0.5, 3, axis=1))
    assert exact == pytest.approx((-0.5, -0.5, -0.5))
    assert all(math.isnan(value) for value in fit_rate(sizes, np.zeros((4, 3))))
