"""Who holds which expert: what a placement refuses, and its algebra against sets of (expert, rank) pairs."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from parallel.placement import Placement, PlacementError, check_materialises, even_owners

pytestmark = pytest.mark.unit


def pairs(placement: Placement) -> set[tuple[int, int]]:
    return {(e, r) for e in range(placement.num_experts) for r in placement.holders(e)}


def random_placement(rng: np.random.Generator, experts: int, world: int, density: float) -> Placement:
    sharding = Placement(rng.integers(0, world, experts), world_size=world)
    return Placement(sharding.owner_E, sharding.holders_EW | (rng.random((experts, world)) < density))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner_E", "holders_EW", "world_size", "words"),
    [
        ([0, -1, 1], None, 2, "expert 1 has no owner; ranks are 0 to 1"),
        ([0, 1, 2], None, 2, "expert 2 is owned by rank 2; ranks are 0 to 1"),
        ([0, -1], [[1, 0], [1, 1]], None, "expert 1 has no owner; ranks are 0 to 1"),
        ([0, 1], [[1, 0], [1, 0]], None, "rank 1 owns expert 1 but is not among its holders"),
        ([0, 1], None, None, "a placement without holders_EW needs world_size"),
        ([0, 1], [[1, 0]], None, "owner_E has shape (2,), holders_EW (1, 2); they must be (E,), (E, W)"),
        ([0, 1], [1, 0], None, "owner_E has shape (2,), holders_EW (2,); they must be (E,), (E, W)"),
        ([[0, 1]], None, 2, "owner_E has shape (1, 2), holders_EW (2, 2); they must be (E,), (E, W)"),
        ([0], [[1, 0]], 3, "holders_EW has 2 ranks, the world has 3"),
        ([0], None, 0, "expert 0 is owned by rank 0; ranks are 0 to -1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(owner_E: Any, holders_EW: Any, world_size: int | None, words: str) -> None:
    with pytest.raises(PlacementError) as caught:
        Placement(owner_E, holders_EW, world_size=world_size)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("expert", "rank"),
    [(3, 0), (-1, 0), (0, 2), (0, -1)],
)
def test_copies_of_unknown_experts_or_on_unknown_ranks_are_refused(expert: int, rank: int) -> None:
    placement = Placement([0, 1, 1], world_size=2)
    with pytest.raises(PlacementError) as caught:
        placement.with_copies([(0, 1), (expert, rank)])
    assert str(caught.value) == f"no copy of expert {expert} on rank {rank}: there are 3 experts and 2 ranks"


def test_placements_of_other_owners_or_sizes_do_not_mix() -> None:
    one = Placement([0, 1, 1], world_size=2)
    for other, words in [
        (Placement([0, 1, 0], world_size=2), "expert 2 is owned by rank 1 in one placement and by rank 0 in the other"),
        (Placement([0, 1], world_size=2), "one placement has 3 experts on 2 ranks, the other 2 on 2"),
        (Placement([0, 1, 1], world_size=4), "one placement has 3 experts on 2 ranks, the other 3 on 4"),
    ]:
        for mix in (one.union, one.new_pairs, lambda p: one.gather_bytes_W(p, 8), lambda p: check_materialises(one, p)):
            with pytest.raises(PlacementError) as caught:
                mix(other)
            assert str(caught.value) == words


def test_a_target_that_lacks_a_pair_is_refused() -> None:
    source = Placement([0, 1, 1], world_size=3).with_copies([(1, 0), (1, 2)])
    target = source.sharding().with_copies([(1, 0), (2, 0)])
    with pytest.raises(PlacementError) as caught:
        source.new_pairs(target)
    assert str(caught.value) == "the target placement lacks expert 1 on rank 2, which the source has"
    check_materialises(source.sharding(), target)


# --- algebra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_algebra_is_that_of_sets_of_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, world = int(rng.integers(1, 20)), int(rng.integers(1, 9))
    p = random_placement(rng, experts, world, rng.random())
    owned = {(e, int(r)) for e, r in enumerate(p.owner_E)}
    everything = set(product(range(experts), range(world)))
    extra = [(int(rng.integers(experts)), int(rng.integers(world))) for _ in range(5)]
    other = p.sharding().with_copies(extra)

    assert pairs(p.sharding()) == owned
    assert pairs(p.everywhere()) == everything
    assert pairs(other) == owned | set(extra)
    assert pairs(p.union(other)) == pairs(p) | pairs(other)
    assert p.union(other) == other.union(p)
    assert p.union(p) == p == p.with_copies([]) == p.union(p.sharding())
    assert p.sharding().new_pairs(p) == sorted(pairs(p) - owned)
    assert p.new_pairs(p) == []

    assert p.owned_W.tolist() == [len(p.owned_by(r)) for r in range(world)]
    assert p.copies_W.tolist() == [len(p.copied_to(r)) for r in range(world)]
    assert p.copies_E.tolist() == [sum(pair[0] == e for pair in pairs(p)) - 1 for e in range(experts)]
    for rank in range(world):
        assert p.owned_by(rank) == sorted(e for e, r in owned if r == rank)
        assert p.copied_to(rank) == sorted(e for e, r in pairs(p) - owned if r == rank)
        assert p.held_by(rank) == p.owned_by(rank) + p.copied_to(rank)


@pytest.mark.parametrize("seed", range(20))
def test_gathering_in_two_steps_sends_what_gathering_at_once_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = random_placement(rng, 12, 6, 0.1)
    second = first.union(Placement(first.owner_E, first.holders_EW | (rng.random((12, 6)) < 0.3)))
    third = second.union(Placement(first.owner_E, first.holders_EW | (rng.random((12, 6)) < 0.5)))
    steps = first.new_pairs(second) + second.new_pairs(third)
    assert sorted(steps) == first.new_pairs(third)
    assert len(set(steps)) == len(steps)
    at_once_W = first.gather_bytes_W(third, 24)
    assert (first.gather_bytes_W(second, 24) + second.gather_bytes_W(third, 24) == at_once_W).all()
    assert at_once_W.tolist() == [24 * sum(r == rank for _, r in first.new_pairs(third)) for rank in range(6)]


def test_bytes_of_an_all_gather_are_the_textbook_formula() -> None:
    p = Placement(even_owners(1, 8, 4)[0], world_size=4)
    assert p.gather_bytes_W(p, 100).tolist() == [0, 0, 0, 0]
    assert p.gather_bytes_W(p.everywhere(), 100).tolist() == [100 * (8 - 2)] * 4


def test_held_by_puts_owned_experts_before_copies() -> None:
    p = Placement([1, 0, 1, 0, 0], world_size=2).with_copies([(0, 0), (2, 0), (4, 1)])
    assert p.held_by(0) == [1, 3, 4, 0, 2]
    assert p.held_by(1) == [0, 2, 4]
    assert repr(p) == "Placement(owner_E=[1, 0, 1, 0, 0], copies={0: [0], 2: [0], 4: [1]}, world_size=2)"


def test_equality_and_hash_are_those_of_the_pairs() -> None:
    one = Placement([0, 1], world_size=2).with_copies([(0, 1)])
    same = Placement(np.array([0, 1]), [[True, True], [False, True]])
    assert one == same
    assert len({one, same}) == 1
    others = [
        one.sharding(),
        one.everywhere(),
        Placement([1, 1], one.holders_EW),  # the same holders of other owners
        Placement([0, 1], world_size=3),
        Placement([0], [[True, True]]),
        "a placement",
    ]
    assert all(one != other for other in others)
    # As many bytes of holders, another shape.
    assert Placement([0] * 2, np.ones((2, 3))) != Placement([0] * 3, np.ones((3, 2)))


def test_a_placement_cannot_change_after_it_was_made() -> None:
    owner_E, holders_EW = np.array([0, 1]), np.array([[True, False], [True, True]])
    p = Placement(owner_E, holders_EW)
    owner_E[0], holders_EW[0, 1] = 1, True
    assert p.owner_E.tolist() == [0, 1]
    assert p.holders_EW.tolist() == [[True, False], [True, True]]
    for array in (p.owner_E, p.holders_EW, p.copies_E, p.copies_W, p.owned_W):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_a_layer_without_experts_is_a_placement_too() -> None:
    p = Placement([], world_size=3)
    assert (p.num_experts, p.world_size, p.held_by(2), p.new_pairs(p.everywhere())) == (0, 3, [], [])


# --- the sharding that training begins with ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "experts", "world"), [(1, 8, 4), (5, 7, 3), (6, 3, 5), (12, 64, 48), (3, 1, 4), (4, 256, 64), (2, 0, 2)]
)
def test_even_owners_are_blocks_balanced_in_each_layer_and_over_all_prefixes(
    layers: int, experts: int, world: int
) -> None:
    owner_LE = even_owners(layers, experts, world)
    assert owner_LE.shape == (layers, experts)
    total_W = np.zeros(world, dtype=int)
    for owner_E in owner_LE:
        assert (np.diff(owner_E) >= 0).all(), "a block of consecutive experts each"
        owned_W = Placement(owner_E, world_size=world).owned_W
        assert owned_W.max() - owned_W.min() <= (1 if experts % world else 0)
        total_W += owned_W
        assert total_W.max() - total_W.min() <= 1, "over the layers so far"
    assert total_W.sum() == layers * experts


def test_even_owners_by_hand() -> None:
    assert even_owners(3, 5, 3).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2]]
    assert even_owners(4, 2, 3).tolist() == [[0, 1], [0, 2], [1, 2], [0, 1]]
