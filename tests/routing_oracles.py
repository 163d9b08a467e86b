"""What the oracles of routing share: inputs, gates whose tokens are their own logits, and NumPy's view of a plan.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gates import Gate, GateInput, GateOutput, Mode, RoutingPlan, build_gate
from gates.linear import LinearGate
from gates.topk import TopKGate

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
