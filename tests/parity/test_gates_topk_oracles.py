"""Each published top-k gate against a NumPy loop written from its paper or reference code.

Shape suffixes: T tokens, D width, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gates import GateInput, GateOutput, Mode, TopKGate, build_gate

pytestmark = pytest.mark.unit
Array = NDArray[np.float64]
D = 10


def make_gate(num_experts: int, seed: int = 0, **options: Any) -> TopKGate:
    gate = build_gate({"name": "topk", **options}, D, num_experts)
    assert isinstance(gate, TopKGate)
    gate = gate.double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in gate.parameters():
            param.copy_(torch.randn(param.shape, generator=rng, dtype=torch.float64) * 0.5)
    return gate


def make_tokens(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_logits(gate: TopKGate, x_TD: torch.Tensor) -> Array:
    return np.asarray(x_TD.numpy() @ gate.weight.detach().numpy().T)


def softmax(row: Array) -> Array:
    shifted = np.exp(row - row.max())
    return np.asarray(shifted / shifted.sum())


def best(row: Array, k: int) -> list[int]:
    """Indices of the k largest, ties to the lower index."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def check(out: GateOutput, expected: list[dict[int, float]]) -> None:
    """The plan has exactly these weights by expert in each row."""
    num_experts = out.plan.num_experts
    dense = np.zeros((len(expected), num_experts))
    visited = np.zeros_like(dense)
    for t, row in enumerate(expected):
        for e, weight in row.items():
            dense[t, e], visited[t, e] = weight, 1
    got = np.zeros_like(visited)
    got[out.plan.token_N().numpy(), out.plan.expert_N.numpy()] = 1
    np.testing.assert_array_equal(got, visited)
    np.testing.assert_allclose(out.plan.dense_weight_TE().detach().numpy(), dense, rtol=1e-10, atol=1e-14)


def test_mixtral() -> None:
    gate, x_TD = make_gate(8), make_tokens(60)
    expected = []
    for row in numpy_logits(gate, x_TD):
        p = softmax(row)
        chosen = best(p, 2)
        expected.append({e: p[e] / p[chosen].sum() for e in chosen})
    check(gate(GateInput(x_TD)), expected)
    check(make_gate(8, order="topk_then_score", renormalise=False)(GateInput(x_TD)), expected)


def test_softmax_without_renormalisation_differs_from_softmax_of_the_chosen() -> None:
    x_TD = make_tokens(40)
    gate = make_gate(8, renormalise=False, k=3)
    expected = []
    for row in numpy_logits(gate, x_TD):
        p = softmax(row)
        expected.append({e: p[e] for e in best(p, 3)})
    out = gate(GateInput(x_TD))
    check(out, expected)
    chosen_only = make_gate(8, order="topk_then_score", renormalise=False, k=3)(GateInput(x_TD))
    assert torch.equal(out.plan.expert_N, chosen_only.plan.expert_N)
    gap_N = (chosen_only.plan.weight_N - out.plan.weight_N).detach()
    assert bool((gap_N > 0).all())
    assert gap_N.mean().item() > 0.05


def test_switch() -> None:
    """k = 1, weight p_top1, capacity in order of position; jitter on what the gate sees (arXiv 2101.03961)."""
    num_tokens, num_experts, factor, jitter = 50, 6, 1.25, 0.1
    gate = make_gate(num_experts, k=1, renormalise=False, jitter=jitter, capacity_factor=factor)
    x_TD = make_tokens(num_tokens)
    noise = torch.rand(x_TD.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    seen_TD = x_TD * (1 - jitter + 2 * jitter * noise)
    capacity = math.ceil(factor * num_tokens / num_experts)
    taken, expected = [0] * num_experts, []
    for row in numpy_logits(gate, seen_TD):
        p = softmax(row)
        e = best(p, 1)[0]
        expected.append({e: p[e]} if taken[e] < capacity else {})
        taken[e] += 1
    assert {} in expected
    out = gate(GateInput(x_TD, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(7)))
    check(out, expected)
    assert out.plan.offered_E.tolist() == taken
    assert float(out.metrics["dropped_frac"]) == pytest.approx(expected.count({}) / num_tokens)
    assert gate(GateInput(x_TD, mode=Mode.EVAL)).plan.num_pairs == num_tokens


def deepseek_v3(logits: Array, bias: Array, *, k: int, groups: int, used: int, scale: float, mask: float) -> Any:
    """Selection and weights of DeepSeek-V3's reference gate; ``mask`` is what closed groups' scores become."""
    expected = []
    width = logits.shape[1] // groups
    for row in logits:
        s = 1 / (1 + np.exp(-row))
        choice = s + bias
        group_scores = np.array([np.sort(choice[g * width : (g + 1) * width])[-2:].sum() for g in range(groups)])
        opened = best(group_scores, used)
        masked = np.array([choice[e] if e // width in opened else mask for e in range(len(row))])
        chosen = best(masked, k)
        expected.append({e: s[e] / s[chosen].sum() * scale for e in chosen})
    return expected


@pytest.mark.parametrize("bias_value", [0.0, -1.0])
def test_deepseek_v3(bias_value: float) -> None:
    """A bias of -1 makes every open score negative: a mask of 0 (as one transformers version had) would then win."""
    options: dict[str, Any] = {"k": 4, "score": "sigmoid", "scale": 2.5, "balance": "bias"}
    gate = make_gate(16, num_groups=4, topk_groups=2, **options)
    assert gate.selection_bias is not None
    rng = np.random.default_rng(0)
    bias = np.full(16, bias_value) if bias_value else rng.normal(0, 0.3, 16)
    gate.selection_bias.copy_(torch.from_numpy(bias))
    x_TD = make_tokens(60)
    shape: dict[str, Any] = {"k": 4, "groups": 4, "used": 2, "scale": 2.5}
    expected = deepseek_v3(numpy_logits(gate, x_TD), bias, mask=-np.inf, **shape)
    check(gate(GateInput(x_TD)), expected)
    if bias_value:
        masked_by_zero = deepseek_v3(numpy_logits(gate, x_TD), bias, mask=0.0, **shape)
        differing = sum(a.keys() != b.keys() for a, b in zip(expected, masked_by_zero, strict=True))
        assert differing == 60, "the regression would go unnoticed"


def test_deepseek_v2_groups_by_their_best_expert() -> None:
    gate, x_TD = make_gate(12, k=3, renormalise=False, num_groups=4, topk_groups=2, group_top=1), make_tokens(50)
    expected = []
    for row in numpy_logits(gate, x_TD):
        p = softmax(row)
        opened = best(p.reshape(4, 3).max(1), 2)
        masked = np.array([p[e] if e // 3 in opened else -np.inf for e in range(12)])
        expected.append({e: p[e] for e in best(masked, 3)})
    check(gate(GateInput(x_TD)), expected)


@pytest.mark.parametrize("renormalise", [True, False])
def test_sqrt_softplus(renormalise: bool) -> None:
    gate, x_TD = make_gate(8, score="sqrt_softplus", renormalise=renormalise, k=3), make_tokens(50)
    expected = []
    for row in numpy_logits(gate, x_TD):
        s = np.sqrt(np.log1p(np.exp(row)))
        chosen = best(s, 3)
        total = s[chosen].sum() if renormalise else 1.0
        expected.append({e: s[e] / total for e in chosen})
    check(gate(GateInput(x_TD)), expected)


def test_gshard_top2() -> None:
    """DeepSpeed's top2gating: Gumbel second choice, first choices served first, weights over the surviving pair."""
    num_tokens, num_experts, factor = 40, 5, 0.8
    options: dict[str, Any] = {"noise": "second_choice", "capacity_factor": factor, "drop_policy": "choice"}
    gate, x_TD = make_gate(num_experts, **options, renormalise_kept=True), make_tokens(num_tokens)
    uniform = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gumbel = -np.log(-np.log(uniform.numpy()))
    logits = numpy_logits(gate, x_TD)
    first = [best(row, 1)[0] for row in logits]
    second = []
    for t in range(num_tokens):
        noisy = logits[t] + gumbel[t]
        noisy[first[t]] = -np.inf
        second.append(best(noisy, 1)[0])
    capacity = math.ceil(2 * factor * num_tokens / num_experts)
    taken = [0] * num_experts
    kept: list[dict[int, float]] = [{} for _ in range(num_tokens)]
    for choices in (first, second):
        for t, e in enumerate(choices):
            if taken[e] < capacity:
                kept[t][e] = softmax(logits[t])[e]
            taken[e] += 1
    assert {len(row) for row in kept} == {0, 1, 2}
    expected = [{e: w / sum(row.values()) for e, w in row.items()} for row in kept]
    check(gate(GateInput(x_TD, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(3))), expected)
    noiseless = gate(GateInput(x_TD, mode=Mode.EVAL)).plan.expert_N.view(-1, 2).tolist()
    assert noiseless == [best(row, 2) for row in logits]


def cv_squared(values: Array) -> float:
    return float(values.var() / values.mean() ** 2)


def normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noisy_topk(k: int) -> None:
    """Shazeer et al. 2017, equations 3 to 10."""
    num_tokens, num_experts = 30, 6
    order = {"renormalise": False} if k == 1 else {"order": "topk_then_score"}
    gate = make_gate(num_experts, k=k, noise="learned", importance_coef=1.0, load_coef=1.0, **order)
    assert gate.noise_weight is not None
    x_TD = make_tokens(num_tokens)
    drawn = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    clean = numpy_logits(gate, x_TD)
    std = np.log1p(np.exp(x_TD.numpy() @ gate.noise_weight.detach().numpy().T))
    noisy = clean + std * drawn.numpy()
    expected, importance, load = [], np.zeros(num_experts), np.zeros(num_experts)
    for t in range(num_tokens):
        chosen = best(noisy[t], k)
        row = softmax(noisy[t])[chosen] if k == 1 else softmax(noisy[t][chosen])
        expected.append(dict(zip(chosen, row.tolist(), strict=True)))
        for e in range(num_experts):
            importance[e] += expected[t].get(e, 0.0)
            others = [noisy[t, other] for other in range(num_experts) if other != e]
            kth_excluding = sorted(others, reverse=True)[k - 1]
            load[e] += normal_cdf((clean[t, e] - kth_excluding) / std[t, e])
    out = gate(GateInput(x_TD, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(5)))
    check(out, expected)
    assert out.aux["importance"].item() == pytest.approx(cv_squared(importance), rel=1e-10)
    assert out.aux["load"].item() == pytest.approx(cv_squared(load), rel=1e-10)
    quiet = gate(GateInput(x_TD, mode=Mode.EVAL)).plan.expert_N.view(-1, k).tolist()
    assert quiet == [best(row, k) for row in clean]


def test_noisy_topk_starts_with_one_noise_width_for_all_tokens() -> None:
    gate = build_gate({"name": "topk", "noise": "learned"}, D, 4)
    assert isinstance(gate, TopKGate)
    assert gate.noise_weight is not None
    assert not bool(gate.noise_weight.any())
    assert sum(p.numel() for p in gate.parameters()) == 2 * 4 * D


def test_vmoe() -> None:
    """Fixed noise of width std/E; losses on clean probabilities and the k-th noisy logit (arXiv 2106.05974, app. A)."""
    num_tokens, num_experts, k, noise_std = 30, 6, 2, 2.0
    options: dict[str, Any] = {"noise": "fixed", "noise_std": noise_std, "importance_coef": 1.0, "load_coef": 1.0}
    gate, x_TD = make_gate(num_experts, renormalise=False, **options), make_tokens(num_tokens)
    drawn = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    clean, std = numpy_logits(gate, x_TD), noise_std / num_experts
    noisy = clean + std * drawn.numpy()
    expected, load = [], np.zeros(num_experts)
    for t in range(num_tokens):
        chosen = best(noisy[t], k)
        expected.append({e: softmax(noisy[t])[e] for e in chosen})
        for e in range(num_experts):
            load[e] += normal_cdf((clean[t, e] - noisy[t][chosen[-1]]) / std)
    importance = np.sum([softmax(row) for row in clean], axis=0)
    out = gate(GateInput(x_TD, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(5)))
    check(out, expected)
    assert out.aux["importance"].item() == pytest.approx(cv_squared(importance), rel=1e-10)
    assert out.aux["load"].item() == pytest.approx(cv_squared(load), rel=1e-10)


def test_batch_prioritised_drop() -> None:
    """DeepSpeed's topkgating with drop_policy "probs": each expert keeps its most probable pairs."""
    num_tokens, num_experts, k = 40, 5, 2
    gate = make_gate(num_experts, renormalise=False, capacity_factor=0.75, drop_policy="probs")
    x_TD = make_tokens(num_tokens)
    p = np.array([softmax(row) for row in numpy_logits(gate, x_TD)])
    capacity = math.ceil(0.75 * k * num_tokens / num_experts)
    expected: list[dict[int, float]] = [{} for _ in range(num_tokens)]
    for e in range(num_experts):
        wanting = [t for t in range(num_tokens) if e in best(p[t], k)]
        for t in sorted(wanting, key=lambda t: -p[t, e])[:capacity]:
            expected[t][e] = p[t, e]
    check(gate(GateInput(x_TD, mode=Mode.TRAIN)), expected)


def test_capacity_drops_next_to_nothing_when_load_is_even() -> None:
    """DeepSpeed pull request 7986: ranking by unmasked logits kept a thousandth of the pairs."""
    for policy in ("position", "choice", "probs"):
        gate = make_gate(8, capacity_factor=1.25, drop_policy=policy)
        x_TD = torch.zeros(64, D, dtype=torch.float64)
        x_TD[:, :8] = torch.eye(8, dtype=torch.float64).repeat(8, 1) + torch.eye(8).roll(1, 1).repeat(8, 1) * 0.5
        with torch.no_grad():
            gate.weight.copy_(torch.eye(8, D))
        plan = gate(GateInput(x_TD, mode=Mode.TRAIN)).plan
        assert plan.load_E.tolist() == [16] * 8


def test_the_bias_selects_but_never_weighs() -> None:
    gate, x_TD = make_gate(6, score="sigmoid", balance="frozen", renormalise=False), make_tokens(30)
    assert gate.selection_bias is not None
    gate.selection_bias[4] = 10.0
    out = gate(GateInput(x_TD))
    assert bool((out.plan.expert_N.view(-1, 2)[:, 0] == 4).all())
    s = 1 / (1 + np.exp(-numpy_logits(gate, x_TD)))
    np.testing.assert_allclose(out.plan.weight_N.detach().view(-1, 2)[:, 0].numpy(), s[:, 4], rtol=1e-12)


def test_topk_then_score_adds_the_bias_to_logits() -> None:
    options: dict[str, Any] = {"score": "sigmoid", "balance": "frozen"}
    bias = np.array([3.0, 0, 0, 0, 0, 0])
    x_TD = make_tokens(60) * 3
    for order, shifted in (("topk_then_score", lambda h: h + bias), ("score_then_topk", lambda h: expit(h) + bias)):
        gate = make_gate(6, order=order, **options)
        assert gate.selection_bias is not None
        gate.selection_bias.copy_(torch.from_numpy(bias))
        expected = []
        for row in numpy_logits(gate, x_TD):
            chosen, s = best(shifted(row), 2), expit(row)
            expected.append({e: s[e] / s[chosen].sum() for e in chosen})
        check(gate(GateInput(x_TD)), expected)


def expit(row: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-row)))
