"""Top-k gates against the functions of other libraries, on the same logits. Each needs that library installed.

Shape suffixes: T tokens, D width, E experts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gates import GateInput, GateOutput, Mode, TopKGate, build_gate
from gates.balance import balance_loss, z_loss

pytestmark = pytest.mark.peer
T, D, E = 96, 16, 8


def library(module: str, package: str) -> ModuleType:
    found = pytest.importorskip(module, reason=f"compares with {package}: make test-peers", exc_type=ImportError)
    assert isinstance(found, ModuleType)
    return found


def make_gate(name: str = "topk", **options: Any) -> TopKGate:
    gate = build_gate({"name": name, **options}, D, E)
    assert isinstance(gate, TopKGate)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)) * 0.4)
    return gate


def make_tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def dense(expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return torch.zeros(T, E, dtype=weight_TK.dtype).scatter(1, expert_TK, weight_TK)


def same(out: GateOutput, weight_TE: Tensor) -> None:
    torch.testing.assert_close(out.plan.dense_weight_TE(), weight_TE, rtol=1e-5, atol=1e-7)


class TestTransformers:
    def test_mixtral(self) -> None:
        mixtral = library("transformers.models.mixtral.modeling_mixtral", "transformers")
        config = library("transformers", "transformers").MixtralConfig(
            hidden_size=D, num_local_experts=E, num_experts_per_tok=2
        )
        gate, x_TD = make_gate(), make_tokens()
        peer = mixtral.MixtralTopKRouter(config)
        peer.weight.data.copy_(gate.weight.detach())
        _, weight_TK, expert_TK = peer(x_TD)
        same(gate(GateInput(x_TD)), dense(expert_TK, weight_TK))

    @pytest.mark.parametrize("renormalise", [True, False])
    def test_qwen3(self, renormalise: bool) -> None:
        qwen3 = library("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
        config = library("transformers", "transformers").Qwen3MoeConfig(
            hidden_size=D, num_experts=E, num_experts_per_tok=3, norm_topk_prob=renormalise
        )
        gate, x_TD = make_gate(k=3, renormalise=renormalise), make_tokens()
        peer = qwen3.Qwen3MoeTopKRouter(config)
        peer.weight.data.copy_(gate.weight.detach())
        _, weight_TK, expert_TK = peer(x_TD)
        same(gate(GateInput(x_TD)), dense(expert_TK, weight_TK))

    @pytest.mark.parametrize("bias", [0.0, -1.0])
    def test_deepseek_v3(self, bias: float) -> None:
        deepseek = library("transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers")
        config = library("transformers", "transformers").DeepseekV3Config(
            hidden_size=D, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
        )
        gate = make_gate(k=3, score="sigmoid", scale=2.5, balance="bias", num_groups=4, topk_groups=2)
        assert gate.selection_bias is not None
        gate.selection_bias.copy_(torch.linspace(-0.2, 0.2, E) + bias)
        peer = deepseek.DeepseekV3TopkRouter(config)
        peer.weight.data.copy_(gate.weight.detach())
        peer.e_score_correction_bias.copy_(gate.selection_bias)
        x_TD = make_tokens()
        _, weight_TK, expert_TK = peer(x_TD)
        same(gate(GateInput(x_TD)), dense(expert_TK, weight_TK))

    def test_balance_loss_is_k_times_ours(self) -> None:
        mixtral = library("transformers.models.mixtral.modeling_mixtral", "transformers")
        out = make_gate()(GateInput(make_tokens(), mode=Mode.TRAIN))
        theirs = mixtral.load_balancing_loss_func((out.logits_TE,), E, 2)
        assert theirs.item() == pytest.approx(2 * out.aux["balance"].item(), rel=1e-5)


class TestMegatron:
    def peer(self) -> ModuleType:
        return library("megatron.core.transformer.moe.moe_utils", "megatron-core")

    @pytest.mark.parametrize(
        ("options", "theirs"),
        [
            ({}, {}),
            ({"renormalise": False}, {"use_pre_softmax": True}),
            ({"score": "sigmoid", "scale": 2.5}, {"score_function": "sigmoid", "scaling_factor": 2.5}),
            (
                {"k": 4, "renormalise": False, "num_groups": 4, "topk_groups": 2},
                {"use_pre_softmax": True, "num_groups": 4, "group_topk": 2},
            ),
        ],
    )
    def test_routing(self, options: dict[str, Any], theirs: dict[str, Any]) -> None:
        gate = make_gate(**options)
        out = gate(GateInput(make_tokens()))
        probs_TE, _ = self.peer().topk_routing_with_score_function(out.logits_TE, gate.config.k, **theirs)
        same(out, probs_TE)

    @pytest.mark.parametrize("policy", ["probs", "position"])
    def test_dropping(self, policy: str) -> None:
        gate = make_gate(renormalise=False, capacity_factor=0.75, drop_policy=policy)
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN))
        assert int(out.plan.dropped) > 0
        peer = self.peer()
        probs_TE, map_TE = peer.topk_routing_with_score_function(out.logits_TE, 2, use_pre_softmax=True)
        probs_TE, _ = peer.apply_router_token_dropping(probs_TE, map_TE, 2, 0.75, policy)
        if policy == "probs":
            same(out, probs_TE)
        else:  # theirs leaves the order of ties among a 0/1 map to torch.topk: only the counts are comparable
            assert out.plan.load_E.tolist() == (probs_TE > 0).sum(0).tolist()

    def test_losses(self) -> None:
        gate = make_gate(z_coef=1.0, balance_scope="micro_batch")
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN))
        probs_TE = out.logits_TE.softmax(-1)
        peer = self.peer()
        balance = peer.switch_load_balancing_loss_func(probs_TE, out.plan.offered_E, T, 2, E, 1.0)
        assert out.aux["balance"].item() == pytest.approx(balance.item(), rel=1e-5)
        assert out.aux["z"].item() == pytest.approx(peer.z_loss_func(out.logits_TE, 1.0).item(), rel=1e-5)

    @pytest.mark.parametrize("k", [1, 2])
    def test_sinkhorn(self, k: int) -> None:
        """As its router does: choose by the balanced scores, weigh by sigmoid (one expert) or softmax of the logits."""
        gate = build_gate({"name": "sinkhorn", "k": k, "iterations": 1000, "tolerance": 1e-6}, D, E)
        (weight_ED,) = gate.parameters()
        with torch.no_grad():
            weight_ED.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN))
        logits_TE = out.logits_TE.detach()
        balanced_TE = self.peer().sinkhorn(logits_TE.double(), tol=1e-6)  # its loop never ends for much less
        expert_TK = balanced_TE.topk(k).indices
        weights_TE = logits_TE.sigmoid() if k == 1 else logits_TE.softmax(-1)
        same(out, dense(expert_TK, weights_TE.gather(1, expert_TK)))
        plain_TK = logits_TE.topk(k).indices
        assert (plain_TK != expert_TK).float().mean() > 0.1  # balancing has changed the choice

    def test_bias_update(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peer = self.peer()
        monkeypatch.setattr(peer.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        gate = make_gate("deepseek_v3", k=3)
        assert gate.selection_bias is not None
        gate.selection_bias.copy_(torch.linspace(-0.2, 0.2, E))
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN))
        theirs_E = peer.get_updated_expert_bias(out.plan.offered_E.float(), gate.selection_bias.clone(), 1e-3)
        gate.end_step(out.plan.offered_E, {})
        torch.testing.assert_close(gate.selection_bias, theirs_E)


class TestDeepSpeed:
    def peer(self) -> ModuleType:
        return library("deepspeed.moe.sharded_moe", "deepspeed")

    @pytest.mark.parametrize("factor", [0.5, 1.0])
    def test_top2(self, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        peer = self.peer()
        uniform_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(4))
        monkeypatch.setattr(peer, "gumbel_rsample", lambda shape, device: -(-uniform_TE.log()).log())
        gate = make_gate(
            noise="second_choice",
            capacity_factor=factor,
            min_capacity=4,
            drop_policy="choice",
            renormalise_kept=True,
        )
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN, rng=torch.Generator().manual_seed(4)))
        logits_TE = out.logits_TE.detach()
        loss, weight_TEC, _, _ = peer.top2gating(logits_TE.clone(), factor, 4)
        same(out, weight_TEC.sum(-1))
        first_E = torch.bincount(logits_TE.argmax(-1), minlength=E)
        assert loss.item() == pytest.approx(balance_loss(logits_TE.softmax(-1), first_E).item(), rel=1e-5)

    def test_gshard(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peer = self.peer()
        uniform_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(4))
        monkeypatch.setattr(peer, "gumbel_rsample", lambda shape, device: -(-uniform_TE.log()).log())
        gate = make_gate("gshard")
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN, rng=torch.Generator().manual_seed(4)))
        assert int(out.plan.dropped) > 0
        _, weight_TEC, _, _ = peer.top2gating(out.logits_TE.detach().clone(), 1.0, 1)
        same(out, weight_TEC.sum(-1))

    def test_switch(self) -> None:
        """Without jitter and with tokens in order of their position, as the paper has it."""
        out = make_gate("switch", jitter=0.0)(GateInput(make_tokens(), mode=Mode.TRAIN))
        loss, weight_TEC, _, counts_E = self.peer().top1gating(out.logits_TE.detach(), 1.25, 1, use_rts=False)
        assert out.plan.offered_E.tolist() == counts_E.tolist()
        assert out.aux["balance"].item() == pytest.approx(loss.item(), rel=1e-5)
        kept_E = (weight_TEC.sum(-1) > 0).sum(0)
        assert out.plan.load_E.tolist() == kept_E.tolist()

    @pytest.mark.parametrize("policy", ["probs", "position"])
    def test_topk(self, policy: str) -> None:
        options = {"k": 3, "capacity_factor": 0.75, "drop_policy": policy, "renormalise_kept": True}
        out = make_gate(**options)(GateInput(make_tokens(), mode=Mode.TRAIN))
        assert int(out.plan.dropped) > 0
        loss, weight_TEC, _, _ = self.peer().topkgating(out.logits_TE.detach(), 3, 0.75, 1, drop_policy=policy)
        same(out, weight_TEC.sum(-1))
        assert out.aux["balance"].item() == pytest.approx(loss.item(), rel=1e-5)

    def test_top1_in_order_of_position(self) -> None:
        gate = make_gate(k=1, renormalise=False, capacity_factor=1.0)
        out = gate(GateInput(make_tokens(), mode=Mode.TRAIN))
        loss, weight_TEC, _, counts_E = self.peer().top1gating(out.logits_TE.detach(), 1.0, 1, use_rts=False)
        assert out.plan.offered_E.tolist() == counts_E.tolist()
        assert out.plan.num_pairs == int((weight_TEC > 0).sum())
        assert out.aux["balance"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_z_loss_of_megatron_with_padding() -> None:
    peer = library("megatron.core.transformer.moe.moe_utils", "megatron-core")
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(2))
    padding_T = torch.arange(T) % 3 == 0
    assert z_loss(logits_TE[~padding_T]).item() == pytest.approx(peer.z_loss_func(logits_TE, 1.0, padding_T).item())
