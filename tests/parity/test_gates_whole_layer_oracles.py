"""Zero-computation experts and soft mixtures: what the whole layer computes, against plain NumPy loops.

Shape suffixes: T tokens, D width, E experts, A experts and zero-computation experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gates import GateInput, Mode, RoutingPlan, build_gate
from gates.soft import SoftGate
from gates.zero_computation import ZeroComputationGate
from moe import MoELayer
from moe.dispatch import Dispatched, LocalDispatcher
from moe.errors import UserError
from moe.layer import RoutingContext
from tests.routing_oracles import Array, best, draw, expit, softmax, visits

pytestmark = pytest.mark.unit


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
