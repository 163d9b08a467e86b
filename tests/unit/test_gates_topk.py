"""Top-k gate: what its options refuse and promise, exact ties, replay under capacity, extreme logits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gates import Causality, GateInput, Mode, TopKConfig, TopKGate, build_gate
from gates.scores import ScoreFunction, limit_groups, log_score, score, top_k
from tests.gate_conformance import assert_legal, tokens

pytestmark = pytest.mark.unit
SCORES: list[ScoreFunction] = ["softmax", "sigmoid", "sqrt_softplus"]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "num_experts", "problem"),
        [
            ({"k": 5}, 4, "k: 5 experts per token, but there are only 4"),
            ({"k": 1}, 4, "renormalise: with k=1 it makes every weight 1"),
            ({"k": 1, "score": "sigmoid"}, 4, "renormalise: with k=1"),
            (
                {"k": 1, "renormalise": False, "order": "topk_then_score"},
                4,
                "order: a softmax over one choice makes every weight 1",
            ),
            ({"num_groups": 3}, 8, "num_groups: 3 groups do not divide 8 experts evenly"),
            ({"num_groups": 2, "topk_groups": 3}, 8, "topk_groups: 3 of only 2 groups"),
            ({"num_groups": 4, "k": 3}, 8, "topk_groups: 1 of 4 groups hold 2 experts, fewer than k=3"),
            ({"noise": "second_choice", "k": 1, "renormalise": False}, 4, "noise: second_choice needs k of 2 or more"),
            ({"noise": "second_choice", "num_groups": 2}, 4, "noise: second_choice goes with neither"),
            ({"load_coef": 0.1}, 4, "load_coef: the load loss needs noise learned or fixed"),
            ({"load_coef": 0.1, "noise": "fixed", "balance": "bias"}, 4, "load_coef: the load loss goes with"),
            ({"load_coef": 0.1, "noise": "fixed", "k": 4}, 4, "load_coef: with k = E every load is the same"),
            (
                {"renormalise_kept": True, "renormalise": False, "capacity_factor": 1.0},
                4,
                "renormalise_kept: needs renormalise",
            ),
            ({"renormalise_kept": True}, 4, "renormalise_kept: has no effect without capacity_factor"),
            ({"drop_policy": "probs"}, 4, "drop_policy: has no effect without capacity_factor"),
            ({"min_capacity": 4}, 4, "min_capacity: has no effect without capacity_factor"),
            ({"noise_std": 2.0}, 4, "noise_std: has no effect without noise=fixed"),
            ({"bias_update_rate": 0.1}, 4, "bias_update_rate: has no effect without balance=bias"),
            ({"group_top": 1}, 4, "group_top: has no effect without num_groups above 1"),
        ],
    )
    def test_what_is_refused(self, options: dict[str, Any], num_experts: int, problem: str) -> None:
        problems = TopKConfig(**options).check(num_experts)
        assert len(problems) == 1
        assert problems[0].startswith(problem)
        with pytest.raises(ValueError, match=re.escape(f"gate 'topk' with {num_experts} experts: {problem}")):
            build_gate({"name": "topk", **options}, 8, num_experts)

    def test_all_problems_at_once(self) -> None:
        problems = TopKConfig(k=9, num_groups=3, noise_std=2.0, min_capacity=2).check(8)
        assert [line.split(":")[0] for line in problems] == ["k", "num_groups", "noise_std", "min_capacity"]

    def test_numbers_that_are_not_finite(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            TopKConfig(balance_coef=float("inf"))

    def test_coefficients_by_loss(self) -> None:
        assert TopKConfig(z_coef=0.5).aux_coefs() == {"balance": 0.01, "z": 0.5, "importance": 0.0, "load": 0.0}

    @pytest.mark.parametrize(
        ("options", "causality"),
        [
            ({}, Causality.PER_TOKEN),
            ({"noise": "learned", "jitter": 0.1}, Causality.PER_TOKEN),
            ({"capacity_factor": 1.0}, Causality.PREFIX),
            ({"capacity_factor": 1.0, "drop_policy": "choice", "k": 1, "renormalise": False}, Causality.PREFIX),
            ({"capacity_factor": 1.0, "drop_policy": "choice"}, Causality.BATCH),
            ({"capacity_factor": 1.0, "drop_policy": "probs"}, Causality.BATCH),
            ({"capacity_factor": 1.0, "drop_policy": "random"}, Causality.BATCH),
        ],
    )
    def test_causality(self, options: dict[str, Any], causality: Causality) -> None:
        gate = build_gate({"name": "topk", **options}, 6, 4)
        assert gate.causality is causality
        surrogate = gate.causal_surrogate()
        assert isinstance(surrogate, TopKGate)
        assert surrogate.causality is Causality.PER_TOKEN
        assert surrogate.weight is gate.weight
        assert (surrogate is gate) == (causality is Causality.PER_TOKEN)
        assert gate.causality is causality, "asking for the surrogate must not change the gate"

    @pytest.mark.parametrize(
        ("options", "weight_sum"),
        [
            ({}, "one"),
            ({"scale": 0.5}, "at_most_one"),
            ({"scale": 2.0}, "free"),
            ({"renormalise": False}, "at_most_one"),
            ({"renormalise": False, "score": "sigmoid"}, "free"),
            ({"score": "sigmoid"}, "one"),
            ({"capacity_factor": 1.0}, "at_most_one"),
        ],
    )
    def test_weight_sum(self, options: dict[str, Any], weight_sum: str) -> None:
        assert build_gate({"name": "topk", **options}, 6, 4).weight_sum == weight_sum


class TestTopK:
    @pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8, 16, 64])
    def test_ties_go_to_the_lower_index(self, num_experts: int) -> None:
        """Few different values, so that most rows have ties, on every path that the size chooses."""
        rng = np.random.default_rng(num_experts)
        for num_tokens in (0, 1, 7, 300):
            values = rng.integers(-2, 3, (num_tokens, num_experts)).astype(np.float32)
            values[rng.random(values.shape) < 0.1] = -0.0
            expected = np.argsort(-values, axis=1, kind="stable")
            for k in range(1, num_experts + 1):
                got = top_k(torch.from_numpy(values), k)
                assert got.dtype == torch.int64
                np.testing.assert_array_equal(got.numpy(), expected[:, :k])

    def test_without_ties(self) -> None:
        values = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
        expected = np.argsort(-values.numpy(), axis=1, kind="stable")
        for k in (1, 2, 4, 5, 12, 20):
            np.testing.assert_array_equal(top_k(values, k).numpy(), expected[:, :k])

    def test_masked_scores_stay_distinct(self) -> None:
        row = torch.full((3, 6), -torch.inf)
        row[:, 4] = 1.0
        for k in (1, 2, 3, 6):
            got = top_k(row, k)
            assert got.tolist() == [[4, 0, 1, 2, 3, 5][:k]] * 3

    def test_leaves_its_input_alone(self) -> None:
        values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        before = values.clone()
        top_k(values, 3)
        assert torch.equal(values, before)

    def test_a_gate_of_zeros_picks_the_first_experts(self) -> None:
        gate = build_gate({"name": "topk", "init_std": 0.0, "k": 3}, 6, 5)
        plan = gate(GateInput(torch.randn(4, 6))).plan
        assert plan.expert_N.view(4, 3).tolist() == [[0, 1, 2]] * 4


class TestScores:
    @pytest.mark.parametrize("function", SCORES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_logits_have_finite_scores_and_gradients(self, function: ScoreFunction, dtype: torch.dtype) -> None:
        logits = torch.tensor([[-1e4, -300.0, -90.0, -40.0, -1.0, 0.0, 30.0, 1e4]], dtype=dtype, requires_grad=True)
        for value in (log_score(logits, function), score(logits, function), log_score(logits, function).softmax(-1)):
            assert bool(torch.isfinite(value).all())
            (gradient,) = torch.autograd.grad(value.square().sum(), logits)
            assert bool(torch.isfinite(gradient).all())

    @pytest.mark.parametrize("function", SCORES)
    def test_logarithm_and_score_agree(self, function: ScoreFunction) -> None:
        logits = torch.linspace(-60, 60, 241, dtype=torch.float64).unsqueeze(0)
        expected = score(logits, function).log()
        got = log_score(logits, function)
        torch.testing.assert_close(got - got[0, -1], expected - expected[0, -1], rtol=1e-9, atol=1e-8)
        assert bool((score(logits, function).diff() >= 0).all()), "selection by logits relies on it"

    def test_renormalised_sigmoids_survive_underflow(self) -> None:
        gate = build_gate({"name": "topk", "score": "sigmoid"}, 2, 4)
        assert isinstance(gate, TopKGate)
        with torch.no_grad():
            gate.weight.copy_(torch.tensor([[-200.0, 0], [-201, 0], [-300, 0], [-300, 0]]))
        plan = gate(GateInput(torch.tensor([[1.0, 0.0]]))).plan
        expected = 1 / (1 + np.exp(-1))
        assert plan.weight_N.tolist() == pytest.approx([expected, 1 - expected])

    def test_group_limit_with_every_score_negative(self) -> None:
        values = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -0.5, -9.0]])
        masked = limit_groups(values, num_groups=3, topk_groups=1, group_top=2)
        assert masked.tolist() == [[-1.0, -2.0] + [-torch.inf] * 4]
        by_best = limit_groups(values, num_groups=3, topk_groups=1, group_top=1)
        assert by_best.tolist() == [[-torch.inf] * 4 + [-0.5, -9.0]]


class TestNoise:
    @pytest.mark.parametrize("options", [{"noise": "learned"}, {"noise": "fixed", "noise_std": 3.0}, {"jitter": 0.9}])
    def test_acts_in_training_with_a_generator_only(self, options: dict[str, Any]) -> None:
        gate = build_gate({"name": "topk", **options}, 12, 8)
        quiet = gate(tokens(64, 8)).plan
        assert torch.equal(gate(tokens(64, 8, mode=Mode.TRAIN)).plan.weight_N, quiet.weight_N)
        assert torch.equal(gate(tokens(64, 8, mode=Mode.EVAL, noise_seed=1)).plan.weight_N, quiet.weight_N)
        noisy = [gate(tokens(64, 8, mode=Mode.TRAIN, noise_seed=seed)).plan.weight_N for seed in (1, 1, 2)]
        assert torch.equal(noisy[0], noisy[1])
        assert not torch.equal(noisy[0], noisy[2])
        assert not torch.equal(noisy[0], quiet.weight_N)

    def test_second_choice_follows_the_scores(self) -> None:
        """Over many draws the second choice is distributed as p given not the first."""
        gate = build_gate({"name": "topk", "noise": "second_choice"}, 4, 4)
        assert isinstance(gate, TopKGate)
        with torch.no_grad():
            gate.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))
        inp = GateInput(torch.ones(20000, 4), mode=Mode.TRAIN, rng=torch.Generator().manual_seed(0))
        expert_TK = gate(inp).plan.expert_N.view(-1, 2)
        assert bool((expert_TK[:, 0] == 0).all())
        share = torch.bincount(expert_TK[:, 1], minlength=4) / 20000
        expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
        torch.testing.assert_close(share[1:], expected, atol=0.015, rtol=0)


class TestReplay:
    @pytest.mark.parametrize("policy", ["position", "choice", "probs", "random"])
    def test_repeats_the_drops_and_their_losses(self, policy: str) -> None:
        options = {"capacity_factor": 0.6, "drop_policy": policy, "balance_scope": "sequence", "noise": "fixed"}
        gate = build_gate({"name": "topk", **options}, 12, 8)
        first = gate(tokens(50, 8, mode=Mode.TRAIN, noise_seed=1))
        assert int(first.plan.dropped) > 0
        plan = first.plan.detach()
        assert plan.before_drop is not None
        assert not plan.before_drop.weight_N.requires_grad
        again = gate(replace(tokens(50, 8, mode=Mode.TRAIN, noise_seed=1), replay=plan))
        assert torch.equal(again.plan.expert_N, first.plan.expert_N)
        assert torch.equal(again.plan.weight_N, first.plan.weight_N)
        assert torch.equal(again.plan.offered_E, first.plan.offered_E)
        assert again.aux["balance"].item() == first.aux["balance"].item()
        for out in (first, again):
            gate.zero_grad()
            (out.plan.weight_N.square().sum() + out.aux["balance"]).backward()
            out_grad = gate.weight.grad.clone()
            if out is first:
                first_grad = out_grad
        assert torch.equal(out_grad, first_grad)

    def test_a_plan_for_other_tokens_is_refused(self) -> None:
        gate = build_gate({"name": "topk"}, 12, 8)
        plan = gate(tokens(10, 8)).plan.detach()
        with pytest.raises(ValueError, match="gate 'topk': the plan to replay has 10 tokens, not 11"):
            gate(replace(tokens(11, 8), replay=plan))
        with pytest.raises(ValueError, match="the plan to replay has 20 pairs of 10 tokens, not k=3 of each"):
            build_gate({"name": "topk", "k": 3}, 12, 8)(replace(tokens(10, 8), replay=plan))


class TestCapacity:
    def test_acts_in_training_only(self) -> None:
        gate = build_gate({"name": "topk", "capacity_factor": 0.25}, 12, 8)
        assert int(gate(tokens(64, 8, mode=Mode.TRAIN)).plan.load_E.max()) <= 4
        for mode in (Mode.EVAL, Mode.PREFILL, Mode.DECODE):
            assert gate(tokens(64, 8, mode=mode)).plan.num_pairs == 128

    def test_minimum(self) -> None:
        gate = build_gate({"name": "topk", "capacity_factor": 0.01, "min_capacity": 3}, 12, 4)
        assert gate(tokens(64, 4, mode=Mode.TRAIN)).plan.load_E.tolist() == [3] * 4

    def test_padding_does_not_enlarge_it(self) -> None:
        gate = build_gate({"name": "topk", "capacity_factor": 1.0}, 12, 4)
        inp = tokens(40, 4, mode=Mode.TRAIN, valid_T=torch.arange(40) < 10)
        out = gate(inp)
        assert_legal(out.plan, gate, inp)
        assert int(out.plan.load_E.max()) <= 5

    def test_random_policy_without_a_generator_goes_by_position(self) -> None:
        by_position = build_gate({"name": "topk", "capacity_factor": 0.5}, 12, 4)
        random = build_gate({"name": "topk", "capacity_factor": 0.5, "drop_policy": "random"}, 12, 4)
        random.load_state_dict(by_position.state_dict())
        inp = tokens(40, 4, mode=Mode.TRAIN)
        assert torch.equal(random(inp).plan.expert_N, by_position(inp).plan.expert_N)


def test_padded_tokens_and_their_logits_line_up() -> None:
    gate = build_gate({"name": "topk"}, 12, 8)
    valid_T = torch.arange(20) % 3 != 0
    inp = tokens(20, 8, valid_T=valid_T)
    padded, plain = gate(inp), gate(tokens(20, 8))
    assert padded.logits_TE.shape == (20, 8)
    torch.testing.assert_close(padded.logits_TE[valid_T], plain.logits_TE[valid_T])
    assert not bool(padded.logits_TE[~valid_T].any())
    dense_TE = plain.plan.dense_weight_TE() * valid_T.unsqueeze(1)
    torch.testing.assert_close(padded.plan.dense_weight_TE(), dense_TE)
