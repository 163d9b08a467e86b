"""The gate benchmarks measure what they say: their functions at tiny sizes against independent loops."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.unit
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gates"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gate_benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    kept = sys.path[0]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[0] = kept
    return module


def tokens_left_by_choice(logits_TE: Tensor, capacity: int) -> int:
    """Each expert's best tokens by a plain loop; how many tokens none of them took."""
    scores, taken = logits_TE.softmax(-1).tolist(), set()
    for expert in range(logits_TE.shape[1]):
        ranked = sorted(range(len(scores)), key=lambda token: -scores[token][expert])
        taken |= set(ranked[:capacity])
    return len(scores) - len(taken)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_coverage_counts_what_a_loop_counts(factor: float) -> None:
    coverage = load("coverage")
    rows = {row["gate"]: row for row in coverage.measure(32, 4, [factor], 2)}
    expected = [tokens_left_by_choice(coverage.draw_logits(32, 4, seed), int(8 * factor)) for seed in range(2)]
    assert rows["expert_choice"]["uncovered"] == expected
    assert sum(expected) > 0
    assert sum(rows["sparse_ot"]["uncovered"]) < sum(expected)


def test_gate_time_trains_topk_as_the_bare_router_does() -> None:
    """Same tokens and weights, no loss: the two timed calls must leave the same gradient, or they do different work."""
    gate_time = load("gate_time")
    inp, grad_N = gate_time.train_input(48, 16), torch.randn(48 * 8, generator=torch.Generator().manual_seed(1))
    gate = gate_time.build_gate({"name": "topk", "k": 2, "balance_coef": 0.0}, 16, 8)
    (weight_ED,) = gate.parameters()
    gate_time.gate_call(gate, inp, grad_N)()
    ours_TD = inp.x_TD.grad.clone()
    gate_time.bare_call(weight_ED.detach().clone().requires_grad_(), inp.x_TD, 2, grad_N)()
    torch.testing.assert_close(ours_TD, inp.x_TD.grad)
    assert ours_TD.abs().max() > 0


def test_gate_time_divides_within_a_round() -> None:
    gate_time = load("gate_time")
    took = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}
    assert gate_time.ratio(took, "a", "b") == 2.0
    assert gate_time.ratio(took, "b", "a") == 0.5
