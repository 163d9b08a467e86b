"""The layer alone: as in anybody's model, its outputs, losses and errors."""

from __future__ import annotations

import pytest
import torch

from gates import GateNumericsError, Mode, RoutingPlan, TopKConfig
from moe import MoELayer, RoutingContext
from moe.dispatch import Dispatched, LocalDispatcher
from moe.errors import UserError

pytestmark = pytest.mark.unit


def test_the_example_of_the_docstring() -> None:
    layer = MoELayer(256, 512, num_experts=8, gate={"name": "topk", "k": 2})
    y, routing = layer(torch.randn(4, 12, 256))
    assert y.shape == (4, 12, 256)
    assert routing.plan.load_E.sum() == 4 * 12 * 2
    assert routing.plan.uniform_k == 2


def test_a_stack_of_layers_learns() -> None:
    torch.manual_seed(0)
    layer, head = MoELayer(16, 32, 4), torch.nn.Linear(16, 3)
    x = torch.randn(64, 16)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(40):
        out = layer(x)
        loss = torch.nn.functional.cross_entropy(head(x + out.y), target) + out.aux_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_mode_follows_the_module_when_there_is_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(8, 8, 4)
    seen = []
    forward = layer.gate.forward
    monkeypatch.setattr(layer.gate, "forward", lambda inp: (seen.append((inp.mode, inp.rng)), forward(inp))[1])
    layer(torch.randn(3, 8))
    layer.eval()
    layer(torch.randn(3, 8))
    layer(torch.randn(3, 8), RoutingContext(mode=Mode.PREFILL))
    assert seen == [(Mode.TRAIN, None), (Mode.EVAL, None), (Mode.PREFILL, None)]


def test_aux_loss_is_the_weighted_sum() -> None:
    out = MoELayer(8, 8, 4, {"name": "topk", "balance_coef": 0.5, "z_coef": 0.25})(torch.randn(10, 8))
    expected = 0.5 * out.routing.aux["balance"] + 0.25 * out.routing.aux["z"]
    torch.testing.assert_close(out.aux_loss(), expected)
    none = MoELayer(8, 8, 4, {"name": "topk", "balance_coef": 0.0})(torch.randn(10, 8))
    assert none.aux_loss() == 0


def test_pain_8_aux_loss_reaches_the_gate() -> None:
    """Dropped auxiliary gradients: Automodel #1408. Coefficient 0 and 1 must give other gate gradients."""
    gradients = []
    for coef in (0.0, 1.0):
        torch.manual_seed(0)
        layer = MoELayer(8, 8, 4, {"name": "topk", "balance_coef": coef})
        out = layer(torch.randn(32, 8))
        (out.y.sum() + out.aux_loss()).backward()
        gradients.append(layer.gate.weight.grad)
    assert not torch.allclose(*gradients)


def test_a_loss_without_coefficient_is_a_bug_of_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(8, 8, 4)
    monkeypatch.setattr(TopKConfig, "aux_coefs", lambda self: {"z": 1.0})
    with pytest.raises(ValueError, match=r"gate 'topk' returned the loss 'balance', its config has no balance_coef"):
        layer(torch.randn(3, 8)).aux_loss()


def test_shared_experts_are_one_network_that_every_token_visits() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 4, num_shared_experts=3)
    assert layer.shared is not None
    assert layer.shared.w_up.weight.shape == (36, 8)
    x = torch.randn(5, 8)
    y = layer(x).y
    shared = layer.shared(x)
    # Three networks of width 12 side by side give the same sum.
    parts = sum(
        torch.nn.functional.silu(x @ layer.shared.w_gate.weight[i : i + 12].T)
        * (x @ layer.shared.w_up.weight[i : i + 12].T)
        @ layer.shared.w_down.weight[:, i : i + 12].T
        for i in (0, 12, 24)
    )
    torch.testing.assert_close(shared, parts)
    layer.shared = None
    torch.testing.assert_close(y, layer(x).y + shared)


def test_empty_input_and_all_padding() -> None:
    layer = MoELayer(8, 8, 4)
    out = layer(torch.randn(0, 8))
    assert out.y.shape == (0, 8)
    (out.y.sum() + out.aux_loss()).backward()
    assert all(p.grad is not None for p in layer.experts.parameters())
    padded = layer(torch.randn(3, 8), RoutingContext(valid_T=torch.zeros(3, dtype=torch.bool)))
    assert padded.y.eq(0).all()
    assert padded.routing.plan.load_E.sum() == 0


def test_padding_is_routed_nowhere_and_changes_nothing() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(8, 8, 4), torch.randn(6, 8)
    valid_T = torch.tensor([True, True, False, True, False, True])
    padded = layer(x, RoutingContext(valid_T=valid_T))
    torch.testing.assert_close(padded.y[valid_T], layer(x[valid_T]).y)
    assert padded.y[~valid_T].eq(0).all()
    assert padded.routing.plan.load_E.sum() == 4 * 2


def test_replay_repeats_the_selection() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(8, 8, 6), torch.randn(9, 8)
    plan = layer.choose(x, RoutingContext())
    assert not plan.weight_N.requires_grad
    other = torch.randn(9, 8)
    replayed = layer(other, RoutingContext(replay=plan)).routing.plan
    assert torch.equal(replayed.expert_N, plan.expert_N)
    assert replayed.weight_N.requires_grad
    assert torch.equal(layer(x, RoutingContext(replay=plan)).y, layer(x).y)


def test_any_dispatcher_can_stand_in() -> None:
    class Counting(LocalDispatcher):
        rows = 0

        def dispatch(self, x_TD: torch.Tensor, plan: RoutingPlan) -> Dispatched:
            dispatched = super().dispatch(x_TD, plan)
            self.rows += len(dispatched.rows_ND)
            return dispatched

    dispatcher = Counting()
    MoELayer(8, 8, 4, dispatcher=dispatcher)(torch.randn(5, 8))
    assert dispatcher.rows == 10


def test_batch_gate_is_replaced_for_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer(8, 8, 4, {"name": "topk", "capacity_factor": 0.5, "drop_policy": "probs"})
    assert layer.gate_for(Mode.TRAIN) is layer.gate
    assert layer.gate_for(Mode.EVAL) is layer.gate
    for mode in (Mode.PREFILL, Mode.DECODE):
        surrogate = layer.gate_for(mode)
        assert surrogate is not layer.gate
        assert surrogate.weight is layer.gate.weight
    monkeypatch.setattr(type(layer.gate), "causal_surrogate", lambda self: None)
    with pytest.raises(UserError, match="gate 'topk' routes a token by looking at the whole batch and has no causal"):
        layer(torch.randn(3, 8), RoutingContext(mode=Mode.DECODE))


def test_bad_input_is_named() -> None:
    layer = MoELayer(8, 8, 4)
    with pytest.raises(ValueError, match=r"MoELayer\(dim=8\) got an input of shape \(2, 9\)"):
        layer(torch.zeros(2, 9))
    with pytest.raises(GateNumericsError, match="scores of 1 of 2 tokens are NaN or infinite"):
        layer(torch.tensor([[0.0] * 8, [float("nan")] * 8]))
    with pytest.raises(ValueError, match=r"unknown gate 'topq'\. Did you mean 'topk'"):
        MoELayer(8, 8, 4, "topq")
    with pytest.raises(ValueError, match="gate 'topk' with 2 experts: k: 3 experts per token"):
        MoELayer(8, 8, 2, {"name": "topk", "k": 3})


def test_same_seed_same_layer_and_output_dtype_is_the_inputs() -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(7)
        layers.append(MoELayer(8, 8, 4, num_shared_experts=1))
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(a, b)
    assert layers[0](torch.randn(3, 8).bfloat16()).y.dtype == torch.bfloat16
