"""Planners on cases small enough to see, what they refuse, and that they are fast and blind to everything but loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parallel.placement import Placement, PlacementError, even_owners
from parallel.planner import plan_copies, plan_more_copies, plan_spill, rows_per_rank

pytestmark = pytest.mark.unit

FOUR = Placement([0, 1, 2, 3], world_size=4)


def loads(*rows: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def test_where_memory_allows_the_most_loaded_go_everywhere() -> None:
    plan = plan_copies(FOUR, loads(5, 40, 7, 30), overlap_degree=2, max_copies=2, node_W=[0, 0, 1, 1])
    assert plan.copies_E.tolist() == [0, 3, 0, 3]


def test_where_memory_is_short_copies_follow_load() -> None:
    """4 slots for loads 60 : 20 : 20 are 2.4, 0.8, 0.8: two copies, then the largest remainders get one each."""
    plan = plan_copies(FOUR, loads(60, 20, 20, 0), overlap_degree=3, max_copies=1, node_W=[0, 0, 1, 1])
    assert plan.copies_E.tolist() == [2, 1, 1, 0]
    assert plan.copies_W.tolist() == [1, 1, 1, 1]


def test_a_copy_goes_to_a_node_without_one_first() -> None:
    plan = plan_copies(FOUR, loads(9, 9, 9, 9), overlap_degree=4, max_copies=1, node_W=[0, 0, 1, 1])
    assert [plan.holders(expert) for expert in range(4)] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_equal_loads_are_taken_in_the_order_of_experts() -> None:
    plan = plan_copies(FOUR, loads(7, 7, 7, 7), overlap_degree=2, max_copies=2, node_W=[0, 0, 0, 0])
    assert plan.copies_E.tolist() == [3, 3, 0, 0]


def test_an_expert_without_load_gets_no_copy_though_slots_are_left() -> None:
    plan = plan_copies(FOUR, loads(0, 9, 0, 0), overlap_degree=4, max_copies=3, node_W=[0] * 4)
    assert plan.copies_E.tolist() == [0, 3, 0, 0]
    assert plan_copies(FOUR, loads(0, 0, 0, 0), 4, 3, [0] * 4) == FOUR


def test_one_overwhelming_expert_leaves_its_surplus_of_slots_to_the_next() -> None:
    """All 8 slots are the first expert's by load; it can use 3. The rest go to 33, 20, 33/2, 12, 33/3 rows a holder."""
    plan = plan_copies(FOUR, loads(1000, 33, 20, 12), overlap_degree=4, max_copies=2, node_W=[0] * 4)
    assert plan.copies_E.tolist() == [3, 3, 1, 1]


@pytest.mark.parametrize(("overlap_degree", "max_copies"), [(0, 3), (3, 0)])
def test_nothing_to_hide_or_to_hold_is_expert_parallelism(overlap_degree: int, max_copies: int) -> None:
    assert plan_copies(FOUR, loads(9, 3, 2, 1), overlap_degree, max_copies, [0, 0, 1, 1]) == FOUR


def test_plans_do_not_depend_on_how_loads_are_stored() -> None:
    load_E = np.random.default_rng(3).integers(0, 1000, 64)
    sharding = Placement(even_owners(1, 64, 8)[0], world_size=8)
    plan = plan_copies(sharding, load_E, 9, 3, [0, 0, 0, 0, 1, 1, 1, 1])
    strided = np.stack((load_E, load_E), 1)[:, 0].astype(np.int32)
    assert plan == plan_copies(sharding, strided, 9, 3, [0, 0, 0, 0, 1, 1, 1, 1])


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_copies_what_the_prediction_missed_if_it_pays() -> None:
    predicted = plan_copies(FOUR, loads(50, 10, 10, 10), overlap_degree=1, max_copies=2, node_W=[0] * 4)
    true_E = loads(40, 60, 10, 10)  # rank 1 has 70 rows; with expert 1 everywhere ranks 2 and 3 have most, 35
    pays = plan_more_copies(predicted, true_E, 1, 2, [0] * 4, ns_per_row=100, ns_per_copy=3499)
    assert pays.copies_E.tolist() == [3, 3, 0, 0]
    assert rows_per_rank(true_E, pays).tolist() == [25, 25, 35, 35]
    assert plan_more_copies(predicted, true_E, 1, 2, [0] * 4, ns_per_row=100, ns_per_copy=3500) is predicted


def test_calibration_weighs_rows_saved_against_all_copies_that_one_rank_receives() -> None:
    """Two experts everywhere: the busiest rank goes from 60 rows to 30, and ranks 2 and 3 receive two copies each."""
    for price, copies in ((1499, 6), (1500, 0)):
        more = plan_more_copies(FOUR, loads(60, 60, 0, 0), 2, 2, [0] * 4, ns_per_row=100, ns_per_copy=price)
        assert more.copies_E.sum() == copies


def test_calibration_never_drops_a_copy_and_keeps_within_memory() -> None:
    predicted = plan_copies(FOUR, loads(50, 10, 10, 10), overlap_degree=1, max_copies=1, node_W=[0] * 4)
    true_E = loads(0, 90, 0, 0)
    more = plan_more_copies(predicted, true_E, 1, 1, [0] * 4, ns_per_row=1, ns_per_copy=0)
    assert more.copied_to(1) == more.copied_to(2) == more.copied_to(3) == [0]
    assert more.copied_to(0) == [1]  # the owner of what was predicted has a slot left


# --- spill ------------------------------------------------------------------------------------------------------------


def test_spill_moves_the_surplus_to_where_it_just_fits() -> None:
    """The mean is 30: rank 0 spills 40 rows; rank 3 has room for 25, rank 1 for 15."""
    placement, quota_EW = plan_spill(FOUR, loads(70, 15, 30, 5), max_copies=1)
    assert placement.holders(0) == [0, 1, 3]
    assert quota_EW.tolist() == [[30, 15, 0, 25], [0, 15, 0, 0], [0, 0, 30, 0], [0, 0, 0, 5]]


def test_spill_takes_the_tightest_room_that_is_enough() -> None:
    """The mean is 30; rank 4 has just room for the 10 of rank 0, which leaves rank 5 in one piece for the others."""
    sharding = Placement(range(6), world_size=6)
    placement, quota_EW = plan_spill(sharding, loads(40, 39, 38, 38, 20, 5), max_copies=3)
    assert [placement.holders(expert) for expert in range(4)] == [[0, 4], [1, 5], [2, 5], [3, 5]]
    assert quota_EW.sum(0).tolist() == [30] * 6


def test_spill_serves_the_busiest_rank_first_where_slots_are_few() -> None:
    placement, quota_EW = plan_spill(FOUR, loads(35, 55, 0, 30), max_copies=1)
    assert placement.copies_E.tolist() == [0, 1, 0, 0]
    assert quota_EW.sum(0).tolist() == [35, 30, 25, 30]


def test_spill_levels_what_predicted_copies_left() -> None:
    """Expert 0 is everywhere, 10 rows each; of the others rank 1 has 30 rows too many, for which 2 and 3 have room."""
    current = FOUR.with_copies([(0, 1), (0, 2), (0, 3)])
    load_E = loads(40, 60, 10, 10)
    settled_EW = np.zeros((4, 4), dtype=np.int64)
    settled_EW[0] = 10
    placement, quota_EW = plan_spill(current, load_E, max_copies=2, settled_EW=settled_EW)
    assert quota_EW.sum(0).tolist() == [30, 30, 30, 30]
    assert placement.holders(1) == [0, 1, 2, 3]
    full = plan_spill(current, load_E, max_copies=1, settled_EW=settled_EW)
    assert full.placement.copied_to(0) == [1]  # which holds no copy yet; the others are full
    assert full.quota_EW.sum(0).tolist() == [30, 50, 20, 20]


def test_spill_stops_at_the_level_and_at_small_moves() -> None:
    near = loads(33, 29, 30, 28)
    assert plan_spill(FOUR, near, 2, level_num=11, level_den=10).placement == FOUR
    assert plan_spill(FOUR, near, 2, min_rows=4).placement == FOUR
    assert plan_spill(FOUR, near, 2, min_rows=2).quota_EW.sum(0).tolist() == [31, 29, 30, 30]


def test_spill_of_a_balanced_layer_copies_nothing() -> None:
    assert plan_spill(FOUR, loads(5, 5, 5, 5), 4).placement == FOUR
    assert plan_spill(FOUR, loads(0, 0, 0, 0), 4).placement == FOUR


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_copies(FOUR, loads(1, 2), 1, 1, [0] * 4), "load_E has shape (2,), the placement has 4 experts"),
        (
            lambda: plan_copies(FOUR, loads(1, 2, 3, -1), 1, 1, [0] * 4),
            "loads must be integers from 0 to 1099511627775",
        ),
        (lambda: plan_copies(FOUR, loads(1, 2, 3, 2**40), 1, 1, [0] * 4), "loads must be integers from 0 to"),
        (
            lambda: plan_copies(FOUR, np.ones(4), 1, 1, [0] * 4),
            "loads must be integers from 0 to 1099511627775, not float",
        ),
        (lambda: plan_copies(FOUR, loads(1, 2, 3, 4), 1, 1, [0] * 3), "node_W names 3 ranks, the placement has 4"),
        (lambda: plan_copies(FOUR, loads(1, 2, 3, 4), -1, 1, [0] * 4), "overlap_degree is -1; it must be 0 or more"),
        (lambda: plan_copies(FOUR, loads(1, 2, 3, 4), 1, -2, [0] * 4), "max_copies is -2; it must be 0 or more"),
        (lambda: plan_spill(FOUR, loads(1, 2, 3, 4), -2), "max_copies is -2; it must be 0 or more"),
        (lambda: plan_spill(FOUR, loads(1, 2, 3, 4), 1, min_rows=-1), "min_rows is -1; it must be 0 or more"),
        (
            lambda: plan_spill(FOUR, loads(1, 2, 3, 4), 1, level_num=9, level_den=10),
            "the level 9/10 of the mean cannot be reached; it must be at least 1",
        ),
        (
            lambda: plan_spill(FOUR.with_copies([(1, 2)]), loads(1, 2, 3, 4), 1),
            "expert 1 has copies and 2 rows, settled_EW shares out 0",
        ),
        (lambda: rows_per_rank(loads(1), FOUR), "load_E has shape (1,), the placement has 4 experts"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(call: Any, words: str) -> None:
    with pytest.raises(PlacementError) as caught:
        call()
    assert words in str(caught.value)


def test_loads_just_below_the_limit_do_not_overflow() -> None:
    sharding = Placement(even_owners(1, 256, 64)[0], world_size=64)
    load_E = np.full(256, 2**40 - 1)
    plan = plan_copies(sharding, load_E, 256, 16, [rank // 8 for rank in range(64)])
    assert plan.copies_E.max() == 4
    assert plan.copies_W.sum() >= 64 * 16 - 4  # the last slots may be left on the owners of the last experts
    load_E[1:] = 1
    assert plan_spill(sharding, load_E, 4).quota_EW.sum(0).max() == -(-(2**40 - 1 + 255) // 64)
