"""Gates that choose by experts, by thresholds or by a controller, each against plain NumPy loops.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gates import GateInput, Mode
from gates.batch_choice import BatchChoiceGate
from gates.dense_to_sparse import DenseToSparseGate
from gates.metrics import imbalance
from gates.relu import ReLUGate
from gates.top_p import TopPGate
from gates.topk import TopKGate
from tests.routing_oracles import Array, Bools, best, check, draw, expit, limit, make_gate, softmax, train_on, visits

pytestmark = pytest.mark.unit


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
