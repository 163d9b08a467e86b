"""Balance losses, the selection-bias controller, and load metrics.

Shape suffixes: T tokens, E experts, N chosen pairs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gates import GateInput, Mode, RoutingPlan, TopKGate, build_gate, metrics
from gates.balance import (
    balance_loss,
    cv_squared,
    importance,
    sequence_balance_loss,
    sign_bias_update,
    smooth_load,
    z_loss,
)

pytestmark = pytest.mark.unit
T, E, K = 40, 8, 2


def routed(seed: int = 0, num_tokens: int = T) -> tuple[Tensor, Tensor]:
    """Probabilities (T, E) and the K most probable experts (T, K)."""
    logits_TE = torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs_TE = logits_TE.softmax(-1)
    return probs_TE, probs_TE.topk(K).indices


def load_of(expert: Tensor) -> Tensor:
    return torch.bincount(expert.flatten(), minlength=E)


class TestBalanceLoss:
    def test_normalisation_of_other_libraries(self) -> None:
        """The constant factors between libraries, each library's formula as its source has it."""
        probs_TE, expert_TK = routed()
        ours = balance_loss(probs_TE, load_of(expert_TK)).item()
        p, mask = probs_TE.numpy(), np.zeros((T, K, E))
        for t in range(T):
            for slot in range(K):
                mask[t, slot, int(expert_TK[t, slot])] = 1
        counts = mask.sum((0, 1))
        megatron = float((p.sum(0) * counts).sum() * E / (T * T * K))
        deepspeed_topk = float((p.mean(0) * mask.sum(1).mean(0)).sum() * E / K)
        hugging_face = float((mask.mean(0) * p.mean(0)[None]).sum() * E)
        assert ours == pytest.approx(megatron)
        assert ours == pytest.approx(deepspeed_topk)
        assert hugging_face == pytest.approx(K * ours)
        first_choice = balance_loss(probs_TE, load_of(expert_TK[:, 0])).item()
        deepspeed_top2 = float((p.mean(0) * mask[:, 0].mean(0)).mean() * E * E)
        assert first_choice == pytest.approx(deepspeed_top2)

    def test_one_at_balance_and_e_at_collapse(self) -> None:
        even_TE = torch.full((T, E), 1 / E)
        assert balance_loss(even_TE, torch.full((E,), 10)).item() == pytest.approx(1)
        alone_TE = torch.zeros(T, E)
        alone_TE[:, 3] = 1
        assert balance_loss(alone_TE, alone_TE.sum(0).long()).item() == pytest.approx(E)

    def test_nothing_routed(self) -> None:
        probs_TE = torch.zeros(0, E, requires_grad=True)
        loss = balance_loss(probs_TE, torch.zeros(E, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0
        nobody = torch.zeros(0, dtype=torch.int64)
        assert sequence_balance_loss(probs_TE, nobody, nobody, nobody).item() == 0

    def test_sequence_scope_against_a_loop(self) -> None:
        probs_TE, expert_TK = routed()
        segment_T = torch.tensor([0] * 7 + [1] * 20 + [3] * 13)  # sequence 2 is empty
        token_N = torch.arange(T).repeat_interleave(K)
        loss = sequence_balance_loss(probs_TE, expert_TK.flatten(), token_N, segment_T)
        expected = 0.0
        for s in (0, 1, 3):
            here_T = segment_T == s
            expected += balance_loss(probs_TE[here_T], load_of(expert_TK[here_T])).item() * int(here_T.sum()) / T
        assert loss.item() == pytest.approx(expected)

    @pytest.mark.parametrize("scope", ["sequence", "global"])
    def test_the_same_however_sequences_are_dealt_out(self, scope: str) -> None:
        """Token-weighted over micro-batches, gradient included; global scope with the loads of all."""
        gate = build_gate({"name": "topk", "balance_scope": scope}, 6, E)
        gate.reset_parameters(torch.Generator().manual_seed(0))
        rng = torch.Generator().manual_seed(1)
        x_TD = torch.randn(30, 6, generator=rng)
        segment_T = torch.tensor([0] * 4 + [1] * 11 + [2] * 9 + [3] * 6)
        whole = gate(GateInput(x_TD, segment_T=segment_T, mode=Mode.TRAIN))
        whole.aux["balance"].backward()
        whole_grad = gate.weight.grad.clone()
        gate.weight.grad = None
        parts = [(0, 15), (15, 30)]
        total = torch.zeros(())
        for begin, end in parts:
            inp = GateInput(
                x_TD[begin:end],
                segment_T=segment_T[begin:end] - segment_T[begin],
                mode=Mode.TRAIN,
                reduce_load=lambda _load_E: whole.plan.load_E,
            )
            total = total + gate(inp).aux["balance"] * (end - begin) / 30
        total.backward()
        assert total.item() == pytest.approx(whole.aux["balance"].item(), rel=1e-6)
        torch.testing.assert_close(gate.weight.grad, whole_grad)

    def test_sigmoid_scores_cannot_hack_it(self) -> None:
        """Megatron-LM issue 1545: with sum-normalised sigmoids the loss falls when all logits sink below epsilon."""
        x_TD = torch.randn(T, 6, generator=torch.Generator().manual_seed(0)) + 1
        losses, naive = [], []
        for sink in (0.0, 100.0):
            gate = build_gate({"name": "topk", "score": "sigmoid"}, 7, E)
            gate.reset_parameters(torch.Generator().manual_seed(0))
            with torch.no_grad():
                gate.weight.mul_(50)
                gate.weight[:, 6] = -sink
            out = gate(GateInput(torch.cat([x_TD, torch.ones(T, 1)], 1), mode=Mode.TRAIN))
            losses.append(out.aux["balance"].item())
            s_TE = out.logits_TE.detach().sigmoid()
            naive.append(balance_loss(s_TE / (s_TE.sum(-1, keepdim=True) + 1e-20), out.plan.load_E).item())
        assert naive[1] < 1e-3 < 1 < naive[0], "the naive loss should be seen to collapse"
        assert losses[1] >= 1

    def test_gradient_descent_on_it_evens_the_load(self) -> None:
        gate = build_gate({"name": "topk", "k": 1, "renormalise": False}, 6, E)
        gate.reset_parameters(torch.Generator().manual_seed(3))
        x_TD = torch.randn(512, 6, generator=torch.Generator().manual_seed(4)) + 1.5
        optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
        seen = []
        for _ in range(80):
            out = gate(GateInput(x_TD, mode=Mode.TRAIN))
            optimizer.zero_grad()
            out.aux["balance"].backward()
            optimizer.step()
            seen.append(out.metrics["max_vio"].item())
        assert seen[-1] < 0.6 < 1.5 < seen[0]


class TestOtherLosses:
    def test_z_loss(self) -> None:
        logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = np.mean([math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.tolist()])
        assert z_loss(logits_TE).item() == pytest.approx(float(expected))
        assert z_loss(logits_TE[:0]).item() == 0

    def test_cv_squared(self) -> None:
        assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
        zeros = torch.zeros(4, requires_grad=True)
        loss = cv_squared(zeros)
        loss.backward()
        assert loss.item() == 0
        assert zeros.grad is not None
        assert bool(torch.isfinite(zeros.grad).all())

    def test_importance(self) -> None:
        got = importance(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.25, 0.125]), 3)
        assert got.tolist() == [0.25, 0.625, 0.0]

    def test_smooth_load_counts_tokens_when_noise_is_small(self) -> None:
        logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        hard_E = load_of(logits_TE.topk(K).indices).double()
        got_E = smooth_load(logits_TE, logits_TE, 1e-9, K, exclude_self=True)
        torch.testing.assert_close(got_E, hard_E)

    def test_smooth_load_needs_someone_to_lose(self) -> None:
        with pytest.raises(ValueError, match="k: 8 must be less than the 8 experts"):
            smooth_load(torch.zeros(2, 8), torch.zeros(2, 8), 1.0, 8, exclude_self=True)


class TestSelectionBias:
    def test_moves_against_the_load_by_its_rate(self) -> None:
        bias_E = sign_bias_update(torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([10, 0, 4, 2]), 0.25)
        assert bias_E.tolist() == [-0.25, 1.25, -1.0, 0.75]  # mean 4: above, below, equal, below

    def test_equal_load_is_exact_whatever_the_size(self) -> None:
        load_E = torch.full((7,), 2**40 + 1)
        assert sign_bias_update(torch.zeros(7), load_E, 1.0).tolist() == [0.0] * 7

    def test_is_state_not_parameter(self) -> None:
        gate = build_gate({"name": "topk", "score": "sigmoid", "balance": "bias"}, 6, E)
        assert "selection_bias" in gate.state_dict()
        assert [name for name, _ in gate.named_parameters()] == ["weight"]

    def test_stays_in_fp32_when_the_model_does_not(self) -> None:
        gate = build_gate({"name": "topk", "balance": "bias"}, 6, E)
        assert isinstance(gate, TopKGate)
        gate.end_step(torch.arange(E), {})
        before = gate.selection_bias.clone()
        gate.to(torch.bfloat16)
        assert gate.weight.dtype == torch.bfloat16
        assert torch.equal(gate.selection_bias, before)
        gate.end_step(torch.arange(E), {})
        assert not torch.equal(gate.selection_bias, before)

    def test_frozen_does_not_move(self) -> None:
        gate = build_gate({"name": "topk", "balance": "frozen"}, 6, E)
        gate.end_step(torch.arange(E), {})
        assert not bool(gate.selection_bias.any())

    def test_balances_a_skewed_stream_without_any_loss(self) -> None:
        """Tokens around a mean that prefers some experts: max_vio goes from above 1 to the noise of counting."""
        options = {"name": "topk", "score": "sigmoid", "balance": "bias", "bias_update_rate": 4e-3}
        gate = build_gate({**options, "balance_coef": 0.0}, 16, E)
        gate.reset_parameters(torch.Generator().manual_seed(0))
        with torch.no_grad():
            gate.weight.mul_(10)
        rng = torch.Generator().manual_seed(1)
        centre_D = torch.randn(16, generator=rng)
        seen, tail_E = [], torch.zeros(E, dtype=torch.int64)
        steps, last = 300, 50
        for step in range(steps):
            gate.begin_step(step)
            with torch.no_grad():
                out = gate(GateInput(torch.randn(2048, 16, generator=rng) + centre_D, mode=Mode.TRAIN, step=step))
            gate.end_step(out.plan.offered_E, out.signals)
            seen.append(out.metrics["max_vio"].item())
            if step >= steps - last:
                tail_E += out.plan.offered_E
        assert seen[0] > 1
        assert max(seen[-last:]) < 0.2, "one batch: the noise of counting 512 tokens an expert"
        assert metrics.max_vio(tail_E).item() < 0.02
        assert out.metrics["bias_range"].item() > 0.05


class TestMetrics:
    def test_of_loads(self) -> None:
        load_E = torch.tensor([6, 0, 2, 0])
        assert metrics.imbalance(load_E).item() == 3
        assert metrics.max_vio(load_E).item() == 2
        assert metrics.dead_fraction(load_E).item() == 0.5
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
        assert metrics.load_entropy(load_E).item() == pytest.approx(entropy)

    def test_at_the_ends(self) -> None:
        even, alone, nothing = torch.tensor([5, 5, 5]), torch.tensor([0, 9, 0]), torch.zeros(3, dtype=torch.int64)
        assert [metrics.imbalance(load).item() for load in (even, alone, nothing)] == [1, 3, 1]
        assert [metrics.load_entropy(load).item() for load in (even, alone, nothing)] == pytest.approx([1, 0, 1])
        assert metrics.load_entropy(torch.tensor([4])).item() == 1

    def test_of_a_plan_with_drops(self) -> None:
        mask_TE = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
        plan = RoutingPlan.from_mask(mask_TE, mask_TE.float(), offered_E=torch.tensor([2, 1, 1]))
        found = {name: value.item() for name, value in metrics.plan_metrics(plan, num_valid=2).items()}
        assert found["dropped_frac"] == 0.25
        assert found["experts_per_token"] == 1.5
        assert found["dead_frac"] == 0, "an expert whose tokens were all dropped is not dead"
        assert metrics.experts_per_token(plan).item() == 1
