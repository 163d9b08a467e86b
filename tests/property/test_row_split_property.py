"""How rows are split over holders: against the plain rule, row by row, for random placements and counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.placement import Placement
from parallel.row_split import fill_up, quotas, split_rows

pytestmark = pytest.mark.unit


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, Placement, list[int]]:
    world, experts = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharding = Placement(rng.integers(0, world, experts), world_size=world)
    placement = Placement(sharding.owner_E, sharding.holders_EW | (rng.random((experts, world)) < rng.random()))
    node_W = rng.integers(0, draw(st.integers(1, 3)), world).tolist()  # ranks of a node need not be neighbours
    counts = rng.integers(0, 50, (world, experts)) * (rng.random((world, experts)) < 0.8)
    return counts, placement, node_W


def even_by_hand(count_WE: np.ndarray, placement: Placement, node_W: list[int]) -> np.ndarray:
    """(source, expert, destination) rows, one case after another."""
    world, experts = count_WE.shape
    rows = np.zeros((world, experts, world), dtype=int)
    for source in range(world):
        for expert in range(experts):
            holders = placement.holders(expert)
            near = [rank for rank in holders if node_W[rank] == node_W[source]]
            candidates = [source] if source in holders else near or holders
            for row in range(count_WE[source, expert]):
                rows[source, expert, candidates[(source + expert + row) % len(candidates)]] += 1
    return rows


@settings(max_examples=150, deadline=None)
@given(situations())
def test_even_split_is_the_plain_rule(situation: tuple[np.ndarray, Placement, list[int]]) -> None:
    count_WE, placement, node_W = situation
    rows = even_by_hand(count_WE, placement, node_W)
    for rank in range(placement.world_size):
        split = split_rows(count_WE, placement, rank, node_W, "even")
        assert np.array_equal(split.sent_WE, rows[rank].T)
        assert np.array_equal(split.received_WE, rows[:, :, rank])


@settings(max_examples=150, deadline=None)
@given(situations())
def test_balanced_split_loses_nothing_and_meets_its_quotas(situation: tuple[np.ndarray, Placement, list[int]]) -> None:
    count_WE, placement, node_W = situation
    ranks = range(placement.world_size)
    splits = [split_rows(count_WE, placement, rank, node_W, "balanced") for rank in ranks]
    quota_EW = quotas(count_WE.sum(0), placement)
    assert np.array_equal(quota_EW.sum(1), count_WE.sum(0))
    for rank in ranks:
        assert np.array_equal(splits[rank].sent_WE.sum(0), count_WE[rank])
        assert np.array_equal(splits[rank].received_WE.sum(0), quota_EW[:, rank])
        assert not splits[rank].received_WE[:, ~placement.holders_EW[:, rank]].any()
        assert (splits[rank].sent_WE >= 0).all()
        for other in ranks:
            assert np.array_equal(splits[rank].sent_WE[other], splits[other].received_WE[rank])
        # As many rows stay at home as the quota allows.
        home = np.minimum(count_WE[rank], quota_EW[:, rank])
        assert np.array_equal(splits[rank].sent_WE[rank], home)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 100))
def test_fill_up_is_pouring_row_by_row(level: list[int], rows: int) -> None:
    poured = np.array(level)
    for _ in range(rows):
        poured[int(np.argmin(poured))] += 1
    added = fill_up(np.array(level), rows)
    assert added.sum() == rows
    assert (added >= 0).all()
    assert sorted((np.array(level) + added).tolist()) == sorted(poured.tolist())


def test_a_copied_hot_expert_levels_the_ranks_under_the_balanced_split_only() -> None:
    """Rank 0 owns the hot expert 0 and a warm one of its own; the even split leaves it the warm one on top."""
    placement = Placement([0, 0, 1, 1], world_size=2).with_copies([(0, 1)])
    count_WE = np.array([[40, 30, 5, 5], [40, 30, 5, 5]])
    loads = {
        rule: [int(split_rows(count_WE, placement, rank, [0, 0], rule).received_WE.sum()) for rank in (0, 1)]
        for rule in ("even", "balanced")
    }
    assert loads == {"even": [100, 60], "balanced": [80, 80]}
