"""Defects that a review found in gates, each with the smallest case that showed it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gates import GateInput, Mode, RoutingPlan, build_gate, parse_gate_config
from gates.local_search import LocalSearchGate
from gates.plan import PlanKind, apply_permutation
from gates.solvers.sparse_ot import solve_semi_dual

pytestmark = pytest.mark.unit
D = 8


def make_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def make_search(gate: dict[str, Any], **options: Any) -> LocalSearchGate:
    built = build_gate({"name": "local_search", "gate": gate, "search": 10, **options}, D, 4)
    assert isinstance(built, LocalSearchGate)
    return built


@pytest.mark.parametrize("columns", [512, 8192])
def test_newton_meets_the_marginals_for_many_tokens_too(columns: int) -> None:
    score_BN = torch.randn(columns, 8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = solve_semi_dual(score_BN, 2, 0.1, row_mass=columns / 8, column_mass=1.0, solver="newton", iterations=20)
    assert found.alpha_N.dtype == torch.float32
    assert found.violation * columns / 8 < 1.01  # one token: its best two change at the optimum


@pytest.mark.parametrize("similarity", ["softmax", "logits"])
def test_transport_by_experts_routes_sparsely_before_it_has_thresholds(similarity: str) -> None:
    gate = build_gate({"name": "sparse_ot", "orientation": "expert", "similarity": similarity}, D, 16)
    served = gate.causal_surrogate()
    assert served is not None
    plan = served(GateInput(make_tokens(64))).plan
    assert plan.row_ptr_T1.diff().tolist() == [1] * 64


def test_local_search_refuses_a_gate_whose_experts_see_slots() -> None:
    with pytest.raises(ValueError, match="gate: 'soft' sends mixtures of tokens to experts, and nothing to permute"):
        make_search({"name": "soft"})
    plan = build_gate("soft", D, 4)(GateInput(make_tokens(6))).plan
    with pytest.raises(ValueError, match="slots"):
        apply_permutation(plan, torch.arange(4))


def test_a_permuted_dense_plan_no_longer_claims_index_order() -> None:
    plan = RoutingPlan.from_mask(torch.ones(3, 4, dtype=torch.bool), torch.rand(3, 4))
    assert plan.kind is PlanKind.DENSE
    assert apply_permutation(plan, torch.tensor([1, 2, 3, 0])).kind is PlanKind.SPARSE


def test_scores_that_the_next_layer_reads_keep_their_labels_when_the_search_ends() -> None:
    gate = make_search({"name": "zero_computation"})
    with torch.no_grad():
        gate.score_EE.copy_(torch.eye(4)[[2, 0, 3, 1]] * 9)
    x_TD = make_tokens(20)
    searching = gate(GateInput(x_TD, mode=Mode.TRAIN)).logits_TE
    gate.begin_step(10)
    assert gate.expert_of_E.tolist() == [2, 0, 3, 1]
    frozen = gate(GateInput(x_TD, mode=Mode.TRAIN)).logits_TE
    assert searching is not None
    assert frozen is not None
    torch.testing.assert_close(frozen, searching)


@pytest.mark.parametrize("gap", [75.0, 150.0, 1000.0])
def test_an_expert_beside_a_zero_expert_gets_all_the_weight_however_far_behind(gap: float) -> None:
    gate = build_gate({"name": "zero_computation", "copy_experts": 0, "constant_experts": 0}, 2, 4)
    with torch.no_grad():
        gate.get_parameter("weight").zero_()
        gate.get_parameter("weight")[4, 0] = gap  # the zero expert
        gate.get_parameter("weight")[0, 1] = 1.0
    out = gate(GateInput(torch.ones(1, 2), mode=Mode.TRAIN))
    assert out.plan.expert_N.tolist() == [0]
    assert out.plan.weight_N.tolist() == pytest.approx([1.0])


def test_a_kept_choice_gets_all_the_weight_however_far_behind_the_dropped_one() -> None:
    gate = build_gate({"name": "gshard", "noise": "none", "capacity_factor": 0.5, "min_capacity": 1}, 2, 4)
    with torch.no_grad():
        gate.get_parameter("weight").copy_(torch.tensor([[200.0, 0], [0, 1], [0, 0], [0, 0.5]]))
    # Both want expert 0, which has room for the first; their second choices are 2 and 1.
    plan = gate(GateInput(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), mode=Mode.TRAIN)).plan
    assert plan.expert_N.tolist() == [0, 2, 1]
    assert plan.weight_N.tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("seed", [300_000, 20_240_101, 2**40, 2**62])
def test_any_seed_will_do(seed: int) -> None:
    inp = GateInput(make_tokens(50), ids_T=torch.arange(50), position_T=torch.arange(50), step=10**6, layer=99)
    for name in ("forced", "hash"):
        found, other = (build_gate({"name": name, "seed": s}, D, 64)(inp).plan.expert_N for s in (seed, seed + 1))
        assert not torch.equal(found, other)


def test_naming_a_presets_own_balance_keeps_its_loss() -> None:
    named = parse_gate_config({"name": "deepseek_v3", "balance": "bias"})
    assert named.aux_coefs() == parse_gate_config("deepseek_v3").aux_coefs()
    assert parse_gate_config({"name": "deepseek_v3", "balance": "quantile"}).aux_coefs()["balance"] == 0
    assert parse_gate_config({"name": "topk", "balance": "bias"}).aux_coefs()["balance"] == 0


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("experts", [8, 16])
def test_the_frozen_permutation_is_the_best_match_of_the_learned_scores(experts: int, preset: str) -> None:
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    gate = build_gate({"name": "local_search", "preset": preset, "search": 10}, D, experts)
    for step in range(11):
        gate.begin_step(step)
    score = gate.get_parameter("score_EE").detach().numpy()
    _, best = linear_sum_assignment(score, maximize=True)
    assert gate.get_buffer("expert_of_E").tolist() == best.tolist()


def test_newton_refuses_temperatures_that_it_cannot_reach() -> None:
    with pytest.raises(ValueError, match=r"tau_end: 1e-05 is below 0\.0001, where newton takes too many steps; set"):
        make_search({"name": "topk"}, tau_end=1e-5)
    make_search({"name": "topk"}, tau_end=1e-5, solver="sinkhorn")


def test_codes_without_an_expert_cost_a_logarithm() -> None:
    gate = build_gate({"name": "dselect_k", "k": 1}, D, 5)
    with torch.no_grad():
        gate.get_parameter("bit_weight").normal_(std=3, generator=torch.Generator().manual_seed(0))
    out = gate(GateInput(make_tokens(512), mode=Mode.TRAIN))
    assert out.metrics["uncovered_frac"] > 0.05, "some tokens are lost"
    assert 0 < out.aux["reachable"].item() < -math.log(1e-6)
    out.aux["reachable"].backward()
    grad = gate.get_parameter("bit_weight").grad
    assert grad is not None
    assert float(grad.norm()) < 100


def test_selectors_need_no_tensor_of_experts_times_bits() -> None:
    """The largest tensor that autograd keeps has T k 2^b numbers, not b times as many."""
    gate = build_gate({"name": "dselect_k", "k": 2}, D, 64)
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gate(GateInput(make_tokens(100), mode=Mode.TRAIN))
    assert largest <= 100 * 2 * 64


def test_the_bias_of_a_gate_that_is_searched_around_follows_its_own_loads() -> None:
    gate = make_search({"name": "topk", "balance": "bias", "bias_update_rate": 0.1, "k": 1, "renormalise": False})
    with torch.no_grad():
        gate.inner.get_parameter("weight").zero_()
        gate.inner.get_parameter("weight")[2] = 1.0
    gate.begin_step(0)
    out = gate(GateInput(make_tokens(64).abs(), mode=Mode.TRAIN))
    assert out.plan.offered_E.tolist() == [64] * 4
    gate.end_step(out.plan.offered_E, out.signals)
    bias_E = gate.inner.get_buffer("selection_bias")
    assert bias_E.argmin().item() == 2
    assert float(bias_E.max() - bias_E.min()) > 0.05


def test_the_balance_of_zero_computation_experts_is_by_sequence() -> None:
    gate = build_gate({"name": "zero_computation"}, D, 4)
    with torch.no_grad():
        gate.get_parameter("weight").normal_(generator=torch.Generator().manual_seed(0))
    whole = GateInput(make_tokens(40), segment_T=torch.arange(40) // 20, mode=Mode.TRAIN)
    halves = [
        replace(whole, x_TD=whole.x_TD[rows], segment_T=torch.zeros(20, dtype=torch.int64))
        for rows in (slice(0, 20), slice(20, 40))
    ]
    expected = sum(gate(half).aux["balance"].item() for half in halves) / 2
    assert gate(whole).aux["balance"].item() == pytest.approx(expected, rel=1e-5)


def test_the_controller_of_relu_sees_what_a_limit_hides() -> None:
    gate = build_gate({"name": "relu", "k": 2, "max_k": 2, "l1_start": 1.0}, D, 8)
    with torch.no_grad():
        gate.get_parameter("bias").fill_(5.0)  # every expert is positive
    out = gate(GateInput(make_tokens(16), mode=Mode.TRAIN))
    gate.end_step(out.plan.offered_E, out.signals)
    assert float(gate.get_buffer("l1")) > 1.0


@pytest.mark.parametrize("seed", range(5))
def test_with_room_for_one_expert_a_token_transport_is_the_best_assignment(seed: int) -> None:
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    logits_TE = torch.randn(128, 8, generator=torch.Generator().manual_seed(seed))
    gate = build_gate({"name": "sparse_ot", "orientation": "expert", "capacity_factor": 1.0}, 8, 8)
    with torch.no_grad():
        gate.get_parameter("weight").copy_(torch.eye(8))
    plan = gate(GateInput(logits_TE, mode=Mode.TRAIN)).plan
    assert plan.load_E.tolist() == [16] * 8
    assert plan.row_ptr_T1.diff().tolist() == [1] * 128
    score = logits_TE.softmax(-1).double().numpy()
    rows, columns = linear_sum_assignment(score.repeat(16, 1), maximize=True)
    best = score.repeat(16, 1)[rows, columns].sum()
    assert score[range(128), plan.expert_N.numpy()].sum() == pytest.approx(best, abs=1e-9)
