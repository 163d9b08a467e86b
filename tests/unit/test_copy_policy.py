"""Decisions of the copy policy from loads and times that are given to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe.errors import CheckpointError
from parallel.config import ParallelConfig
from parallel.copy_policy import PROFILED_STEPS, CopyPolicy
from parallel.exchange import LinkModel
from parallel.topology import Topology
from tests.harness import run_single

pytestmark = pytest.mark.unit

OWNER_LE = np.array([[0, 0, 1, 1]])
LOAD_LE = np.array([[40, 40, 10, 10]])
"""Rank 0 has 80 of 100 rows; with experts 0 and 2 (or 3) on one rank both have 50."""


def profiled(topology: Topology, ns_per_row: int) -> CopyPolicy:
    """A policy for two ranks that copies nothing and has seen its steps; a byte takes 1 us, a row is 1 byte."""
    config = ParallelConfig(mode="fssdp-keep", planner="calibrate", overlap_degree=0, reshard_interval=10, link_mbit=8)
    policy = CopyPolicy(config, topology, [0, 1], OWNER_LE.shape)
    policy.link = LinkModel(0, 10**6)
    for _ in range(PROFILED_STEPS):
        policy.after_step(LOAD_LE, chunk_bytes=1000, row_bytes=1, free_ns_L=[0], ns_per_row=ns_per_row)
    return policy


def two_ranks(topology: Topology) -> Topology:
    return Topology(0, 2, 0, 2, topology.device, "test", None)


@pytest.mark.parametrize(("expert_bytes", "pays"), [(2_099, True), (2_100, False), (10**9, False)])
def test_owners_move_only_if_that_saves_time(expert_bytes: int, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def owners(topology: Topology) -> np.ndarray:
        monkeypatch.setattr(Topology, "gather_objects", lambda self, value: [value, value])
        policy = profiled(two_ranks(topology), ns_per_row=1000)
        return policy.owners(OWNER_LE, np.array([2, 2]), expert_bytes)

    new_LE = run_single(owners)
    # 30 rows less on the busiest rank, of 3 us compute (backward twice forward) and 4 us travel, in each of 10 steps,
    # against one expert that each rank sends: 1 us a byte.
    assert 30 * 7 * 10 == 2100
    rows_W = [int(LOAD_LE[new_LE == rank].sum()) for rank in (0, 1)]
    assert rows_W == ([50, 50] if pays else [80, 20])
    assert np.bincount(new_LE[0]).tolist() == [2, 2]


def policy_of(**options: object) -> CopyPolicy:
    config = ParallelConfig(mode="fssdp-keep", overlap_degree=1, link_mbit=8, **options)
    return run_single(lambda topology: CopyPolicy(config, topology, [0], OWNER_LE.shape))


def saved() -> dict[str, Any]:
    """The state of a policy that has seen a step, as a checkpoint gives it back."""
    policy = policy_of()
    policy.after_step(LOAD_LE, chunk_bytes=1, row_bytes=1, free_ns_L=[0], ns_per_row=1)
    state: dict[str, Any] = json.loads(json.dumps(policy.state()))
    return state


def test_a_saved_state_predicts_as_before_unless_the_predictor_is_another_now() -> None:
    alike, other = policy_of(), policy_of(predictor="ema")
    alike.load_state(saved(), same_ranks=False)
    other.load_state(saved(), same_ranks=True)
    assert alike.state()["predictor"] == saved()["predictor"]
    assert other.state()["predictor"] == policy_of(predictor="ema").state()["predictor"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("rows_L"),
        lambda state: state["predictor"].update(recent=[[[1, 2]]]),
        lambda state: state["predictor"].update(recent=[[[1, -2, 3, 4]]]),
        lambda state: state.update(predictor=None),
    ],
)
def test_a_damaged_state_is_named_and_not_dropped(damage: Callable[[dict[str, Any]], object]) -> None:
    state = saved()
    damage(state)
    with pytest.raises(CheckpointError, match=r"state of experts over ranks is damaged .* resume from an earlier"):
        policy_of().load_state(state, same_ranks=True)
