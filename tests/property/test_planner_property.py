"""Planners over random loads: Algorithm 1 against a slow reading of it, the others by what they promise."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.placement import Placement, check_materialises
from parallel.planner import even_quotas, plan_copies, plan_more_copies, plan_spill, rows_per_rank
from parallel.row_split import split_rows

pytestmark = pytest.mark.unit


@st.composite
def situations(
    draw: st.DrawFn, most_ranks: int = 10, most_experts: int = 14
) -> tuple[Placement, np.ndarray, list[int], np.random.Generator]:
    world, experts = draw(st.integers(1, most_ranks)), draw(st.integers(1, most_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharding = Placement(rng.integers(0, world, experts), world_size=world)
    node_W = rng.integers(0, draw(st.integers(1, 4)), world).tolist()  # uneven, and not of consecutive ranks
    most = draw(st.sampled_from([1, 4, 1000, 10**6]))  # small loads tie
    load_E = (rng.random(experts) ** draw(st.sampled_from([1, 6])) * most).round().astype(np.int64)
    return sharding, load_E, node_W, rng


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def copies_by_hand(
    base: Placement, load_E: np.ndarray, overlap_degree: int, max_copies: int, node_W: list[int]
) -> set[tuple[int, int]]:
    """(expert, rank) pairs, slot by slot and copy by copy; rows per holder as fractions."""
    ranks = range(base.world_size)
    pairs = {(e, r) for e in range(base.num_experts) for r in base.holders(e)}
    copies = {r: sum(1 for e, q in pairs if q == r and base.owner_E[e] != r) for r in ranks}
    free = {r: max(0, max_copies - copies[r]) for r in ranks}
    share = {e: int(load_E[e]) // len(base.holders(e)) for e in range(base.num_experts)}
    top = sorted(share, key=lambda e: (-share[e], e))[:overlap_degree]
    missing = {e: [r for r in ranks if (e, r) not in pairs] for e in top if share[e] > 0}
    missing = {e: absent for e, absent in missing.items() if absent}
    if all(sum(r in absent for absent in missing.values()) <= free[r] for r in ranks):
        return pairs | {(e, r) for e, absent in missing.items() for r in absent}

    slots, total = sum(free.values()), sum(share[e] for e in missing)
    wanted = {e: slots * share[e] // total for e in missing}
    for e in sorted(missing, key=lambda e: (-(Fraction(slots * share[e], total) % 1), top.index(e))):
        if sum(wanted.values()) < slots:
            wanted[e] += 1
    wanted = {e: min(n, len(missing[e])) for e, n in wanted.items()}
    while sum(wanted.values()) < min(slots, sum(map(len, missing.values()))):
        hungry = [e for e in missing if wanted[e] < len(missing[e])]
        wanted[max(hungry, key=lambda e: ((share[e] << 16) // (wanted[e] + 1), -top.index(e)))] += 1

    for e in missing:
        for _ in range(wanted[e]):
            open_ranks = [r for r in ranks if free[r] > 0 and (e, r) not in pairs]
            if not open_ranks:
                break
            node_free = {n: sum(free[r] for r in ranks if node_W[r] == n) for n in node_W}
            node_holds = {n: any((e, r) in pairs for r in ranks if node_W[r] == n) for n in node_W}
            rank = min(open_ranks, key=lambda r: (node_holds[node_W[r]], -node_free[node_W[r]], node_W[r], -free[r], r))
            pairs.add((e, rank))
            free[rank] -= 1
    return pairs


def pairs_of(placement: Placement) -> set[tuple[int, int]]:
    return {(int(e), int(r)) for e, r in np.argwhere(placement.holders_EW)}


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(0, 15), st.integers(0, 5))
def test_copies_are_those_of_the_algorithm_done_by_hand(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], overlap_degree: int, max_copies: int
) -> None:
    sharding, load_E, node_W, _ = situation
    plan = plan_copies(sharding, load_E, overlap_degree, max_copies, node_W)
    assert pairs_of(plan) == copies_by_hand(sharding, load_E, overlap_degree, max_copies, node_W)


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(0, 15), st.integers(0, 5))
def test_copies_on_top_of_copies_are_those_of_the_algorithm_done_by_hand(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], overlap_degree: int, max_copies: int
) -> None:
    sharding, load_E, node_W, rng = situation
    some = Placement(sharding.owner_E, sharding.holders_EW | (rng.random(sharding.holders_EW.shape) < 0.15))
    plan = plan_copies(some, load_E, overlap_degree, max_copies, node_W)
    assert pairs_of(plan) == copies_by_hand(some, load_E, overlap_degree, max_copies, node_W)


@settings(max_examples=60, deadline=None)
@given(situations(most_ranks=64, most_experts=256), st.integers(0, 64), st.integers(0, 16))
def test_no_plan_breaks_its_bounds_at_full_size(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], overlap_degree: int, max_copies: int
) -> None:
    sharding, load_E, node_W, rng = situation
    plan = plan_copies(sharding, load_E, overlap_degree, max_copies, node_W)
    spill = plan_spill(sharding, load_E, max_copies, min_rows=int(rng.integers(0, 50)))
    true_E = rng.permutation(load_E)
    more = plan_more_copies(plan, true_E, overlap_degree, max_copies, node_W, ns_per_row=3, ns_per_copy=50)
    for placement in (plan, spill.placement, more):
        check_materialises(sharding, placement)
        assert placement.copies_W.max() <= max_copies
    assert np.count_nonzero(plan.copies_E) <= overlap_degree
    for copied, loads in ((plan, load_E), (spill.placement, load_E)):
        assert not copied.copies_E[loads == 0].any()
    check_materialises(plan, more)


@settings(max_examples=60, deadline=None)
@given(situations(), st.integers(1, 8), st.integers(1, 4), st.integers(2, 1000))
def test_only_proportions_of_loads_matter_for_copies(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator],
    overlap_degree: int,
    max_copies: int,
    factor: int,
) -> None:
    sharding, load_E, node_W, _ = situation
    load_E = load_E * 2**9  # so that fractions of a row per holder are whole in both
    one = plan_copies(sharding, load_E, overlap_degree, max_copies, node_W)
    assert one == plan_copies(sharding, load_E * factor, overlap_degree, max_copies, node_W)


TWO_RANKS = Placement(np.array([1, 1, 1, 0]), world_size=2)

# --- calibration ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(situations(), st.integers(0, 8), st.integers(0, 4), st.integers(0, 100), st.integers(0, 10**6))
@example((TWO_RANKS, np.array([0, 1, 0, 1]), [0, 0], np.random.default_rng(1)), 1, 1, 1, 0)
def test_more_copies_are_made_exactly_where_they_pay(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator],
    overlap_degree: int,
    max_copies: int,
    ns_per_row: int,
    ns_per_copy: int,
) -> None:
    sharding, load_E, node_W, rng = situation
    current = plan_copies(sharding, rng.permutation(load_E), overlap_degree, max_copies, node_W)
    more = plan_more_copies(
        current, load_E, overlap_degree, max_copies, node_W, ns_per_row=ns_per_row, ns_per_copy=ns_per_copy
    )
    wished = plan_copies(current, load_E, overlap_degree, max_copies, node_W)
    before, after = (rows_per_rank(load_E, placement).max() for placement in (current, wished))
    gain = ns_per_row * (before - after)
    cost = ns_per_copy * (wished.copies_W - current.copies_W).max()
    assert more == (wished if gain > cost else current)


@settings(max_examples=80, deadline=None)
@given(situations(), st.floats(0, 0.5))
def test_rows_per_rank_are_even_shares(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], density: float
) -> None:
    sharding, load_E, _, rng = situation
    placement = Placement(sharding.owner_E, sharding.holders_EW | (rng.random(sharding.holders_EW.shape) < density))
    wanted = [0] * placement.world_size
    for expert, load in enumerate(load_E.tolist()):
        for rank in placement.holders(expert):
            wanted[rank] += load // len(placement.holders(expert))
    assert rows_per_rank(load_E, placement).tolist() == wanted


# --- spill ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(0, 3), st.integers(0, 30), st.integers(0, 5))
def test_spill_keeps_its_promises(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator],
    max_copies: int,
    min_rows: int,
    tolerance: int,
) -> None:
    sharding, load_E, _, _ = situation
    world, experts = sharding.world_size, np.arange(sharding.num_experts)
    placement, quota_EW = plan_spill(
        sharding, load_E, max_copies, min_rows=min_rows, level_num=10 + tolerance, level_den=10
    )
    assert np.array_equal(quota_EW.sum(1), load_E)
    assert (quota_EW >= 0).all()
    copied_EW = placement.holders_EW.copy()
    copied_EW[experts, sharding.owner_E] = False
    assert not quota_EW[~placement.holders_EW].any()
    assert (quota_EW[copied_EW] >= max(1, min_rows)).all()

    own_W = np.array([load_E[sharding.owner_E == rank].sum() for rank in range(world)])
    rows_W, mean = quota_EW.sum(0), Fraction(int(load_E.sum()), world)
    level = max(-(-mean.numerator // mean.denominator), int(mean * (10 + tolerance) / 10))
    assert (rows_W <= np.maximum(own_W, level)).all()  # who takes rows never rises above the level
    # A rank stays above the level only if no copy of min_rows could relieve it: no room, no slot, or no such expert.
    for rank in np.flatnonzero(rows_W > level):
        rows = max(1, min_rows)
        excess = min(rows_W[rank] - level, quota_EW[sharding.owner_E == rank, rank].max())
        roomy = np.flatnonzero((placement.copies_W < max_copies) & (level - rows_W >= rows))
        assert excess < rows or not roomy.size


@settings(max_examples=100, deadline=None)
@given(situations(), st.integers(1, 3))
def test_spill_with_slots_enough_is_level(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], slack: int
) -> None:
    sharding, load_E, _, _ = situation
    placement, quota_EW = plan_spill(sharding, load_E, sharding.num_experts + slack)
    assert quota_EW.sum(0).max() <= -(-load_E.sum() // sharding.world_size)
    # Each copy finishes a busy rank, an expert of one, or an idle rank: fewer copies than ranks and experts together.
    assert placement.copies_E.sum() <= sharding.world_size + sharding.num_experts


@settings(max_examples=150, deadline=None)
@given(situations(), st.integers(0, 4), st.integers(0, 8), st.integers(1, 20))
def test_spill_on_top_of_copies_keeps_them_and_their_rows(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator],
    max_copies: int,
    overlap_degree: int,
    min_rows: int,
) -> None:
    sharding, load_E, node_W, rng = situation
    world = sharding.world_size
    current = plan_copies(sharding, rng.permutation(load_E), overlap_degree, max_copies, node_W)
    count_WE = np.array([rng.multinomial(load, np.full(world, 1 / world)) for load in load_E]).T
    settled_EW = even_quotas(count_WE, current, node_W)
    placement, quota_EW = plan_spill(current, load_E, max_copies, settled_EW=settled_EW, min_rows=min_rows)
    check_materialises(current, placement)
    assert placement.copies_W.max() <= max_copies
    assert np.array_equal(quota_EW.sum(1), load_E)
    copied = current.copies_E > 0
    assert np.array_equal(quota_EW[copied], settled_EW[copied])
    assert np.array_equal(placement.holders_EW[copied], current.holders_EW[copied])
    assert not quota_EW[~placement.holders_EW].any()
    level = -(-load_E.sum() // world)
    before_W = np.where(copied[:, None], settled_EW, 0).sum(0)
    np.add.at(before_W, sharding.owner_E[~copied], load_E[~copied])
    assert (quota_EW.sum(0) <= np.maximum(before_W, level)).all()


@settings(max_examples=100, deadline=None)
@given(situations(), st.floats(0, 0.6))
def test_even_quotas_are_what_the_dispatcher_sends(
    situation: tuple[Placement, np.ndarray, list[int], np.random.Generator], density: float
) -> None:
    """To within the remainders, which the dispatcher deals out source by source."""
    sharding, _, node_W, rng = situation
    world = sharding.world_size
    placement = Placement(sharding.owner_E, sharding.holders_EW | (rng.random(sharding.holders_EW.shape) < density))
    count_WE = rng.integers(0, 1000, (world, sharding.num_experts))
    quota_EW = even_quotas(count_WE, placement, node_W)
    assert np.array_equal(quota_EW.sum(1), count_WE.sum(0))
    for rank in range(world):
        received_E = split_rows(count_WE, placement, rank, node_W, "even").received_WE.sum(0)
        assert np.abs(quota_EW[:, rank] - received_E).max() <= world
