"""Interval sums: what a log line says about balance, checked against hand-made loads."""

from __future__ import annotations

import json

import pytest
import torch

from launch.phase_timer import PhaseTimer
from launch.step_stats import Interval, StepStats

pytestmark = pytest.mark.unit


def reduced(loss: float, load: list[list[int]], offered: list[list[int]] | None = None) -> StepStats:
    stats = StepStats(len(load), len(load[0]))
    stats.nats, stats.tokens = loss * 10, 10
    stats.load_LE = torch.tensor(load)
    stats.offered_LE = torch.tensor(offered or load)
    stats.scalars_L = [{"aux/balance": 1.0 + row, "gate/entropy": 0.5} for row in range(len(load))]
    return stats


def test_interval_means_and_balance() -> None:
    interval = Interval()
    interval.add(reduced(3.0, [[6, 2], [4, 4]], [[8, 2], [4, 4]]))
    interval.add(reduced(1.0, [[6, 2], [4, 4]], [[8, 2], [4, 4]]))
    assert interval.loss == 2.0
    assert interval.load_LE == [[12, 4], [8, 8]]
    assert interval.imbalance() == pytest.approx((1.5 + 1.0) / 2)
    assert interval.dropped_fraction() == pytest.approx(4 / 36)
    assert interval.dead_expert_fraction() == 0.0
    assert interval.means("aux") == {"balance": 1.5}
    assert interval.means("gate") == {"entropy": 0.5}


def test_dead_experts_count_offers_and_empty_loads_are_balanced() -> None:
    interval = Interval()
    interval.add(reduced(1.0, [[0, 5, 0, 5]]))
    assert interval.dead_expert_fraction() == 0.5
    assert interval.imbalance() == 2.0
    nothing = Interval()
    nothing.add(reduced(1.0, [[0, 0]]))
    assert nothing.imbalance() == 1.0
    assert nothing.dropped_fraction() == 0.0


def test_interval_survives_a_checkpoint_exactly() -> None:
    interval = Interval()
    interval.add(reduced(1 / 3, [[1, 2]]))
    assert Interval.from_values(json.loads(json.dumps(interval.to_values()))) == interval


def test_phase_timer_adds_up_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = PhaseTimer(torch.device("cpu"))
    with timer.phase("forward"):
        pass
    with timer.phase("backward"):
        pass
    with timer.phase("forward"):
        pass
    assert timer.take() == {"forward": 1.5, "backward": 2.0}
    assert timer.take() == {}
