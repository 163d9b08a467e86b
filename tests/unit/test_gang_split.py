"""Rows of a serving gang: each computed once, by a holder of its expert, and ranks as level as copies allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.gang_planner import WORTH_PERCENT, busiest_rows, expected_rows, imbalance_of, plan_layer
from parallel.gang_split import HolderTable
from parallel.placement import Placement, even_owners

pytestmark = pytest.mark.unit


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    world = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 9))
    owner_E = draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts))
    copies = draw(st.lists(st.tuples(st.integers(0, experts - 1), st.integers(0, world - 1)), max_size=12))
    return Placement(owner_E, world_size=world).with_copies(copies)


@given(placements(), st.data())
def test_every_row_is_computed_once_by_a_holder_of_its_expert(placement: Placement, data: st.DataObject) -> None:
    size = placement.num_experts
    load_E = np.array(data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))
    table = HolderTable(placement)
    split = table.split(load_E)
    assert sorted(split.row_N.tolist()) == list(range(load_E.sum()))
    assert sum(split.rows_W) == load_E.sum()
    expert_N = np.repeat(np.arange(size), load_E)[split.row_N]
    begin = 0
    for rank, (rows, load_e) in enumerate(zip(split.rows_W, split.load_We, strict=True)):
        assert load_e.sum() == rows
        assert len(load_e) == len(table.held_We[rank])
        # Held experts one after another, each with as many rows as it is said to have, in their old order.
        mine_N = split.row_N[begin : begin + rows]
        assert expert_N[begin : begin + rows].tolist() == np.repeat(table.held_We[rank], load_e).tolist()
        for part in np.split(mine_N, np.cumsum(load_e)[:-1]):
            assert (np.diff(part) > 0).all()
        begin += rows
    again = table.split(load_E)
    assert again.row_N.tolist() == split.row_N.tolist()


@given(st.integers(1, 6), st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_ranks_that_hold_everything_are_level(world: int, loads: list[int]) -> None:
    owners = even_owners(1, len(loads), world)[0]
    rows_W = HolderTable(Placement(owners, world_size=world).everywhere()).split(np.array(loads)).rows_W
    assert max(rows_W) - min(rows_W) <= 1


@given(placements(), st.data())
def test_an_expert_with_one_holder_is_computed_whole(placement: Placement, data: st.DataObject) -> None:
    size = placement.num_experts
    load_E = np.array(data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))
    table = HolderTable(placement)
    split = table.split(load_E)
    for expert in np.flatnonzero(placement.copies_E == 0):
        rank = placement.owner_E[expert]
        assert split.load_We[rank][table.held_We[rank].index(expert)] == load_E[expert]


@given(placements(), st.integers(0, 3), st.data())
def test_a_plan_keeps_owners_and_room_and_never_makes_it_worse(
    placement: Placement, room: int, data: st.DataObject
) -> None:
    size = placement.num_experts
    load_E = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size)))
    current = plan_layer(placement.sharding(), load_E, room)
    assert (current.owner_E == placement.owner_E).all()
    assert (current.copies_W <= room).all()
    before, after = busiest_rows(load_E, placement.sharding()), busiest_rows(load_E, current)
    assert after <= before
    assert current == placement.sharding() or (before - after) * 100 >= WORTH_PERCENT * before
    assert plan_layer(current, load_E, room) is current, "the same loads again move nothing"


def test_a_hot_expert_goes_where_there_is_room() -> None:
    sharding = Placement(even_owners(1, 8, 2)[0], world_size=2)
    load_E = np.array([100, 5, 5, 5, 5, 5, 5, 5])
    plan = plan_layer(sharding, load_E, 1)
    assert plan.holders(0) == [0, 1]
    rows_LW = expected_rows(load_E[None], [sharding]), expected_rows(load_E[None], [plan])
    assert imbalance_of(rows_LW[0]) > 1.6
    assert imbalance_of(rows_LW[1]) < 1.02
    assert imbalance_of(np.zeros((3, 2), dtype=np.int64)) == 1.0
    # Another expert is hot: the copy goes to that one.
    other = plan_layer(plan, load_E[::-1].copy(), 1)
    assert (other.holders(0), other.holders(7)) == ([0], [0, 1])
    assert plan_layer(plan, np.zeros(8, dtype=np.int64), 1) is plan
    assert plan_layer(sharding, load_E, 0) is sharding
