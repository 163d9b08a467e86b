"""Gates of variable size, prescribed routing and controllers, each against plain NumPy loops.

Shape suffixes: T tokens, D width, E experts, A experts and zero-computation experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gates import Gate, GateInput, GateOutput, Mode, RoutingPlan, build_gate, record_routing
from gates.batch_choice import BatchChoiceGate
from gates.dense_to_sparse import DenseToSparseGate
from gates.hash import balanced_table, clustered_table, hash_experts
from gates.linear import LinearGate
from gates.metrics import imbalance
from gates.relu import ReLUGate
from gates.soft import SoftGate
from gates.top_p import TopPGate
from gates.topk import TopKGate
from gates.zero_computation import ZeroComputationGate
from moe import ForwardContext, ModelConfig, MoEConfig, MoELayer, Transformer
from moe.dispatch import Dispatched, LocalDispatcher
from moe.errors import UserError
from moe.layer import RoutingContext

pytestmark = pytest.mark.unit
Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_gate(num_experts: int, **options: Any) -> Any:
    """Its tokens are their own logits."""
    gate = build_gate(options, num_experts, num_experts).double()
    assert isinstance(gate, LinearGate | TopKGate)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(num_experts))
    return gate


def train_on(gate: Gate, logits_TE: Tensor) -> GateOutput:
    """One step's forward and its end."""
    out: GateOutput = gate(GateInput(logits_TE, mode=Mode.TRAIN))
    gate.end_step(out.plan.offered_E, out.signals)
    return out


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def expit(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def best(values: Array, count: int) -> list[int]:
    """Indices of the largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def visits(plan: RoutingPlan) -> Bools:
    dense = np.zeros((plan.num_tokens, plan.num_experts), dtype=bool)
    dense[plan.token_N().numpy(), plan.expert_N.numpy()] = True
    return dense


def check(out: GateOutput, mask: Bools, weights: Array) -> None:
    np.testing.assert_array_equal(visits(out.plan), mask)
    dense = out.plan.dense_weight_TE().detach().numpy()
    np.testing.assert_allclose(dense, np.where(mask, weights, 0), rtol=1e-10, atol=1e-14)


def limit(mask: Bools, score: Array, max_k: int) -> Bools:
    limited = np.zeros_like(mask)
    for t in range(len(mask)):
        limited[t, best(np.where(mask[t], score[t], -np.inf), max_k)] = True
    return limited & mask


# ----------------------------------------------------------------------------------------------------------------------
# Expert, feature and mutual choice


def columns_best(score: Array, capacity: list[int]) -> Bools:
    mask = np.zeros(score.shape, dtype=bool)
    for e, count in enumerate(capacity):
        mask[best(score[:, e], count), e] = True
    return mask


def shares(pairs: int, num_tokens: int, num_experts: int, alpha: float, beta: float) -> list[int]:
    """Capacity of each rank, in proportion to (rank + beta)^-alpha, none above T."""
    proportion = [(rank + beta) ** -alpha for rank in range(num_experts)]
    full: set[int] = set()
    while True:
        rest = pairs - num_tokens * len(full)
        total = sum(p for rank, p in enumerate(proportion) if rank not in full)
        exact = [num_tokens if rank in full else rest * p / total for rank, p in enumerate(proportion)]
        new = {rank for rank in range(num_experts) if rank not in full and exact[rank] >= num_tokens}
        if not new:
            break
        full |= new
    whole = [math.floor(x) for x in exact]
    remainders = sorted(range(num_experts), key=lambda rank: (whole[rank] - exact[rank], rank))
    for rank in remainders[: pairs - sum(whole)]:
        whole[rank] += 1
    return whole


def mutual_best(score: Array, mean_k: float, load_cap: float | None) -> Bools:
    num_tokens, num_experts = score.shape
    within = np.ones(score.shape, dtype=bool)
    if load_cap is not None:
        capacity = min(num_tokens, math.ceil(mean_k * load_cap * num_tokens / num_experts))
        within = columns_best(score, [capacity] * num_experts)
    flat = np.where(within, score, 0.0).ravel()
    mask = np.zeros(flat.shape, dtype=bool)
    mask[best(flat, round(mean_k * num_tokens))] = True
    return mask.reshape(score.shape) & within & (score > 0)


def logits_with_ties(num_tokens: int, num_experts: int) -> Tensor:
    """Three values only, whole rows alike."""
    rng = np.random.default_rng(num_tokens)
    return torch.from_numpy(rng.integers(-1, 2, (num_tokens, num_experts)).astype(float))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_k", [None, 2])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor"), [(64, 8, 2.0), (50, 6, 1.1), (3, 5, 1.0), (1, 4, 2.0)]
)
def test_expert_choice(num_tokens: int, num_experts: int, factor: float, max_k: int | None, ties: bool) -> None:
    gate = make_gate(num_experts, name="expert_choice", capacity_factor=factor, max_k=max_k)
    logits_TE = logits_with_ties(num_tokens, num_experts) if ties else draw(num_tokens, num_experts, seed=num_tokens)
    score = logits_TE.softmax(-1).numpy()  # equal rows must stay equal to the bit
    np.testing.assert_allclose(score, softmax(logits_TE.numpy()), rtol=1e-12)
    capacity = min(num_tokens, math.ceil(round(factor * num_tokens / num_experts, 9)))
    mask = columns_best(score, [capacity] * num_experts)
    check(gate(GateInput(logits_TE)), mask if max_k is None else limit(mask, score, max_k), score)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize(
    ("alpha", "beta", "mean_k"), [(0.5, 1.0, 2.0), (1.5, 0.5, 1.3), (3.0, 1.0, 4.0), (0.0, 0.0, 2.0)]
)
def test_feature_choice(alpha: float, beta: float, mean_k: float, affinity: str, ties: bool) -> None:
    num_tokens, num_experts = 40, 6
    gate = make_gate(num_experts, name="feature_choice", alpha=alpha, beta=beta, mean_k=mean_k, affinity=affinity)
    logits_TE = logits_with_ties(num_tokens, num_experts) if ties else draw(num_tokens, num_experts)
    logits_TE = logits_TE + torch.arange(num_experts) / 8  # no two columns alike
    functions = {"softmax": logits_TE.softmax(-1), "sigmoid": logits_TE.sigmoid(), "relu": logits_TE.relu()}
    score = functions[affinity].numpy()
    by_popularity = best(score.sum(0), num_experts)
    capacity = [0] * num_experts
    for rank, count in enumerate(shares(round(mean_k * num_tokens), num_tokens, num_experts, alpha, beta)):
        capacity[by_popularity[rank]] = count
    assert sum(capacity) == round(mean_k * num_tokens)
    check(gate(GateInput(logits_TE)), columns_best(score, capacity) & (score > 0), score)


def test_feature_choice_of_even_softmax_columns_is_expert_choice() -> None:
    logits_TE = draw(64, 8)
    feature = make_gate(8, name="feature_choice", alpha=0.0, affinity="softmax", mean_k=2.0)
    expert = make_gate(8, name="expert_choice", capacity_factor=2.0)
    ours, theirs = train_on(feature, logits_TE), train_on(expert, logits_TE)
    assert torch.equal(ours.plan.expert_N, theirs.plan.expert_N)
    assert torch.equal(ours.plan.row_ptr_T1, theirs.plan.row_ptr_T1)
    assert torch.equal(ours.plan.weight_N, theirs.plan.weight_N)
    assert torch.equal(feature.threshold, expert.threshold)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_k", [None, 3])
@pytest.mark.parametrize("affinity", ["sigmoid", "relu"])
@pytest.mark.parametrize(("mean_k", "load_cap"), [(2.0, 4.0), (2.0, 1.0), (1.3, None), (4.0, 1.2)])
def test_mutual_choice(mean_k: float, load_cap: float | None, affinity: str, max_k: int | None, ties: bool) -> None:
    num_tokens, num_experts = 40, 6
    gate = make_gate(
        num_experts, name="mutual_choice", mean_k=mean_k, load_cap=load_cap, affinity=affinity, max_k=max_k
    )
    logits_TE = logits_with_ties(num_tokens, num_experts) if ties else draw(num_tokens, num_experts)
    logits_TE[:, 0] += 1  # one popular expert
    score = (logits_TE.sigmoid() if affinity == "sigmoid" else logits_TE.relu()).numpy()
    mask = mutual_best(score, mean_k, load_cap)
    check(gate(GateInput(logits_TE)), mask if max_k is None else limit(mask, score, max_k), score)


CHOICES: list[dict[str, Any]] = [
    {"name": "expert_choice"},
    {"name": "expert_choice", "max_k": 2},
    {"name": "feature_choice"},
    {"name": "feature_choice", "affinity": "relu", "alpha": 1.0},
    {"name": "mutual_choice", "load_cap": None},
    {"name": "mutual_choice", "load_cap": None, "affinity": "relu", "max_k": 4},
]


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_thresholds_of_a_batch_reproduce_its_plan(options: dict[str, Any]) -> None:
    gate, logits_TE = make_gate(8, **options), draw(64, 8)
    batch = train_on(gate, logits_TE).plan
    surrogate = gate.causal_surrogate()
    assert isinstance(surrogate, BatchChoiceGate)
    np.testing.assert_array_equal(visits(surrogate(GateInput(logits_TE)).plan), visits(batch))
    for t in range(0, 64, 7):
        alone = surrogate(GateInput(logits_TE[t : t + 1], mode=Mode.DECODE)).plan
        np.testing.assert_array_equal(visits(alone)[0], visits(batch)[t])


def test_thresholds_are_running_means_without_the_zeros_that_they_start_from() -> None:
    num_tokens, num_experts, decay = 48, 6, 0.8
    gate = make_gate(num_experts, name="expert_choice", threshold_decay=decay)
    mean, weights = np.zeros(num_experts), 0.0
    for step in range(6):
        logits_TE = draw(num_tokens, num_experts, seed=step)
        out = train_on(gate, logits_TE)
        ranked = -np.sort(-softmax(logits_TE.numpy()), 0)
        capacity = 2 * num_tokens // num_experts
        between = (ranked[capacity - 1] + ranked[capacity]) / 2
        np.testing.assert_allclose((out.signals["threshold"] / out.signals["tokens"]).numpy(), between, rtol=1e-6)
        mean, weights = decay * mean + (1 - decay) * between, decay * weights + (1 - decay)
        np.testing.assert_allclose(gate.threshold.numpy(), mean / weights, rtol=1e-5)


def test_training_by_thresholds_begins_when_asked() -> None:
    gate = make_gate(6, name="expert_choice", thresholds_from=2)
    for step in range(4):
        gate.begin_step(step)
        logits_TE = draw(48, 6, seed=step)
        before = gate.threshold.numpy().copy()
        plan = train_on(gate, logits_TE).plan
        score = softmax(logits_TE.numpy())
        expected = columns_best(score, [16] * 6) if step < 2 else score > before
        np.testing.assert_array_equal(visits(plan), expected)
        assert not np.array_equal(gate.threshold.numpy(), before), "thresholds go on moving"


# ----------------------------------------------------------------------------------------------------------------------
# Top-p, ReLU, dense to sparse


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("p", "max_k"), [(0.4, 8), (0.7, None), (0.95, 3), (1.0, None), (1e-3, 8)])
def test_top_p(p: float, max_k: int | None, renormalise: bool) -> None:
    num_tokens, num_experts = 60, 8
    gate = make_gate(num_experts, name="top_p", p=p, max_k=max_k, renormalise=renormalise, entropy_coef=1.0)
    logits_TE = draw(num_tokens, num_experts) * 1.5
    probs = softmax(logits_TE.numpy())
    mask, weights, entropy = np.zeros(probs.shape, dtype=bool), probs.copy(), 0.0
    for t, row in enumerate(probs):
        total = 0.0
        for rank, e in enumerate(best(row, num_experts)):
            if rank and (total >= p or (max_k is not None and rank >= max_k)):
                break
            mask[t, e] = True
            total += row[e]
        entropy -= (row * np.log(row)).sum() / num_tokens
        if renormalise:
            weights[t] /= row[mask[t]].sum()
    out = gate(GateInput(logits_TE))
    check(out, mask, weights)
    assert out.aux["entropy"].item() == pytest.approx(entropy, rel=1e-10)
    fraction = mask.sum(0) / mask.sum()
    assert out.aux["balance"].item() == pytest.approx(num_experts * (fraction * probs.mean(0)).sum(), rel=1e-10)


@pytest.mark.parametrize("mean_k", [1.5, 2.0, 4.0])
def test_controller_of_top_p_reaches_its_mean(mean_k: float) -> None:
    gate = make_gate(8, name="top_p", mean_k=mean_k)
    assert isinstance(gate, TopPGate)
    found = [train_on(gate, draw(256, 8, seed=step)).plan.num_pairs / 256 for step in range(200)]
    assert abs(found[0] - mean_k) > 0.2, "nothing to control"
    assert np.mean(found[-50:]) == pytest.approx(mean_k, rel=0.03)
    assert 0 < gate.p.item() < 1


@pytest.mark.parametrize("max_k", [None, 3])
def test_relu(max_k: int | None) -> None:
    num_tokens, num_experts, k = 50, 8, 2
    gate = make_gate(num_experts, name="relu", k=k, max_k=max_k, l1_start=0.3, balance_coef=1.0)
    logits_TE = draw(num_tokens, num_experts) + 0.3
    h = logits_TE.numpy()
    mask = h > 0 if max_k is None else limit(h > 0, h, max_k)
    out = gate(GateInput(logits_TE))
    check(out, mask, h)
    loss = 0.0
    for e in range(num_experts):
        busy = mask[:, e].sum() * num_experts / (num_tokens * k)
        loss += busy * np.maximum(h[:, e], 0).mean()
    assert out.aux["sparsity"].item() == pytest.approx(0.3 * loss, rel=1e-6)
    fraction = mask.sum(0) / mask.sum()
    balance = num_experts * (fraction * softmax(h).mean(0)).sum()
    assert out.aux["balance"].item() == pytest.approx(balance, rel=1e-10)


def test_controller_of_relu_follows_the_number_of_experts() -> None:
    gate = make_gate(8, name="relu", k=2, l1_start=1e-3, l1_factor=1.5)
    assert isinstance(gate, ReLUGate)
    expected = 1e-3
    for step, shift in enumerate([1.0, 0.0, -3.0, -3.0, 1.0]):
        logits_TE = draw(100, 8, seed=step) + shift
        many = int((logits_TE > 0).sum()) > 2 * 100
        assert many == (shift >= 0)
        train_on(gate, logits_TE)
        expected *= 1.5 if many else 1 / 1.5
        assert gate.l1.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_temperature_schedule(shape: str, steps: bool) -> None:
    lengths: dict[str, Any] = {"decay": 40, "harden": 70} if steps else {"decay": 0.4, "harden": 0.7}
    gate = make_gate(4, name="dense_to_sparse", decay_shape=shape, **lengths)
    assert isinstance(gate, DenseToSparseGate)
    for step in (0, 1, 10, 20, 39, 40, 41, 69, 70, 99):
        gate.begin_step(step, None if steps else 100)
        done = min(1, step / 40)
        expected = 2.0 * (0.3 / 2.0) ** done if shape == "exponential" else 2.0 - 1.7 * done
        assert gate.temperature.item() == pytest.approx(expected, rel=1e-6)
        assert bool(gate.hard) == (step >= 70)
        assert gate(GateInput(draw(3, 4))).metrics["temperature"].item() == pytest.approx(expected, rel=1e-6)
    if not steps:
        with pytest.raises(ValueError, match=r"decay is 0\.4 of the training run"):
            gate.begin_step(5)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda h: h,
    "sigmoid": expit,
    "tanh": np.tanh,
    "gelu": np.vectorize(lambda h: h * 0.5 * (1 + math.erf(h / math.sqrt(2)))),
}


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hard", [True, False])
def test_dense_to_sparse(hard: bool, activation: str, renormalise: bool) -> None:
    num_tokens, num_experts, k, threshold = 50, 6, 2, 0.2
    options = {"activation": activation, "renormalise": renormalise, "threshold": threshold, "decay": 10, "harden": 5}
    gate = make_gate(num_experts, name="dense_to_sparse", k=k, **options)
    gate.begin_step(5 if hard else 4)
    temperature = float(gate.temperature)
    logits_TE = draw(num_tokens, num_experts) * 2
    h = ACTIVATIONS[activation](logits_TE.numpy())
    if gate.offset is not None:
        with torch.no_grad():
            gate.offset.copy_(torch.arange(num_experts) / 4)
        h = h + np.arange(num_experts) / 4
    uniform = torch.rand(h.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    for mode, noise in ((Mode.EVAL, 0.0), (Mode.TRAIN, -np.log(-np.log(uniform)))):
        probs = softmax((h + noise) / temperature)
        mask, weights = np.zeros(probs.shape, dtype=bool), probs.copy()
        for t, row in enumerate(probs):
            chosen = best(row, k) if hard else [e for e in range(num_experts) if row[e] > threshold] or best(row, 1)
            mask[t, chosen] = True
            if renormalise:
                weights[t] /= row[chosen].sum()
        check(gate(GateInput(logits_TE, mode=mode, rng=torch.Generator().manual_seed(3))), mask, weights)
    if hard and activation == "none":
        top = make_gate(num_experts, name="topk", k=k)(GateInput(logits_TE)).plan
        np.testing.assert_array_equal(visits(gate(GateInput(logits_TE)).plan), visits(top))


# ----------------------------------------------------------------------------------------------------------------------
# Zero-computation experts and soft: the whole layer


def expert_output(layer: MoELayer, e: int, x: Array) -> Array:
    weights = {name: value.detach().numpy() for name, value in layer.experts.named_parameters()}
    gate, up, down = weights["w_gate_EDF"][e], weights["w_up_EDF"][e], weights["w_down_EFD"][e]
    inner = x @ gate
    return np.asarray((inner * expit(inner) * (x @ up)) @ down)


def make_layer(dim: int, num_experts: int, gate: dict[str, Any]) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(dim, 12, num_experts, gate).double()
    with torch.no_grad():
        for seed, param in enumerate(layer.gate.parameters()):
            param.copy_(draw(*param.shape, seed=seed) * 0.7)
    return layer


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(
    ("zero", "copies", "constants", "k"), [(1, 1, 2, 2), (0, 1, 2, 3), (1, 0, 3, 2), (1, 2, 0, 4), (0, 0, 0, 2)]
)
def test_zero_computation(zero: int, copies: int, constants: int, k: int, with_residual: bool) -> None:
    num_tokens, dim, num_experts, tau = 40, 8, 4, 0.5
    options = {"zero_experts": zero, "copy_experts": copies, "constant_experts": constants, "k": k, "tau": tau}
    layer = make_layer(dim, num_experts, {"name": "zero_computation", "residual": with_residual, **options})
    gate = layer.gate
    assert isinstance(gate, ZeroComputationGate)
    width = num_experts + zero + copies + constants
    x_TD, before_TA = draw(num_tokens, dim, seed=7), draw(num_tokens, width, seed=8)
    x = x_TD.numpy()
    logits = x @ gate.weight.detach().numpy().T
    if gate.residual is not None:
        logits = logits + before_TA.numpy() @ gate.residual.detach().numpy().T
    probs, y = softmax(logits), np.zeros_like(x)
    load, mean_prob = np.zeros(width), probs.mean(0)
    for t in range(num_tokens):
        chosen = best(logits[t], k)
        weights = {a: 0.0 if zero and a == num_experts else probs[t, a] for a in chosen}
        total = sum(weights.values())
        for a in chosen:
            load[a] += 1
            w = weights[a] / total
            free = a - num_experts - zero
            if a < num_experts:
                y[t] += w * expert_output(layer, a, x[t])
            elif 0 <= free < copies:
                y[t] += w * x[t]
            elif free >= copies:
                assert gate.constant is not None
                assert gate.mix is not None
                c = free - copies
                alpha, beta = softmax(gate.mix.detach().numpy()[2 * c : 2 * c + 2] @ x[t])
                y[t] += w * (alpha * x[t] + beta * gate.constant.detach().numpy()[c])
    ours, routing = layer(x_TD, RoutingContext(prev_logits_TE=before_TA if with_residual else None))
    np.testing.assert_allclose(ours.detach().numpy(), y, rtol=1e-8, atol=1e-10)
    assert routing.plan.load_E.tolist() == load[:num_experts].tolist()
    np.testing.assert_allclose(routing.logits_TE.detach().numpy(), logits, rtol=1e-10, atol=1e-12)
    eta = np.where(np.arange(width) < num_experts, 1, tau)
    balance = (eta * load / load.sum() * mean_prob).sum() * (1 / eta).sum()
    assert routing.aux["balance"].item() == pytest.approx(balance, rel=1e-10)
    assert routing.metrics["free_frac"].item() == pytest.approx(load[num_experts:].sum() / load.sum(), rel=1e-6)
    replayed = gate(GateInput(x_TD + 1, prev_logits_TE=before_TA, replay=routing.plan)).plan
    np.testing.assert_array_equal(visits(replayed), visits(routing.plan))
    assert replayed.undispatched is not None
    np.testing.assert_array_equal(visits(replayed.undispatched), visits(routing.plan.undispatched))


def test_balance_of_zero_computation_is_one_at_its_optimum() -> None:
    """tau = 1/2: each of 4 free experts has twice the load and twice the probability of each of 4 real ones."""
    gate = build_gate({"name": "zero_computation", "tau": 0.5, "residual": False}, 8, 4).double()
    assert isinstance(gate, ZeroComputationGate)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(8))
    pairs = [(0, 4), (1, 5), (2, 6), (3, 7), (4, 5), (6, 7)]
    x_TD = torch.full((6, 8), -100.0, dtype=torch.float64)
    for t, chosen in enumerate(pairs):
        x_TD[t, list(chosen)] = 100.0
    assert gate(GateInput(x_TD)).aux["balance"].item() == pytest.approx(1, rel=1e-12)
    even = torch.zeros(64, 8, dtype=torch.float64)
    even += 1e-9 * draw(64, 8)
    assert gate(GateInput(even)).aux["balance"].item() > 1.05


@pytest.mark.parametrize("slots", [1, 3])
def test_soft(slots: int) -> None:
    num_tokens, dim, num_experts = 14, 8, 4
    layer = make_layer(dim, num_experts, {"name": "soft", "slots": slots})
    gate = layer.gate
    assert isinstance(gate, SoftGate)
    with torch.no_grad():
        gate.scale.fill_(3.0)
    x_TD = draw(num_tokens, dim, seed=7).requires_grad_()
    x, mu = x_TD.detach().numpy(), gate.weight.detach().numpy()
    logits = np.zeros((num_tokens, num_experts * slots))
    for t in range(num_tokens):
        for s in range(num_experts * slots):
            logits[t, s] = 3.0 * (x[t] / np.linalg.norm(x[t])) @ (mu[s] / np.linalg.norm(mu[s]))
    dispatch, combine = softmax(logits.T).T, softmax(logits)
    y = np.zeros_like(x)
    for s in range(num_experts * slots):
        seen = sum(dispatch[t, s] * x[t] for t in range(num_tokens))
        output = expert_output(layer, s // slots, np.asarray(seen))
        for t in range(num_tokens):
            y[t] += combine[t, s] * output
    ours, routing = layer(x_TD)
    np.testing.assert_allclose(ours.detach().numpy(), y, rtol=1e-9, atol=1e-12)
    weights = combine.reshape(num_tokens, num_experts, slots).sum(-1)
    np.testing.assert_allclose(routing.plan.dense_weight_TE().detach().numpy(), weights, rtol=1e-10)
    ours.square().sum().backward()
    for name, param in layer.named_parameters():
        assert param.grad is not None, name
        assert bool(param.grad.any()), name
    assert x_TD.grad is not None


def test_soft_refuses_experts_that_are_spread_over_ranks() -> None:
    class Elsewhere:
        def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Dispatched:
            return LocalDispatcher().dispatch(x_TD, plan)

        def combine(self, y_ND: Tensor, ticket: Any) -> Tensor:
            return LocalDispatcher().combine(y_ND, ticket)

    layer = MoELayer(8, 12, 4, "soft", dispatcher=Elsewhere())
    with pytest.raises(UserError, match=r"parallel\.mode=local"):
        layer(torch.randn(5, 8))
    with pytest.raises(UserError, match="cannot generate text"):
        MoELayer(8, 12, 4, "soft")(torch.randn(5, 8), RoutingContext(mode=Mode.DECODE))


# ----------------------------------------------------------------------------------------------------------------------
# Prescribed routing: hash, forced, replay


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (5, 3), (8, 2), (16, 4), (3, 3)])
def test_hashed_experts_are_distinct_and_even(num_experts: int, k: int) -> None:
    ids_T = torch.arange(20_000)
    expert_TK = hash_experts(ids_T, num_experts, k)
    assert all(len(set(row)) == k for row in expert_TK[:2000].tolist())
    for column in range(k):
        share_E = torch.bincount(expert_TK[:, column], minlength=num_experts) * num_experts / 20_000
        np.testing.assert_allclose(share_E.numpy(), 1, atol=0.1)
    gate = build_gate({"name": "hash", "k": k}, 4, num_experts)
    out = gate(GateInput(torch.randn(20_000, 4), ids_T=ids_T))
    assert torch.equal(out.plan.expert_N.view(-1, k), expert_TK)
    np.testing.assert_allclose(out.plan.weight_N, 1 / k)
    other = hash_experts(ids_T, num_experts, k, seed=1)
    if k < num_experts:
        assert not torch.equal(other.sort(1).values, expert_TK.sort(1).values)


def test_table_balanced_by_frequency() -> None:
    rng = np.random.default_rng(0)
    count_V = torch.from_numpy((1e4 / (1 + rng.permutation(500)) ** 1.1).astype(np.int64))
    table_V1 = balanced_table(count_V, 8)
    load = np.zeros(8)
    np.add.at(load, table_V1[:, 0].numpy(), count_V.numpy())
    assert table_V1.shape == (500, 1)
    assert load.max() - load.min() <= count_V.max()
    loop = np.zeros(8)
    for v in sorted(range(500), key=lambda v: (-int(count_V[v]), v)):
        assert loop[table_V1[v, 0]] == loop.min(), "not the expert with least load so far"
        loop[table_V1[v, 0]] += int(count_V[v])
    without_counts = balanced_table(torch.zeros(24), 8)
    assert torch.bincount(without_counts[:, 0]).tolist() == [3] * 8


def test_tables_by_cluster() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(np.arange(4), 12))
    vectors = rng.normal(size=(4, 6))[cluster] * 10 + rng.normal(size=(48, 6))
    clustered = clustered_table(torch.from_numpy(vectors), 4)[:, 0].numpy()
    dispersed = clustered_table(torch.from_numpy(vectors), 4, dispersed=True)[:, 0].numpy()
    for c in range(4):
        assert len(set(clustered[cluster == c])) == 1, "a cluster is one expert"
        assert np.bincount(dispersed[cluster == c], minlength=4).tolist() == [3] * 4, "a cluster is on all experts"
    assert len(set(clustered)) == 4


def test_hash_with_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.pt"
    options = {"name": "hash", "table": str(path), "vocab_size": 30, "k": 2}
    table_VK = hash_experts(torch.arange(30), 5, 2, seed=7)
    torch.save(table_VK, path)
    gate = build_gate(options, 4, 5)
    ids_T = torch.tensor([29, 0, 7, 7])
    plan = gate(GateInput(torch.zeros(4, 4), ids_T=ids_T)).plan
    assert torch.equal(plan.expert_N.view(-1, 2), table_VK[ids_T])
    for wrong in (30, -1):
        with pytest.raises(ValueError, match=rf"the table knows ids 0 to 29, got .*{wrong}"):
            gate(GateInput(torch.zeros(1, 4), ids_T=torch.tensor([wrong])))
    with pytest.raises(ValueError, match="pass ids_T"):
        gate(GateInput(torch.zeros(1, 4)))
    missing = build_gate({**options, "table": str(tmp_path / "no.pt")}, 4, 5)  # a checkpoint may still fill it
    with pytest.raises(ValueError, match="cannot read"):
        missing.reset_parameters()
    for bad, message in (
        (table_VK[:29], r"must hold an int64 tensor .*\(30, 2\), not torch\.int64 \(29, 2\)"),
        (table_VK.float(), r"not torch\.float32"),
        (table_VK + 1, "not among 0 to 4"),
        (table_VK[:, :1].repeat(1, 2), "same expert twice"),
        ({"table": table_VK}, "not dict"),
    ):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=message):
            build_gate(options, 4, 5)


@pytest.mark.parametrize(
    ("num_experts", "k", "wanted"),
    [(8, 2, 1.0), (8, 2, 1.5), (8, 2, 2.0), (8, 2, 3.5), (16, 1, 4.0), (16, 1, 12.0), (16, 4, 2.0), (5, 1, 1.2)],
)
def test_forced_imbalance(num_experts: int, k: int, wanted: float) -> None:
    num_tokens = 20_000
    gate = build_gate({"name": "forced", "k": k, "imbalance": wanted}, 6, num_experts)
    ids_T = torch.randint(0, 5000, (num_tokens,), generator=torch.Generator().manual_seed(0))
    position_T = torch.arange(num_tokens) % 512
    plans = [
        gate(GateInput(torch.randn(num_tokens, 6) * scale, ids_T=ids_T, position_T=position_T, mode=mode)).plan
        for scale, mode in ((1.0, Mode.TRAIN), (10.0, Mode.EVAL))
    ]
    assert torch.equal(plans[0].expert_N, plans[1].expert_N), "what the tokens say counts"
    assert imbalance(plans[0].load_E).item() == pytest.approx(wanted, rel=0.1)
    assert all(len(set(row)) == k for row in plans[0].expert_N.view(-1, k)[:500].tolist())


def test_drift_moves_who_is_popular() -> None:
    gate = build_gate({"name": "forced", "k": 1, "imbalance": 4.0, "drift": 0.5}, 6, 8)
    place: dict[str, Any] = {"ids_T": torch.arange(4000), "position_T": torch.arange(4000)}
    popular = [
        int(gate(GateInput(torch.zeros(4000, 6), **place, step=step)).plan.load_E.argmax()) for step in range(16)
    ]
    assert all(popular[step] == popular[step + 1] for step in range(0, 16, 2))
    assert sorted(popular[::2]) == list(range(8))


def small_transformer(gate: dict[str, Any], num_experts: int = 4) -> Transformer:
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    config = ModelConfig(**sizes, moe=MoEConfig(num_experts=num_experts, hidden_dim=8))
    torch.manual_seed(0)
    return Transformer(config, gate)


def loads(model: Transformer, ids_BT: Tensor, step: int, row: int = 0, mode: Mode = Mode.TRAIN) -> list[list[int]]:
    routing = model(ids_BT, context=ForwardContext(step=step, mode=mode, row=row)).routing
    return [layer.output.plan.load_E.tolist() for layer in routing]


def test_replay(tmp_path: Path) -> None:
    path = tmp_path / "routing.pt"
    ids_BT = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    recorded_from = small_transformer({"name": "top_p", "p": 0.6, "init_std": 2.0})
    micro_batches = [(step, row) for step in (5, 6, 7) for row in (0, 2)]  # counted from the first recorded step
    with record_routing(recorded_from, path):
        recorded = {key: loads(recorded_from, ids_BT[key[1] : key[1] + 2].roll(key[0]), *key) for key in micro_batches}
        loads(recorded_from, ids_BT, 9, mode=Mode.EVAL)
    assert len({str(value) for value in recorded.values()}) > 3
    model = small_transformer({"name": "replay", "path": str(path)})
    for step, row in [*micro_batches, (8, 0), (10, 2)]:
        again = loads(model, ids_BT[:2], step - 5, row)
        assert again == recorded[5 + (step - 5) % 3, row]
    evaluated = model(ids_BT, context=ForwardContext(mode=Mode.EVAL)).routing[0].output.plan
    assert evaluated.uniform_k == 2
    with pytest.raises(ValueError, match="nothing for step 0, layer 0, sequence 1"):
        loads(model, ids_BT[:2], 0, 1)
    with pytest.raises(ValueError, match="has 24 tokens for step 0, layer 0, sequence 0; 36 are to be routed"):
        loads(model, ids_BT[:3], 0)
    loose = small_transformer({"name": "replay", "path": str(path), "strict": False})
    assert loads(loose, ids_BT.repeat(1, 2), 1)[0] == [4 * load for load in recorded[6, 0][0]]
    with pytest.raises(ValueError, match=r"routes to expert \d, but there are only 2 experts"):
        loads(small_transformer({"name": "replay", "path": str(path)}, num_experts=2), ids_BT[:2], 0)
    with pytest.raises(ValueError, match="path: name the file"):
        small_transformer({"name": "replay"})
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("missing.pt", "other.pt"):
        with pytest.raises(ValueError, match="cannot read"):
            loads(small_transformer({"name": "replay", "path": str(tmp_path / name)}), ids_BT[:2], 0)
    with record_routing(recorded_from, path):
        pass
    with pytest.raises(ValueError, match="holds no step"):
        loads(small_transformer({"name": "replay", "path": str(path)}), ids_BT[:2], 0)


# ----------------------------------------------------------------------------------------------------------------------
# Balance without a loss (R8)


@pytest.mark.parametrize(
    "options",
    [
        {"balance": "quantile"},
        {"balance": "quantile", "k": 1, "renormalise": False},
        {"balance": "quantile", "order": "topk_then_score", "renormalise": False},
        {"balance": "bias", "score": "sigmoid", "bias_update_rate": 1e-3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_skewed_stream_is_balanced(options: dict[str, Any]) -> None:
    num_tokens, num_experts = 1024, 16
    gate = make_gate(num_experts, name="topk", **options)
    assert isinstance(gate, TopKGate)
    skew_E = draw(num_experts, seed=1)

    def stream(step: int) -> Tensor:
        return draw(num_tokens, num_experts, seed=100 + step) + skew_E

    assert imbalance(gate(GateInput(stream(-1))).plan.load_E) > 2.5
    for step in range(600 if options["balance"] == "bias" else 150):  # a bias moves by its rate, a quantile at once
        gate.begin_step(step)
        train_on(gate, stream(step))
    load_E = sum(gate(GateInput(stream(1000 + i))).plan.load_E for i in range(20))
    assert isinstance(load_E, Tensor)
    assert imbalance(load_E).item() < 1.1
