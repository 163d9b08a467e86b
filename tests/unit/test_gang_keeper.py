"""When the engine looks after a gang, and when it has experts moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from serve.engine import expert_gang
from serve.engine.expert_gang import GangKeeper, RebalancePolicy, imbalance_of
from serve.engine.experts import ExpertCounts

pytestmark = pytest.mark.unit


class Gang:
    """Remembers what it was asked; one layer, two experts, two processes."""

    def __init__(self) -> None:
        self.rows_LW = torch.zeros(1, 2, dtype=torch.int64)
        self.loads: list[Any] = []
        self.checks = 0

    def rows(self) -> Tensor:
        return self.rows_LW.clone()

    def rebalance(self, load_LE: Tensor) -> dict[str, Any]:
        self.loads.append(load_LE.tolist())
        return {"changed": True}

    def check(self) -> None:
        self.checks += 1


def keeper_of(gang: Gang, **options: Any) -> GangKeeper:
    return GangKeeper(gang, RebalancePolicy(**options))  # type: ignore[arg-type]


class Passes:
    """An engine's counters, and the keeper that is told of them."""

    def __init__(self, gang: Gang, keeper: GangKeeper) -> None:
        self.gang, self.keeper, self.counts, self.tokens = gang, keeper, ExpertCounts(1, 2), 0

    def run(self, count: int, rows: list[int]) -> None:
        for _ in range(count):
            self.counts.add(torch.tensor([rows]), sum(rows))
            self.gang.rows_LW += torch.tensor([rows])
            self.tokens += sum(rows)
            self.keeper.after_pass(self.counts, self.tokens)


def test_experts_are_moved_by_the_loads_since_the_last_look_if_ranks_are_uneven() -> None:
    gang = Gang()
    passes = Passes(gang, keeper_of(gang, every_steps=4, threshold=1.2, min_tokens=0))
    passes.run(4, [5, 5])
    assert gang.loads == [], "level"
    passes.run(3, [8, 2])
    assert gang.loads == [], "too early"
    passes.run(1, [8, 2])
    assert gang.loads == [[[32, 8]]], "level passes from before the last look do not count"
    assert passes.keeper.last_summary == {"changed": True}
    passes.run(4, [5, 5])
    assert len(gang.loads) == 1
    # By hand, at once: what came since; and all there ever was if nothing came.
    passes.run(1, [3, 4])
    passes.keeper.rebalance(passes.counts, passes.tokens)
    passes.keeper.rebalance(passes.counts, passes.tokens)
    assert gang.loads[1:] == [[[3, 4]], [[20 + 32 + 20 + 3, 20 + 8 + 20 + 4]]]


def test_few_tokens_say_nothing_and_nobody_need_be_moved() -> None:
    gang = Gang()
    passes = Passes(gang, keeper_of(gang, every_steps=2, threshold=1.2, min_tokens=35))
    passes.run(3, [10, 0])
    assert gang.loads == []
    passes.run(1, [10, 0])
    assert gang.loads == [[[40, 0]]]
    never = Passes(Gang(), keeper_of(gang, every_steps=0))
    never.run(50, [10, 0])
    assert never.gang.loads == []


def test_an_idle_engine_asks_for_signs_of_life_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    gang, now_s = Gang(), [100.0]
    monkeypatch.setattr(expert_gang.time, "monotonic", lambda: now_s[0])
    keeper = keeper_of(gang)
    for _ in range(9):
        keeper.while_idle()
        now_s[0] += 0.25
    assert gang.checks == 3
    keeper.after_pass(ExpertCounts(1, 2), 0)
    keeper.while_idle()
    assert gang.checks == 3, "the pass was a sign of life"


def test_imbalance_adds_layers_up_and_is_1_without_rows() -> None:
    assert imbalance_of(torch.tensor([[3, 1], [1, 3]])) == 1.5
    assert imbalance_of(torch.zeros(2, 3, dtype=torch.int64)) == 1.0


@pytest.mark.parametrize("options", [{"every_steps": -1}, {"threshold": 0.5}, {"min_tokens": -1}])
def test_a_policy_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"rebalance.{next(iter(options))} must be at least"):
        RebalancePolicy(**options)
