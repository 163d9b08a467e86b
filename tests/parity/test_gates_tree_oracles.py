"""COMET and DSelect-k against recursive NumPy trees; local search against scipy and POT.

Shape suffixes: T tokens, D width, E experts (leaves), K trees or selectors, S splits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gates import Gate, GateInput, GateOutput, Mode, build_gate
from gates.comet import COMETGate
from gates.dselect_k import DSelectKGate
from gates.local_search import LocalSearchGate
from gates.solvers.assignment import hungarian
from gates.solvers.smooth_step import smooth_step
from gates.solvers.soft_tree import leaf_probabilities, leaf_probabilities_reference

pytestmark = pytest.mark.unit
Array = NDArray[np.float64]
D = 10
SIZES = [(num_experts, k) for num_experts in (2, 3, 5, 6, 7, 8, 16) for k in (1, 2, 3) if k <= num_experts]


def randomise(gate: Gate, std: float, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in gate.parameters():
            param.copy_(torch.randn(param.shape, generator=rng, dtype=torch.float64) * std)


def make_comet(num_experts: int, std: float = 0.2, **options: Any) -> COMETGate:
    gate = build_gate({"name": "comet", **options}, D, num_experts).double()
    assert isinstance(gate, COMETGate)
    randomise(gate, std)
    return gate


def make_dselect(num_experts: int, std: float = 0.2, **options: Any) -> DSelectKGate:
    gate = build_gate({"name": "dselect_k", **options}, D, num_experts).double()
    assert isinstance(gate, DSelectKGate)
    randomise(gate, std)
    return gate


def make_tokens(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(value: torch.Tensor) -> Array:
    return np.asarray(value.detach().numpy(), dtype=np.float64)


def rms_normalised(x_TD: torch.Tensor) -> Array:
    x = array(x_TD)
    return np.asarray(x / np.sqrt((x**2).mean(1, keepdims=True)))


def step_up(t: float, gamma: float) -> float:
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * (t / gamma) ** 3 + 1.5 * (t / gamma) + 0.5


def xlogx(value: float) -> float:
    return value * math.log(value) if value > 0 else 0.0


def check(out: GateOutput, weights: Array, visited: NDArray[np.bool_], atol: float = 1e-12) -> None:
    got = np.zeros(visited.shape, dtype=bool)
    got[out.plan.token_N().numpy(), out.plan.expert_N.numpy()] = True
    np.testing.assert_array_equal(got, visited)
    np.testing.assert_allclose(array(out.plan.dense_weight_TE()), weights, rtol=1e-9, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# COMET


def tree_leaves(num_experts: int, splits: Array, gamma: float) -> Array:
    """Probability of each leaf of one tree, by descending from the root."""
    found = np.full(num_experts, np.nan)

    def descend(node: int, reach: float) -> None:
        if node >= num_experts - 1:
            assert np.isnan(found[node - (num_experts - 1)]), "a leaf has two parents"
            found[node - (num_experts - 1)] = reach
            return
        left = step_up(splits[node], gamma)
        descend(2 * node + 1, reach * left)
        descend(2 * node + 2, reach * (1 - left))

    descend(0, 1.0)
    assert not np.isnan(found).any(), "a leaf cannot be reached"
    return found


def comet_parts(gate: COMETGate, x: Array) -> tuple[Array, Array]:
    """(T, K, S) what splits get, (T, K, E) weight logits of leaves."""
    k, num_experts = gate.config.k, gate.num_experts
    splits = x @ array(gate.split_weight).T + array(gate.split_bias)
    leaves = x @ array(gate.leaf_weight).T + array(gate.leaf_bias)
    return splits.reshape(len(x), k, num_experts - 1), leaves.reshape(len(x), k, num_experts)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_comet(num_experts: int, k: int, normalise: bool) -> None:
    num_tokens, gamma = 25, 1.0
    gate = make_comet(num_experts, k=k, gamma=gamma, normalise=normalise, entropy_warmup=4)
    gate.begin_step(3)
    x_TD = make_tokens(num_tokens)
    splits, leaf_logits = comet_parts(gate, rms_normalised(x_TD) if normalise else array(x_TD))
    weights, entropy = np.zeros((num_tokens, num_experts)), 0.0
    visited, mass = np.zeros((num_tokens, num_experts), dtype=bool), np.zeros(num_experts)
    for t in range(num_tokens):
        total = 0.0
        for j in range(k):
            v = tree_leaves(num_experts, splits[t, j], gamma)
            assert v.sum() == pytest.approx(1, abs=1e-12)
            mass += v
            entropy -= sum(xlogx(p) for p in v)
            for e in range(num_experts):
                weights[t, e] += v[e] * math.exp(leaf_logits[t, j, e])
                total += v[e] * math.exp(leaf_logits[t, j, e])
                visited[t, e] |= v[e] > 0
        weights[t] /= total
    if k == 1:
        assert not visited.all(), "no exact zeros were tried"
    out = gate(GateInput(x_TD))
    check(out, weights, visited)
    assert out.aux["entropy"].item() == pytest.approx(0.75 * entropy / num_tokens, rel=1e-9)
    assert out.metrics["split_entropy"].item() == pytest.approx(entropy / num_tokens, rel=1e-9)
    share = mass / (num_tokens * k)
    assert out.aux["balance"].item() == pytest.approx(num_experts * (share**2).sum(), rel=1e-9)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_comet_hard_limit(num_experts: int, k: int) -> None:
    """All splits decided: each tree names the one leaf all of whose ancestors send the token its way."""
    gate, x_TD = make_comet(num_experts, std=0.5, k=k, gamma=1e-9), make_tokens(60)
    splits, leaf_logits = comet_parts(gate, rms_normalised(x_TD))
    weights, visited = np.zeros((60, num_experts)), np.zeros((60, num_experts), dtype=bool)
    for t in range(60):
        for j in range(k):
            reached = []
            for e in range(num_experts):
                node, fits = e + num_experts - 1, True
                while node > 0:
                    parent, is_left = (node - 1) // 2, node % 2 == 1
                    fits &= (splits[t, j, parent] > 0) == is_left
                    node = parent
                if fits:
                    reached.append(e)
            assert len(reached) == 1
            visited[t, reached[0]] = True
            weights[t, reached[0]] += math.exp(leaf_logits[t, j, reached[0]])
        weights[t] /= weights[t].sum()
    out = gate(GateInput(x_TD))
    check(out, weights, visited)
    assert out.metrics["split_entropy"].item() == pytest.approx(0, abs=1e-12)
    if k == 1:
        assert bool((out.plan.weight_N == 1).all())


def test_comet_balance_is_one_where_leaves_share_evenly() -> None:
    """Undecided splits of a full tree reach each of 8 leaves with probability 1/8."""
    gate = make_comet(8, std=0.0, k=2)
    out = gate(GateInput(make_tokens(12)))
    assert out.aux["balance"].item() == pytest.approx(1, abs=1e-12)
    assert out.metrics["split_entropy"].item() == pytest.approx(2 * math.log(8), rel=1e-12)
    np.testing.assert_allclose(array(out.plan.weight_N), 1 / 8, rtol=1e-12)


@pytest.mark.parametrize("name", ["comet", "dselect_k"])
def test_entropy_warm_up(name: str) -> None:
    x_TD = make_tokens(10)
    key = "split_entropy" if name == "comet" else "selector_entropy"
    make = make_comet if name == "comet" else make_dselect
    gate = make(5, std=0.05, entropy_warmup=0.25)
    for step, expected in ((0, 0.0), (10, 0.1), (25, 0.25), (99, 0.99), (100, 1.0), (399, 1.0)):
        gate.begin_step(step, 400)
        out = gate(GateInput(x_TD))
        assert out.aux["entropy"].item() == pytest.approx(expected * out.metrics[key].item(), rel=1e-6, abs=1e-12)
    with pytest.raises(ValueError, match=r"entropy_warmup is 0\.25 of the training run"):
        gate.begin_step(0)
    at_once = make(5, entropy_warmup=0.0)
    at_once.begin_step(0, 400)
    assert at_once.warmth.item() == 1


@pytest.mark.parametrize("num_experts", [2, 3, 5, 6, 7, 8, 16])
def test_leaf_probabilities(num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    drawn = rng.uniform(-1, 1, (3, num_experts - 1, 6))
    split = torch.from_numpy(drawn)
    v_KET = leaf_probabilities(split, 1.5)
    expected = np.stack(
        [np.stack([tree_leaves(num_experts, drawn[j, :, t], 1.5) for t in range(6)], 1) for j in range(3)]
    )
    assert (expected == 0).any()
    np.testing.assert_array_equal(v_KET.numpy() == 0, expected == 0)
    np.testing.assert_allclose(v_KET.numpy(), expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(v_KET.sum(1).numpy(), 1, rtol=1e-12)
    torch.testing.assert_close(v_KET, leaf_probabilities_reference(split, 1.5), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_experts", [2, 3, 5, 6, 7, 8, 16])
def test_gradients_of_leaf_probabilities(num_experts: int) -> None:
    rng = torch.Generator().manual_seed(num_experts)
    gamma = 1.5
    split = torch.rand(2, num_experts - 1, 4, generator=rng, dtype=torch.float64) * 2 - 1
    near_kink = (split.abs() - gamma / 2).abs() < 1e-3
    split = (split + near_kink * 0.01).requires_grad_()
    assert bool((split.abs() > gamma / 2).any())
    upstream = torch.randn(2, num_experts, 4, generator=rng, dtype=torch.float64)
    grads = [
        torch.autograd.grad((leaves(split, gamma) * upstream).sum(), split)[0]
        for leaves in (leaf_probabilities, leaf_probabilities_reference)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)
    assert bool((grads[0][split.abs() > gamma / 2] == 0).all())
    assert torch.autograd.gradcheck(lambda s: leaf_probabilities(s, gamma), (split,))


def test_smooth_step() -> None:
    values = np.concatenate([np.linspace(-2, 2, 201), [-0.75, 0.75]])
    expected = [step_up(float(value), 1.5) for value in values]
    np.testing.assert_allclose(smooth_step(torch.from_numpy(values), 1.5).numpy(), expected, rtol=1e-10, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# DSelect-k


def codes(bits: list[float]) -> list[float]:
    """Probability of each number of so many bits; the first bit is the lowest."""
    if not bits:
        return [1.0]
    *lower, top = bits
    below = codes(lower)
    return [(1 - top) * p for p in below] + [top * p for p in below]


def dselect_parts(gate: DSelectKGate, x_TD: torch.Tensor) -> tuple[Array, Array]:
    """(T, K, bits) what smooth steps get, (T, K) logits of selectors."""
    k, num_tokens = gate.config.k, x_TD.shape[0]
    x = rms_normalised(x_TD) if gate.config.normalise else array(x_TD)
    bits = np.tile(array(gate.bit_bias), (num_tokens, 1))
    selectors = np.tile(array(gate.selector_bias), (num_tokens, 1))
    if gate.bit_weight is not None and gate.selector_weight is not None:
        bits += x @ array(gate.bit_weight).T
        selectors += x @ array(gate.selector_weight).T
    return bits.reshape(num_tokens, k, -1), selectors


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"per_token": False}])
@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_dselect_k(num_experts: int, k: int, options: dict[str, Any]) -> None:
    num_tokens, gamma = 25, 1.0
    gate = make_dselect(num_experts, k=k, gamma=gamma, entropy_warmup=4, **options)
    gate.begin_step(1)
    x_TD = make_tokens(num_tokens)
    bits, selectors = dselect_parts(gate, x_TD)
    assert bits.shape[2] == math.ceil(math.log2(num_experts))
    weights, visited = np.zeros((num_tokens, num_experts)), np.zeros((num_tokens, num_experts), dtype=bool)
    entropy, reachable, mass = 0.0, 0.0, np.zeros(num_experts)
    for t in range(num_tokens):
        softmax = np.exp(selectors[t]) / np.exp(selectors[t]).sum()
        for j in range(k):
            all_codes = codes([step_up(value, gamma) for value in bits[t, j]])
            assert sum(all_codes) == pytest.approx(1, abs=1e-12)
            r = np.array(all_codes[:num_experts])
            weights[t] += softmax[j] * r
            visited[t] |= r > 0
            entropy -= sum(xlogx(p) for p in r)
            reachable -= math.log((r.sum() + 1e-6) / (1 + 1e-6))
            mass += r
        if visited[t].any():
            weights[t] /= weights[t].sum()
    out = gate(GateInput(x_TD))
    check(out, weights, visited)
    assert out.aux["entropy"].item() == pytest.approx(0.25 * entropy / num_tokens, rel=1e-9, abs=1e-14)
    assert out.aux["reachable"].item() == pytest.approx(reachable / num_tokens, rel=1e-8, abs=1e-9)
    share = mass / mass.sum()
    assert out.aux["balance"].item() == pytest.approx(num_experts * (share**2).sum(), rel=1e-9)
    assert out.metrics["uncovered_frac"].item() == pytest.approx(1 - visited.any(1).mean(), abs=1e-6)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_dselect_k_hard_limit(num_experts: int, k: int) -> None:
    """Each selector names the number whose bits are the signs; a number that is no expert is nobody."""
    gate, x_TD = make_dselect(num_experts, std=0.5, k=k, gamma=1e-9), make_tokens(60)
    bits, selectors = dselect_parts(gate, x_TD)
    weights, visited = np.zeros((60, num_experts)), np.zeros((60, num_experts), dtype=bool)
    for t in range(60):
        for j in range(k):
            number = sum(2**b for b, value in enumerate(bits[t, j]) if value > 0)
            if number < num_experts:
                visited[t, number] = True
                weights[t, number] += math.exp(selectors[t, j])
        if visited[t].any():
            weights[t] /= weights[t].sum()
    out = gate(GateInput(x_TD))
    check(out, weights, visited)
    assert out.plan.row_ptr_T1.diff().max() <= k
    lost = ~visited.any(1)
    assert out.metrics["uncovered_frac"].item() == pytest.approx(lost.mean(), abs=1e-6)
    if num_experts in (3, 5) and k == 1:
        assert lost.any(), "no code without an expert was tried"


def test_dselect_k_reachable_loss_is_zero_where_all_codes_name_experts() -> None:
    out = make_dselect(8)(GateInput(make_tokens(20)))
    assert out.aux["reachable"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("balanced", [True, False])
def test_comet_collapses_without_its_balance_loss_and_not_with_it(balanced: bool) -> None:
    """What sparsifies the trees sends nearly all tokens to one leaf, unless the mass of leaves is kept even."""
    options = {} if balanced else {"balance_coef": 0.0}
    gate = build_gate({"name": "comet", "k": 1, **options}, D, 8)
    rng = torch.Generator().manual_seed(0)
    gate.reset_parameters(rng)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    coefs = gate.config.aux_coefs()
    for step in range(150):
        gate.begin_step(step, 150)
        out = gate(GateInput(torch.randn(256, D, generator=rng) + 0.5, mode=Mode.TRAIN))
        loss = torch.stack([coefs[name] * value for name, value in out.aux.items()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    load_E = gate(GateInput(torch.randn(2048, D, generator=rng) + 0.5)).plan.load_E.double()
    imbalance = float(load_E.max() / load_E.mean())
    assert imbalance < 1.5 if balanced else imbalance > 4


# ----------------------------------------------------------------------------------------------------------------------
# Local search


def make_search(num_experts: int, inner: dict[str, Any] | None = None, **options: Any) -> LocalSearchGate:
    config = {"name": "local_search", "gate": inner or {"name": "topk"}, "search": 10, **options}
    gate = build_gate(config, D, num_experts).double()
    assert isinstance(gate, LocalSearchGate)
    randomise(gate, 0.5)
    return gate


def linear_sum_assignment(scores: Array) -> list[int]:
    rows, columns = pytest.importorskip("scipy.optimize").linear_sum_assignment(scores, maximize=True)
    assert rows.tolist() == list(range(len(scores)))
    found: list[int] = columns.tolist()
    return found


def relaxed_by_pot(gate: LocalSearchGate) -> Array:
    ot = pytest.importorskip("ot")
    size = gate.num_experts
    even = np.full(size, 1 / size)
    cost = -array(gate.score_EE)
    plan = ot.sinkhorn(even, even, cost, float(gate.tau), method="sinkhorn_log", numItermax=20000, stopThr=1e-13)
    return np.asarray(plan * size)


def relaxed_of(gate: LocalSearchGate, x_TD: torch.Tensor) -> Array:
    """The relaxed permutation, from what it does to the inner gate's weights."""
    inner = array(gate.inner(GateInput(x_TD)).plan.dense_weight_TE())
    weights = array(gate(GateInput(x_TD, mode=Mode.TRAIN)).plan.dense_weight_TE())
    assert np.linalg.matrix_rank(inner) == gate.num_experts
    return np.asarray(np.linalg.lstsq(inner, weights, rcond=None)[0])


@pytest.mark.parametrize("solver", [{}, {"solver": "sinkhorn", "sinkhorn_start": 400, "sinkhorn_end": 400}])
@pytest.mark.parametrize("num_experts", [2, 3, 5, 8, 16])
def test_relaxed_permutation(num_experts: int, solver: dict[str, Any]) -> None:
    inner = {"name": "topk", "k": 1, "renormalise": False}
    gate = make_search(num_experts, inner, tau_start=0.5, **solver)
    gate.begin_step(0)
    x_TD = make_tokens(200)
    p_EE = relaxed_of(gate, x_TD)
    np.testing.assert_allclose(p_EE.sum(1), 1, rtol=1e-9)
    np.testing.assert_allclose(p_EE.sum(0), 1, rtol=1e-6)
    expected = relaxed_by_pot(gate)
    np.testing.assert_allclose(p_EE, expected, rtol=1e-6, atol=1e-9)
    out = gate(GateInput(x_TD, mode=Mode.TRAIN))
    assert out.plan.load_E.tolist() == [200] * num_experts
    entropy = -sum(xlogx(float(p)) for p in expected.ravel())
    assert out.aux["permutation"].item() == pytest.approx(2 * entropy, rel=1e-5)
    assert out.metrics["permutation_entropy"].item() == pytest.approx(entropy / num_experts, rel=1e-5)
    assert gate.nearest_permutation().tolist() == linear_sum_assignment(np.log(expected))


def test_search_schedule() -> None:
    gate = make_search(4, search=0.5, tau_start=0.1, tau_end=1e-3)
    for step in (0, 1, 25, 49):
        gate.begin_step(step, 100)
        done = step / 49
        assert gate.tau.item() == pytest.approx(10 ** (-1 - 2 * done), rel=1e-5)
        assert abs(int(gate.iterations) - (20 + done * 130)) <= 0.5
        assert not bool(gate.frozen)
    gate.begin_step(50, 100)
    assert bool(gate.frozen)
    paper = make_search(4, preset="paper", search=10)
    paper.begin_step(9)
    assert paper.tau.item() == pytest.approx(1e-7, rel=1e-4)
    whole = make_search(4, search=10)
    whole.begin_step(8, 10)
    assert not bool(whole.frozen)
    whole.begin_step(9, 10)  # a search as long as training: there is no step 10
    assert bool(whole.frozen)
    with pytest.raises(ValueError, match="search"):
        make_search(4, search=0.5).begin_step(0)


@pytest.mark.parametrize(
    "inner", [{"name": "topk"}, {"name": "topk", "k": 1, "renormalise": False}, {"name": "comet", "entropy_warmup": 1}]
)
def test_frozen_permutation_relabels_the_gate_within(inner: dict[str, Any]) -> None:
    gate, x_TD = make_search(8, inner), make_tokens(50)
    gate.begin_step(3)
    permutation = gate.nearest_permutation().tolist()
    assert permutation != list(range(8))
    unfrozen = gate(GateInput(x_TD))
    gate.begin_step(10)
    assert gate.expert_of_E.tolist() == permutation
    with torch.no_grad():
        gate.score_EE.normal_()
    gate.begin_step(11)
    assert gate.expert_of_E.tolist() == permutation, "frozen once"
    plain = gate.inner(GateInput(x_TD))
    relabelled = np.zeros((50, 8))
    relabelled[:, permutation] = array(plain.plan.dense_weight_TE())
    visited = np.zeros((50, 8), dtype=bool)
    visited[plain.plan.token_N().numpy(), np.array(permutation)[plain.plan.expert_N.numpy()]] = True
    for mode in (Mode.TRAIN, Mode.EVAL, Mode.PREFILL):
        out = gate(GateInput(x_TD, mode=mode))
        check(out, relabelled, visited)
        assert out.logits_TE is not None
        np.testing.assert_array_equal(array(out.logits_TE), array(plain.logits_TE))  # as the search showed them
        loads = np.zeros(8, dtype=int)
        loads[permutation] = plain.plan.load_E.numpy()
        assert out.plan.load_E.tolist() == loads.tolist()
    check(unfrozen, relabelled, visited)


def test_frozen_permutation_hands_back_loads_under_inner_labels() -> None:
    gate = make_search(4, {"name": "topk", "score": "sigmoid", "balance": "bias", "bias_update_rate": 0.1})
    gate.begin_step(10)
    gate.expert_of_E.copy_(torch.tensor([2, 0, 3, 1]))
    gate.end_step(torch.tensor([10, 40, 5, 25]), {})  # expert 0 within is 2 outside: 5, then 10, 25, 40
    bias_E = dict(gate.inner.named_buffers())["selection_bias"]
    assert [round(float(b) * 10) for b in bias_E - bias_E.mean()] == [1, 1, -1, -1]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 6, 17, 40])
def test_hungarian(num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    row = np.arange(num_experts)
    unique, with_ties = rng.normal(size=(num_experts, num_experts)), rng.integers(0, 4, (num_experts, num_experts))
    for scores in (unique, with_ties.astype(float)):
        permutation = hungarian(torch.from_numpy(scores)).tolist()
        assert sorted(permutation) == list(range(num_experts))
        best = scores[row, linear_sum_assignment(scores)].sum()
        assert scores[row, permutation].sum() == pytest.approx(best, abs=1e-12)
    assert hungarian(torch.from_numpy(unique)).tolist() == linear_sum_assignment(unique)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("num_experts", [3, 8, 32])
def test_planted_permutation_is_found(num_experts: int, preset: str) -> None:
    rng = np.random.default_rng(num_experts)
    planted = rng.permutation(num_experts)
    scores = rng.uniform(-0.05, 0.05, (num_experts, num_experts))
    scores[np.arange(num_experts), planted] += 0.3
    scores += rng.normal(size=(num_experts, 1)) + rng.normal(size=(1, num_experts))  # which match does not depend on
    gate = make_search(num_experts, preset=preset)
    with torch.no_grad():
        gate.score_EE.copy_(torch.from_numpy(scores))
    for step in range(11):
        gate.begin_step(step)
    assert gate.expert_of_E.tolist() == planted.tolist()
