"""Gaussian mixture of experts with softmax, top-K and temperature gates: exact likelihood, batched MLE, Voronoi loss.

    p(y | x) = sum_e softmax_e(TopK((act(b1_e . x) + b0_e) / tau)) N(y; a_e . x + b_e, nu_e)

Sources:
  [D] Nguyen, Nguyen, Ho, "Demystifying Softmax Gating Function in Gaussian Mixture of Experts", NeurIPS 2023 (dense).
  [S] Nguyen, Akbarian, Yan, Ho, "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts", ICLR 2024.
  [A] Nguyen, Akbarian, Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", ICML 2024:
      tau is estimated too (learn_tau), and act is the identity (dense-to-sparse gate) or a sigmoid (activation gate).

The K experts of the largest logits are kept, the bias counted. (A selection by b1 . x alone would never use the second
expert of the authors' example: b1 is 25 and 0 there, and x is positive.)

Everything is batched over replications: one call fits R independent samples. A name's suffix is its shape, in order:
  R replications   A those still at work   B those whose line search goes on   N samples   D input width
  E fitted experts   J true experts   K experts kept   P numbers in one packed parameter vector   M remembered pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MIN_LOG_VAR = -7.0  # the papers' parameter space is compact; without this bound the likelihood has no maximum
MEMORY = 20  # pairs that L-BFGS remembers
ROWS_TIMES_SAMPLES = 30_000  # evaluated at once
Row = list[float]
Rows = list[Row]


@dataclass(frozen=True)
class GateSpec:
    """Which gate: top_k None keeps all experts; learn_tau says only that fit() may move the temperature."""

    top_k: int | None = None
    sigmoid: bool = False
    learn_tau: bool = False


@dataclass(frozen=True)
class Mixture:
    """Parameters of R mixtures. The truth is a Mixture with R = 1."""

    gate_slope_RED: Tensor
    gate_bias_RE: Tensor
    slope_RED: Tensor
    intercept_RE: Tensor
    log_var_RE: Tensor
    log_tau_R: Tensor

    def pack(self) -> Tensor:
        return torch.cat([getattr(self, f.name).reshape(len(self.log_tau_R), -1) for f in fields(self)], dim=1)

    @staticmethod
    def unpack(theta_RP: Tensor, experts: int, width: int) -> Mixture:
        sizes = [experts * width, experts, experts * width, experts, experts, 1]
        gate_slope, gate_bias, slope, intercept, log_var, log_tau = theta_RP.split(sizes, dim=1)
        shape = (len(theta_RP), experts, width)
        return Mixture(gate_slope.view(shape), gate_bias, slope.view(shape), intercept, log_var, log_tau[:, 0])

    @staticmethod
    def of(gate_slope: Rows, gate_bias: Row, slope: Rows, intercept: Row, std: Row, tau: float = 1.0) -> Mixture:
        """One mixture from plain numbers: slopes are E lists of D, the rest E numbers."""
        parts = [torch.tensor([part], dtype=torch.float64) for part in (gate_slope, gate_bias, slope, intercept, std)]
        log_tau_R = torch.tensor([math.log(tau)], dtype=torch.float64)
        return Mixture(parts[0], parts[1], parts[2], parts[3], 2 * parts[4].log(), log_tau_R)


def gate_log_weights(mix: Mixture, spec: GateSpec, x_RND: Tensor) -> Tensor:
    """(R, E, N): the logarithm of each expert's weight; -inf where top-K drops it."""
    score_REN = torch.einsum("red,rnd->ren", mix.gate_slope_RED, x_RND)
    if spec.sigmoid:
        score_REN = score_REN.sigmoid()
    logit_REN = (score_REN + mix.gate_bias_RE[:, :, None]) * (-mix.log_tau_R).exp()[:, None, None]
    if spec.top_k is not None and spec.top_k < logit_REN.shape[1]:
        chosen_RKN = logit_REN.topk(spec.top_k, dim=1).indices
        logit_REN = logit_REN.masked_fill(torch.ones_like(logit_REN).scatter(1, chosen_RKN, 0).bool(), -math.inf)
    return logit_REN.log_softmax(dim=1)


def log_density(mix: Mixture, spec: GateSpec, x_RND: Tensor, y_RN: Tensor) -> Tensor:
    """(R, N): log p(y | x), exact."""
    mean_REN = torch.einsum("red,rnd->ren", mix.slope_RED, x_RND) + mix.intercept_RE[:, :, None]
    log_var_RE1 = mix.log_var_RE.clamp(min=MIN_LOG_VAR)[:, :, None]
    square_REN = (y_RN[:, None] - mean_REN).square() * (-log_var_RE1).exp()
    log_normal_REN = -0.5 * (square_REN + log_var_RE1 + math.log(2 * math.pi))
    return torch.logsumexp(gate_log_weights(mix, spec, x_RND) + log_normal_REN, dim=1)


def sample(
    truth: Mixture, spec: GateSpec, replications: int, n: int, low: float, high: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x uniform on [low, high]^D, and y from the truth."""
    width = truth.slope_RED.shape[2]
    x_RND = low + (high - low) * torch.rand(replications, n, width, dtype=torch.float64, generator=generator)
    cumulative_REN = gate_log_weights(truth, spec, x_RND.reshape(1, -1, width)).exp().cumsum(1)
    pick_N = torch.rand(replications * n, dtype=torch.float64, generator=generator)
    expert_RN = (pick_N > cumulative_REN[0, :-1]).sum(0).view(replications, n)
    noise_RN = torch.randn(replications, n, dtype=torch.float64, generator=generator)
    mean_RN = (truth.slope_RED[0, expert_RN] * x_RND).sum(2) + truth.intercept_RE[0, expert_RN]
    return x_RND, mean_RN + (0.5 * truth.log_var_RE[0, expert_RN]).exp() * noise_RN


Objective = Callable[[Tensor, Tensor], Tensor]
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def with_gradient(objective: Objective, free_P: Tensor, rows_at_once: int) -> Evaluate:
    """Values and gradients, a few rows at a time: what lies between then stays in the processor's cache."""

    def evaluate(theta_AP: Tensor, rows_A: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for theta, rows in zip(theta_AP.detach().split(rows_at_once), rows_A.split(rows_at_once), strict=True):
            values.append(objective(theta.requires_grad_(), rows))
            gradients.append(torch.autograd.grad(values[-1].sum(), theta)[0])
        return torch.cat(values).detach(), torch.cat(gradients) * free_P

    return evaluate


def _direction(gradient_AP: Tensor, s_MAP: list[Tensor], z_MAP: list[Tensor], rho_MA: list[Tensor]) -> Tensor:
    """Two-loop recursion, newest pair first in the lists; a pair of rho 0 counts as absent in that row."""
    q_AP, alphas = gradient_AP.clone(), []
    for s_AP, z_AP, rho_A in zip(s_MAP, z_MAP, rho_MA, strict=True):
        alphas.append(rho_A * (s_AP * q_AP).sum(1))
        q_AP -= alphas[-1][:, None] * z_AP
    scale_A = 1 / gradient_AP.norm(dim=1).clamp(min=1.0)
    for z_AP, rho_A in zip(reversed(z_MAP), reversed(rho_MA), strict=True):
        scale_A = torch.where(rho_A > 0, 1 / (rho_A * z_AP.square().sum(1)).clamp(min=1e-300), scale_A)
    q_AP *= scale_A[:, None]
    for s_AP, z_AP, rho_A, alpha_A in zip(*(list(reversed(m)) for m in (s_MAP, z_MAP, rho_MA, alphas)), strict=True):
        q_AP += (alpha_A - rho_A * (z_AP * q_AP).sum(1))[:, None] * s_AP
    return -q_AP


def _line_search(
    evaluate: Evaluate, rows_A: Tensor, theta_AP: Tensor, value_A: Tensor, gradient_AP: Tensor, step_AP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weak-Wolfe bisection (Lewis, Overton 2013) in each row. A row without a lower point comes back as it was."""
    new_theta_AP, new_value_A, new_gradient_AP = theta_AP.clone(), value_A.clone(), gradient_AP.clone()
    slope_A = (step_AP * gradient_AP).sum(1)
    t_A, low_A, high_A = torch.ones_like(slope_A), torch.zeros_like(slope_A), torch.full_like(slope_A, math.inf)
    open_B = torch.arange(len(rows_A))
    for _ in range(30):
        theta_BP = theta_AP[open_B] + t_A[open_B, None] * step_AP[open_B]
        value_B, gradient_BP = evaluate(theta_BP, rows_A[open_B])
        lower_B = value_B <= value_A[open_B] + 1e-4 * t_A[open_B] * slope_A[open_B]  # False for nan
        flat_B = (gradient_BP * step_AP[open_B]).sum(1) >= 0.9 * slope_A[open_B]
        kept = open_B[lower_B]
        new_theta_AP[kept], new_value_A[kept] = theta_BP[lower_B], value_B[lower_B]
        new_gradient_AP[kept] = gradient_BP[lower_B]
        low_A[kept], high_A[open_B[~lower_B]] = t_A[kept], t_A[open_B[~lower_B]]
        t_A = torch.where(high_A.isinf(), 2 * low_A, 0.5 * (low_A + high_A))
        open_B = open_B[~(lower_B & flat_B)]
        if not len(open_B):
            break
    return new_theta_AP, new_value_A, new_gradient_AP


@dataclass(frozen=True)
class Minimum:
    theta_RP: Tensor
    value_R: Tensor
    gradient_R: Tensor  # largest absolute entry at the end
    iterations_R: Tensor


def minimise(objective: Objective, start_RP: Tensor, free_P: Tensor, limit: int, rows_at_once: int = 10**6) -> Minimum:
    """L-BFGS on R functions at once, each with its own memory, line search and end.

    objective(theta_AP, rows_A) gives the values of the rows named; rows that have stopped are no longer asked for.
    Coordinates with free_P = 0 never move. A row stops on a small gradient, after two steps in a row that gain nothing,
    or when a line search finds no lower point.
    """
    evaluate = with_gradient(objective, free_P, rows_at_once)
    theta_RP, rows_A = start_RP.clone(), torch.arange(len(start_RP))
    value_R, gradient_RP = evaluate(theta_RP, rows_A)
    iterations_R, idle_R = torch.zeros_like(rows_A), torch.zeros_like(rows_A)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # (R, P), (R, P), (R), newest first
    for _ in range(limit):
        rows_A = rows_A[gradient_RP[rows_A].abs().amax(1) >= 1e-7]
        if not len(rows_A):
            break
        theta_AP, value_A, gradient_AP = theta_RP[rows_A], value_R[rows_A], gradient_RP[rows_A]
        step_AP = _direction(gradient_AP, *([pair[i][rows_A] for pair in pairs] for i in range(3)))
        uphill_A1 = (step_AP * gradient_AP).sum(1, keepdim=True) >= 0
        step_AP = torch.where(uphill_A1, -gradient_AP, step_AP)
        found = _line_search(evaluate, rows_A, theta_AP, value_A, gradient_AP, step_AP)
        theta_RP[rows_A], value_R[rows_A], gradient_RP[rows_A] = found
        s_RP, z_RP, rho_R = torch.zeros_like(theta_RP), torch.zeros_like(theta_RP), torch.zeros_like(value_R)
        s_RP[rows_A], z_RP[rows_A] = found[0] - theta_AP, found[2] - gradient_AP
        product_R = (s_RP * z_RP).sum(1)
        good_R = product_R > 1e-12 * s_RP.norm(dim=1) * z_RP.norm(dim=1)
        rho_R[good_R] = 1 / product_R[good_R]
        pairs = [(s_RP, z_RP, rho_R), *pairs[: MEMORY - 1]]
        iterations_R[rows_A] += 1
        idle_A = value_A - found[1] <= 1e-13 * (1 + value_A.abs())
        idle_R[rows_A] = torch.where(idle_A, idle_R[rows_A] + 1, 0)
        rows_A = rows_A[(idle_R[rows_A] < 2) & (found[0] != theta_AP).any(1)]
    return Minimum(theta_RP, value_R, gradient_RP.abs().amax(1), iterations_R)


def negative_log_likelihood(spec: GateSpec, experts: int, x_RND: Tensor, y_RN: Tensor) -> Objective:
    """The mean over samples; row r of the parameters is judged by sample r modulo R, so starts may be stacked."""

    def objective(theta_AP: Tensor, rows_A: Tensor) -> Tensor:
        at_A, mix = rows_A % len(x_RND), Mixture.unpack(theta_AP, experts, x_RND.shape[2])
        return -log_density(mix, spec, x_RND[at_A], y_RN[at_A]).mean(1)

    return objective


def free_parameters(mix: Mixture, spec: GateSpec) -> Tensor:
    """(P,): 1 where fit() may move a parameter.

    The likelihood does not change when all gate biases move together, nor (without a sigmoid) when all gate slopes do:
    the last expert's are held where the start has them. tau moves only if the gate learns it.
    """
    free_P = torch.ones_like(mix.pack()[0])
    free = Mixture.unpack(free_P[None], *mix.slope_RED.shape[1:])
    free.gate_bias_RE[0, -1] = 0
    free.gate_slope_RED[0, -1] = float(spec.sigmoid)
    free.log_tau_R[0] = float(spec.learn_tau)
    return free_P


def fit(spec: GateSpec, starts: list[Mixture], x_RND: Tensor, y_RN: Tensor, limit: int) -> tuple[Mixture, Minimum]:
    """Maximum likelihood by direct minimisation, `limit` iterations at most: each replication's best of all starts."""
    replications, experts, width = starts[0].slope_RED.shape
    start_RP, at_once = torch.cat([start.pack() for start in starts]), max(1, ROWS_TIMES_SAMPLES // x_RND.shape[1])
    objective = negative_log_likelihood(spec, experts, x_RND, y_RN)
    end = minimise(objective, start_RP, free_parameters(starts[0], spec), limit, at_once)
    value_SR = end.value_R.view(len(starts), replications)
    best_R = value_SR.nan_to_num(nan=math.inf).argmin(0) * replications + torch.arange(replications)
    best = Minimum(*(getattr(end, f.name)[best_R] for f in fields(Minimum)))
    return Mixture.unpack(best.theta_RP, experts, width), best


def score_information(truth: Mixture, spec: GateSpec, x_ND: Tensor, y_N: Tensor) -> Tensor:
    """(P, P): mean outer product of the score at the truth, one sample in each row of the batch."""
    theta_NP = truth.pack().repeat(len(y_N), 1)
    objective = negative_log_likelihood(spec, truth.slope_RED.shape[1], x_ND[:, None], y_N[:, None])
    _, score_NP = with_gradient(objective, torch.ones_like(theta_NP[0]), 10_000)(theta_NP, torch.arange(len(y_N)))
    return score_NP.T @ score_NP / len(y_N)


@dataclass(frozen=True)
class Voronoi:
    """Distances of R fitted mixtures from the truth; cell (r, j) holds the fitted experts nearest to true expert j."""

    loss_R: Tensor
    size_RJ: Tensor
    error_RJ: dict[str, Tensor]  # b1, b0, a, b, nu: mean over the cell's experts, weighted by exp(b0); inf if empty
    farthest_RJ: dict[str, Tensor]  # b1, a, b, nu: of the cell's worst expert, whatever its weight; 0 if empty


def voronoi(fitted: Mixture, truth: Mixture) -> Voronoi:
    """The Voronoi loss of [D] and [S]: D1 if exact-specified (all cells of size 1), D2 if over-specified.

    A cell of size 1 adds exp(b0) (|d b1| + |d a| + |d b| + |d nu|). Each expert of a cell of size m adds
    exp(b0) (|d b1|^r + |d b|^r + |d a|^(r/2) + |d nu|^(r/2)); r is 4 for m = 2, 6 for m = 3, 7 beyond (known: >= 7).
    Each cell adds |sum exp(b0) - exp(b0*)|. The papers take the infimum over the gate's translations (t0, t1); here the
    last cell's mass and mean gate slope are moved onto the truth, which bounds it from above. Cells go by a, b and nu,
    which no translation changes.
    """
    var_RE, true_var_J = fitted.log_var_RE.exp(), truth.log_var_RE[0].exp()
    own = torch.cat([fitted.slope_RED, fitted.intercept_RE[..., None], var_RE[..., None]], dim=2)
    true = torch.cat([truth.slope_RED[0], truth.intercept_RE[0, :, None], true_var_J[:, None]], dim=1)
    cell_RE = torch.cdist(own, true[None]).argmin(2)
    member_REJ = torch.nn.functional.one_hot(cell_RE, len(true)).bool()
    size_RJ, empty_RJ = member_REJ.sum(1), ~member_REJ.any(1)

    bias_REJ = fitted.gate_bias_RE[:, :, None].masked_fill(~member_REJ, -math.inf)
    log_mass_RJ = bias_REJ.logsumexp(1)
    share_REJ = (bias_REJ - log_mass_RJ[:, None]).exp().nan_to_num()
    t0_R = (log_mass_RJ[:, -1] - truth.gate_bias_RE[0, -1]).masked_fill(empty_RJ[:, -1], 0)
    t1_RD = torch.einsum("re,red->rd", share_REJ[:, :, -1], fitted.gate_slope_RED) - truth.gate_slope_RED[0, -1]
    mass_RE, mass_RJ = (fitted.gate_bias_RE - t0_R[:, None]).exp(), (log_mass_RJ - t0_R[:, None]).exp()

    distance_RE = {
        "b1": (fitted.gate_slope_RED - t1_RD[:, None] - truth.gate_slope_RED[0, cell_RE]).norm(dim=2),
        "a": (fitted.slope_RED - truth.slope_RED[0, cell_RE]).norm(dim=2),
        "b": (fitted.intercept_RE - truth.intercept_RE[0, cell_RE]).abs(),
        "nu": (var_RE - true_var_J[cell_RE]).abs(),
    }
    power_RE = torch.tensor([1.0, 1.0, 4.0, 6.0, 7.0])[size_RJ.gather(1, cell_RE).clamp(max=4)]
    half_RE = torch.where(power_RE > 1, power_RE / 2, power_RE)
    terms = [d_RE ** (power_RE if name in ("b1", "b") else half_RE) for name, d_RE in distance_RE.items()]
    loss_R = (mass_RE * torch.stack(terms).sum(0)).sum(1) + (mass_RJ - truth.gate_bias_RE[0].exp()).abs().sum(1)
    error_RJ = {name: (share_REJ * d_RE[:, :, None]).sum(1) for name, d_RE in distance_RE.items()}
    error_RJ["b0"] = (log_mass_RJ - t0_R[:, None] - truth.gate_bias_RE[0]).abs()
    for error in (loss_R, *error_RJ.values()):  # a gate that has run off to infinity
        error.nan_to_num_(nan=math.inf, posinf=math.inf)
    error_RJ = {name: error.masked_fill(empty_RJ, math.inf) for name, error in error_RJ.items()}
    farthest_RJ = {name: (member_REJ * d_RE[:, :, None]).amax(1) for name, d_RE in distance_RE.items()}
    return Voronoi(loss_R.masked_fill(empty_RJ.any(1), math.inf), size_RJ, error_RJ, farthest_RJ)
