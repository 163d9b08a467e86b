"""Seconds by phase of a training loop."""

from __future__ import annotations

import time

import pytest
import torch

from launch.phase_timer import PhaseTimer

pytestmark = pytest.mark.unit


@pytest.fixture
def timer() -> PhaseTimer:
    return PhaseTimer(torch.device("cpu"))


def test_each_phase_gets_its_own_time_and_repeats_add_up(timer: PhaseTimer) -> None:
    start = time.perf_counter()
    for _ in range(3):
        with timer.phase("forward"):
            time.sleep(0.01)
        with timer.phase("reduce"):
            time.sleep(0.002)
    elapsed = time.perf_counter() - start
    seconds = timer.take()
    assert list(seconds) == ["forward", "reduce"]
    # Sleeps never end early; how late they end shows in the whole time too.
    assert seconds["forward"] >= 0.03
    assert seconds["reduce"] >= 0.006
    assert sum(seconds.values()) <= elapsed


def test_time_between_phases_is_nobody_s(timer: PhaseTimer) -> None:
    with timer.phase("data"):
        pass
    time.sleep(0.05)
    with timer.phase("data"):
        pass
    assert timer.take()["data"] < 0.05


def test_taking_starts_anew(timer: PhaseTimer) -> None:
    with timer.phase("eval"):
        time.sleep(0.005)
    first = timer.take()
    assert timer.take() == {}
    with timer.phase("log"):
        pass
    assert set(timer.take()) == {"log"}
    assert set(first) == {"eval"}, "what was taken must not change afterwards"


def test_a_phase_that_fails_is_charged_and_the_error_goes_on(timer: PhaseTimer) -> None:
    def fail_after_a_while() -> None:
        with timer.phase("forward"):
            time.sleep(0.005)
            raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        fail_after_a_while()
    assert timer.take()["forward"] >= 0.005
