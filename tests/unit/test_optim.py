"""Parameter groups and learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.config import OptimConfig
from launch.optim import build_optimizer, learning_rate, set_learning_rate

pytestmark = pytest.mark.unit


def test_warmup_then_cosine_reaches_peak_and_floor() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr_fraction=0.1)
    assert [learning_rate(s, 100, config) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(4, 100, config) == 1.0
    assert learning_rate(52, 100, config) == pytest.approx(0.55)  # half way: mean of 1 and 0.1
    assert learning_rate(100, 100, config) == pytest.approx(0.1)
    rates = [learning_rate(s, 100, config) for s in range(4, 101)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_is_constant_then_linear() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=0, schedule="wsd", decay_fraction=0.5, final_lr_fraction=0.0)
    assert learning_rate(0, 100, config) == learning_rate(50, 100, config) == 2.0
    assert learning_rate(75, 100, config) == pytest.approx(1.0)
    assert learning_rate(100, 100, config) == 0.0


def test_constant_stays_and_one_step_runs_have_no_division_by_zero() -> None:
    config = OptimConfig(lr=0.5, warmup_steps=0, schedule="constant")
    assert {learning_rate(s, 10, config) for s in range(10)} == {0.5}
    for schedule in ("cosine", "wsd", "constant"):
        assert learning_rate(0, 1, OptimConfig(schedule=schedule, warmup_steps=0)) > 0


def test_only_matrices_decay_and_state_exists_before_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model.experts = nn.Parameter(torch.zeros(4, 3, 2))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == decay[id(model.experts)] == 0.3
    assert decay[id(model[0].bias)] == decay[id(model[1].weight)] == 0.0
    assert len(decay) == 5
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in model.parameters())


def test_adamw_steps_equal_the_published_update() -> None:
    """Three steps against the formulas of arXiv:1711.05101, algorithm 2, written out here."""
    config = OptimConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    model = nn.Linear(2, 2, bias=False).double()
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model.weight.grad = gradient.clone()
        set_learning_rate(optimizer, 0.1 / step)
        optimizer.step()
        lr = 0.1 / step
        weight = weight * (1 - lr * 0.2)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight = weight - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-10, atol=1e-12)
