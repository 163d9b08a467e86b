"""Owners over all layers: slots, ties and moves by hand, the best there is by trying all, and level on random loads."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.placement import PlacementError, even_owners
from parallel.sharder import Move, busiest_rows, copied_experts, moves, plan_owners, worth_moving

pytestmark = pytest.mark.unit


def loads(*layers: list[int]) -> np.ndarray:
    return np.array(layers, dtype=np.int64)


def slots_of(owner_LE: np.ndarray, world: int) -> np.ndarray:
    return np.bincount(owner_LE.ravel(), minlength=world)


# --- invariants -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 6),
    experts=st.integers(1, 12),
    world=st.integers(1, 9),
    nodes=st.integers(1, 4),
    overlap_degree=st.integers(0, 13),
    more_free_first=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_expert_has_one_owner_and_every_rank_its_slots(
    layers: int, experts: int, world: int, nodes: int, overlap_degree: int, more_free_first: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    load_LE = rng.integers(0, rng.integers(1, 1000), (layers, experts))
    owner_LE = rng.integers(0, world, (layers, experts))  # present owners need not keep to the slots
    slots_W = slots_of(even_owners(layers, experts, world), world)
    node_W = rng.integers(0, nodes, world).tolist()
    new_LE = plan_owners(load_LE, owner_LE, overlap_degree, slots_W, node_W, more_free_first=more_free_first)
    assert new_LE.dtype == np.int64
    assert np.array_equal(slots_of(new_LE, world), slots_W)


@pytest.mark.parametrize("seed", range(20))
def test_with_slots_to_spare_a_layer_is_within_a_third_of_the_best_there_is(seed: int) -> None:
    """Heaviest first to the least loaded is at most 4/3 - 1/(3W) times the optimum (Graham 1969); all are tried."""
    rng = np.random.default_rng(seed)
    world, experts = 3, 6
    load_LE = np.zeros((world, experts), dtype=np.int64)  # the other layers only bring slots: enough for all of one
    load_LE[1] = rng.integers(1, 100, experts)
    owner_LE = even_owners(world, experts, world)
    new_LE = plan_owners(load_LE, owner_LE, 0, slots_of(owner_LE, world), [0] * world)
    best = min(
        max(sum(load for load, rank in zip(load_LE[1], owners, strict=True) if rank == r) for r in range(world))
        for owners in product(range(world), repeat=experts)
    )
    assert busiest_rows(load_LE, new_LE, 0, world)[1] <= best * (Fraction(4, 3) - Fraction(1, 3 * world))


@pytest.mark.parametrize("more_free_first", [False, True])
@pytest.mark.parametrize(("layers", "experts", "world", "overlap"), [(12, 64, 32, 6), (12, 64, 16, 6), (24, 16, 4, 2)])
def test_ranks_are_more_level_on_average_than_with_even_owners(
    layers: int, experts: int, world: int, overlap: int, more_free_first: bool
) -> None:
    rng = np.random.default_rng(5)
    load_LE = np.array([rng.multinomial(10**5, rng.dirichlet(np.full(experts, 0.5))) for _ in range(layers)])
    even_LE = even_owners(layers, experts, world)
    node_W = [rank * 4 // world for rank in range(world)]
    new_LE = plan_owners(load_LE, even_LE, overlap, slots_of(even_LE, world), node_W, more_free_first=more_free_first)
    before_L, after_L = (busiest_rows(load_LE, owner_LE, overlap, world) for owner_LE in (even_LE, new_LE))
    assert after_L.mean() < 0.85 * before_L.mean()


# --- rules, by hand ---------------------------------------------------------------------------------------------------


def test_heavy_layers_choose_first_and_experts_by_load() -> None:
    """Layer 1 has the heavier expert: 9 and 1 part, then 5 and 4 each take the other slot."""
    new_LE = plan_owners(loads([5, 4], [1, 9]), loads([0, 0], [0, 1]), 0, [2, 2], [0, 0])
    assert new_LE.tolist() == [[0, 1], [0, 1]]


def test_layers_choose_in_the_order_of_what_gets_no_copies() -> None:
    """Rank 0 has one slot, which both 5 and 9 want to keep; that layer 0 has the hottest expert does not count."""
    new_LE = plan_owners(loads([100, 5], [50, 9]), loads([1, 0], [1, 0]), 1, [1, 3], [0, 0])
    assert new_LE.tolist() == [[1, 1], [1, 0]]


def test_nodes_are_levelled_before_ranks() -> None:
    """8 goes to node 0, 7 to node 1; 6 too, for node 1 has fewer rows, though its owner is idle and on node 0."""
    new_LE = plan_owners(loads([8, 7, 6, 1]), loads([0, 2, 1, 3]), 0, [1, 1, 1, 1], [0, 0, 1, 1])
    assert new_LE.tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize("node_W", [[0, 0, 0], [0, 1, 2]], ids=["ranks", "nodes"])
@pytest.mark.parametrize(("more_free_first", "rank"), [(False, 1), (True, 2)])
def test_of_equally_loaded_ranks_or_nodes_that_with_fewer_free_slots_is_taken_or_with_more(
    more_free_first: bool, rank: int, node_W: list[int]
) -> None:
    """Rank 0 has one slot, which 9 keeps; the second layer only brings slots."""
    load_LE, owner_LE = loads([9, 8], [0, 0]), loads([0, 0], [0, 0])
    new_LE = plan_owners(load_LE, owner_LE, 0, [1, 1, 2], node_W, more_free_first=more_free_first)
    assert new_LE[0].tolist() == [0, rank]


def test_of_ranks_alike_the_present_owner_is_taken() -> None:
    owner_LE = loads([2, 0, 3, 1])
    assert plan_owners(loads([9, 8, 7, 6]), owner_LE, 0, [1, 1, 1, 1], [0, 0, 0, 0]).tolist() == owner_LE.tolist()


@pytest.mark.parametrize(("warm", "stays"), [(12, True), (13, False)])
def test_an_expert_stays_if_its_owner_has_an_eighth_of_the_mean_more_than_the_least(warm: int, stays: bool) -> None:
    """Mean 100: 88 and 100 part, so 12 may find its owner 12 above the other. (The second layer only brings slots.)"""
    load_LE = loads([100, 100 - warm, warm], [0, 0, 0])
    new_LE = plan_owners(load_LE, loads([0, 1, 0], [0, 1, 1]), 0, [3, 3], [0, 0])
    assert (new_LE[0, 2] == 0) == stays


def test_experts_with_copies_come_last_where_there_are_slots_and_few_rows() -> None:
    """6 and 5 part as if 99 were not there, 1 joins 5; then 99 has one slot left to go to, far from its owner."""
    assert plan_owners(loads([99, 6, 5, 1]), loads([1, 0, 1, 1]), 1, [2, 2], [0, 0]).tolist() == [[0, 0, 1, 1]]
    # With slots everywhere the two experts with copies part too: should they lose them, their owners get their rows.
    parted = plan_owners(loads([99, 98, 6, 5]), loads([0, 0, 0, 1]), 2, [2, 2], [0, 0])
    assert parted.tolist() == [[1, 0, 0, 1]]


def test_a_tie_for_the_last_copy_goes_to_the_lower_expert() -> None:
    assert copied_experts(loads([5, 7, 5, 5], [0, 0, 0, 0]), 2).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert copied_experts(loads([5, 7]), 9).all()
    assert not copied_experts(loads([5, 7]), 0).any()


def test_moves_are_what_differs() -> None:
    assert moves(loads([0, 1, 2], [2, 1, 0]), loads([0, 2, 2], [1, 1, 0])) == [Move(0, 1, 1, 2), Move(1, 0, 2, 1)]
    assert moves(loads([0, 1]), loads([0, 1])) == []


def test_moving_is_worth_it_if_it_saves_more_than_it_takes() -> None:
    """The busiest rank goes from 10 rows to 7 for one expert out and one in: over 5 steps of 3 ns that saves 45 ns."""
    load_LE, old_LE, new_LE = loads([6, 4, 1, 1]), loads([0, 0, 1, 1]), loads([0, 1, 0, 1])
    new_rows = busiest_rows(load_LE, new_LE, 0, 2)
    assert busiest_rows(load_LE, old_LE, 0, 2).tolist() == [10]
    assert new_rows.tolist() == [7]
    worth = [
        worth_moving(load_LE, old_LE, new_LE, 0, 2, steps=5, ns_per_row=3, ns_per_move=price) for price in (44, 45, 46)
    ]
    assert worth == [True, False, False]
    # Rank 0 sends two experts, 14 rows become 6: that one rank receives only one does not make it cheaper.
    spread = loads([6, 4, 4]), loads([0, 0, 0]), loads([0, 1, 2])
    assert [worth_moving(*spread, 0, 3, steps=1, ns_per_row=1, ns_per_move=price) for price in (3, 4)] == [True, False]
    assert not worth_moving(load_LE, old_LE, old_LE, 0, 2, steps=5, ns_per_row=3, ns_per_move=0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_LE": loads([1, 2, 3])}, "load_LE has shape (1, 3), owner_LE (1, 2); both must be (L, E)"),
        ({"load_LE": loads([1, -2])}, "a load is -2; loads are 0 or more"),
        ({"owner_LE": loads([0, 2])}, "owners are 0 to 2; ranks are 0 to 1"),
        ({"owner_LE": loads([-1, 0])}, "owners are -1 to 0; ranks are 0 to 1"),
        ({"slots_W": [1, 2]}, "slots_W is [1, 2], 3 in all; there are 2 experts to own"),
        ({"slots_W": [3, -1]}, "slots_W is [3, -1], 2 in all; there are 2 experts to own"),
        ({"node_W": [0]}, "node_W names 1 ranks, slots_W 2"),
        ({"overlap_degree": -1}, "overlap_degree is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    good = {"load_LE": loads([1, 2]), "owner_LE": loads([0, 1]), "overlap_degree": 0, "slots_W": [1, 1]}
    with pytest.raises(PlacementError) as caught:
        plan_owners(**{**good, "node_W": [0, 0], **change})
    assert str(caught.value) == words
