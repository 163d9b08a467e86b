"""Schedules by hand, what they cost, and that the proof of a schedule can fail: each way to break one is named.

W ranks, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from parallel.exchange import (
    ALGORITHMS,
    MAX_PIECES,
    MIN_PIECE_BYTES,
    SHARED_LINK_PERCENT,
    Algorithm,
    Edge,
    LinkModel,
    Schedule,
    Transfer,
    choose_pieces,
    choose_schedule,
    gather_schedule,
    reduce_schedule,
    schedule_ns,
)
from parallel.exchange_check import ScheduleError, check_schedule
from parallel.placement import Placement, PlacementError, even_owners

pytestmark = pytest.mark.unit

ByRank = dict[int, list[Transfer]]


def one_expert(world: int, owner: int = 0, copies: Sequence[int] | None = None) -> tuple[Placement, Placement]:
    """A sharding of one expert, and it with copies on the ranks given or on all."""
    sharding = Placement([owner], world_size=world)
    return sharding, sharding.with_copies([(0, r) for r in (range(world) if copies is None else copies)])


def by_rank(schedule: Schedule, world: int) -> ByRank:
    return {rank: schedule.transfers(rank) for rank in range(world)}


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "edges"),
    [
        ("flat", [(2, 3, 1), (2, 0, 1), (2, 1, 1), (2, 4, 1), (2, 5, 1)]),
        ("chain", [(2, 3, 1), (3, 0, 2), (0, 1, 3), (1, 4, 4), (4, 5, 5)]),
        ("tree", [(2, 3, 1), (2, 0, 2), (3, 1, 2), (2, 4, 3), (3, 5, 3)]),
        ("two_level", [(2, 0, 1), (0, 4, 2), (2, 3, 1), (0, 1, 2), (4, 5, 3)]),
    ],
)
def test_trees_by_hand(algorithm: Algorithm, edges: list[tuple[int, int, int]]) -> None:
    # Nodes {0, 1, 4, 5} and {2, 3}: from the owner's node on.
    node_W = [1, 1, 0, 0, 2, 2]
    schedule = gather_schedule(*one_expert(6, owner=2), algorithm, 1, node_W)
    assert schedule.trees == {0: tuple(Edge(*edge) for edge in edges)}


def test_a_chain_passes_on_pieces_while_others_come_in() -> None:
    source, target = one_expert(3)
    schedule = gather_schedule(source, target, "chain", 2, [0, 0, 0])
    gather = [(0, 0, 0, 0, 1), (1, 0, 0, 1, 2), (1, 0, 1, 0, 1), (2, 0, 1, 1, 2)]
    assert schedule.transfers() == [Transfer(*t) for t in gather]
    backwards = [(0, 0, 0, 2, 1), (1, 0, 0, 1, 0), (1, 0, 1, 2, 1), (2, 0, 1, 1, 0)]
    assert schedule.reversed().transfers() == [Transfer(*t) for t in backwards]
    assert schedule.reversed() == reduce_schedule(target, source, "chain", 2, [0, 0, 0])
    assert schedule.reversed().reversed() == schedule
    assert schedule.sent_bytes_W(10, 3) == [10, 10, 0]
    assert schedule.reversed().sent_bytes_W(10, 3) == [0, 10, 10]


def test_what_needs_no_copy_travels_nowhere() -> None:
    source, target = Placement([0, 1], world_size=2), Placement([0, 1], world_size=2).with_copies([(1, 0)])
    nothing = gather_schedule(target, target, "chain", 4, [0, 0])
    assert (nothing.trees, nothing.transfers(), nothing.num_rounds, nothing.sent_bytes_W(9, 2)) == ({}, [], 0, [0, 0])
    assert list(gather_schedule(source, target, "chain", 4, [0, 0]).trees) == [1]


@pytest.mark.parametrize("world", [2, 3, 5, 8, 13])
def test_in_a_tree_no_rank_sends_or_receives_twice_in_a_step(world: int) -> None:
    # That the number of ranks that have the chunk doubles with every step is all that a binomial tree is for.
    for owner in range(world):
        schedule = gather_schedule(*one_expert(world, owner), "tree", 1, [0] * world)
        busy = [(t.round, end) for t in schedule.transfers() for end in (t.src, t.dst)]
        assert len(set(busy)) == len(busy)
        assert schedule.num_rounds == (world - 1).bit_length()


@pytest.mark.parametrize("algorithm", ["chain", "two_level"])
@pytest.mark.parametrize(("nodes", "size"), [(1, 4), (2, 2), (2, 4), (4, 2), (3, 5)])
def test_when_everything_goes_everywhere_all_ranks_and_nodes_send_alike(
    algorithm: Algorithm, nodes: int, size: int
) -> None:
    world = nodes * size
    node_W = [rank // size for rank in range(world)]
    source = Placement(even_owners(1, 2 * world, world)[0], world_size=world)
    schedule = gather_schedule(source, source.everywhere(), algorithm, 1, node_W)
    assert schedule.sent_bytes_W(1, world) == [2 * (world - 1)] * world
    leaves = [node_W[t.src] for t in schedule.transfers() if node_W[t.src] != node_W[t.dst]]
    assert np.bincount(leaves, minlength=nodes).tolist() == [2 * size * (nodes - 1)] * nodes


def test_wrong_arguments_are_refused_in_words() -> None:
    source, target = one_expert(4)
    with pytest.raises(PlacementError, match="node_W names 3 ranks, the placement has 4"):
        gather_schedule(source, target, "flat", 1, [0, 0, 0])
    with pytest.raises(PlacementError, match="the target placement lacks expert 0 on rank 1, which the source has"):
        gather_schedule(target, source, "flat", 1, [0] * 4)
    with pytest.raises(PlacementError, match="the target placement lacks expert 0 on rank 1, which the source has"):
        reduce_schedule(source, target, "flat", 1, [0] * 4)
    with pytest.raises(ValueError, match="pieces is 0: a chunk is cut into 1 piece or more"):
        gather_schedule(source, target, "flat", 0, [0] * 4)


# --- a schedule that is wrong is found --------------------------------------------------------------------------------

SHARDING, WIDE = one_expert(4, copies=[1, 2])  # the chain 0 -> 1 -> 2 in 2 pieces; rank 3 has nothing to do with it
G00, G01, G10, G11 = (Transfer(*t) for t in [(0, 0, 0, 0, 1), (1, 0, 0, 1, 2), (1, 0, 1, 0, 1), (2, 0, 1, 1, 2)])
R00, R01, R10, R11 = (Transfer(*t) for t in [(0, 0, 0, 2, 1), (1, 0, 0, 1, 0), (1, 0, 1, 2, 1), (2, 0, 1, 1, 0)])


def good(reduces: bool) -> ByRank:
    make = reduce_schedule if reduces else gather_schedule
    schedule = make(*((WIDE, SHARDING) if reduces else (SHARDING, WIDE)), "chain", 2, [0] * 4)
    assert schedule.transfers() == ([R00, R01, R10, R11] if reduces else [G00, G01, G10, G11])
    return by_rank(schedule, 4)


def check(of_rank: Mapping[int, Sequence[Transfer]], reduces: bool) -> None:
    check_schedule(of_rank, *((WIDE, SHARDING) if reduces else (SHARDING, WIDE)), 2, reduces=reduces)


def drop(t: Transfer, *ranks: int) -> Callable[[ByRank], None]:
    def mutate(of: ByRank) -> None:
        for rank in ranks or (t.src, t.dst):
            of[rank].remove(t)

    return mutate


def add(t: Transfer, *ranks: int) -> Callable[[ByRank], None]:
    def mutate(of: ByRank) -> None:
        for rank in ranks or sorted({t.src, t.dst}):
            of.setdefault(rank, []).append(t)
            of[rank].sort()

    return mutate


def change(t: Transfer, *ranks: int, **fields: int) -> Callable[[ByRank], None]:
    """Replace a transfer in the lists of ``ranks``, or in those of whom it concerned and concerns now."""

    def mutate(of: ByRank) -> None:
        new = t._replace(**fields)
        drop(t, *ranks)(of)
        add(new, *ranks)(of)

    return mutate


def both(*mutations: Callable[[ByRank], None]) -> Callable[[ByRank], None]:
    def mutate(of: ByRank) -> None:
        for mutation in mutations:
            mutation(of)

    return mutate


MUTATIONS: dict[str, tuple[bool, Callable[[ByRank], None], str]] = {
    "receiver forgets": (False, drop(G01, 2), f"rank 1 sends [{G01}] to rank 2, which expects []"),
    "sender forgets": (False, drop(G01, 1), f"rank 1 sends [] to rank 2, which expects [{G01}]"),
    "both forget the last hop": (False, drop(G11), "expert 0 piece 1: rank 2 ends with the values of ranks []"),
    "both forget an early hop": (False, drop(G00), f"{G01}: rank 1 has no such piece to send before this round"),
    "a rank is absent": (False, lambda of: of.pop(2) and None, f"rank 1 sends [{G01}] to rank 2, which expects []"),
    "sent twice in a round": (False, add(G11), f"{G11}: rank 2 has that piece already"),
    "sent again later": (False, add(G00._replace(round=3)), "rank 1 has that piece already"),
    "sent twice, expected once": (False, add(G01, 1), f"rank 1 sends [{G01}, {G01}] to rank 2, which expects [{G01}]"),
    "hops swapped": (
        False,
        both(change(G00, round=1), change(G01, round=0)),
        f"{G01._replace(round=0)}: rank 1 has no such piece to send before this round",
    ),
    "passed on in the round it comes in": (False, change(G01, round=0), "rank 1 has no such piece to send before"),
    "one side is late": (False, change(G11, 2, round=3), f"rank 1 sends [{G11}] to rank 2, which expects []"),
    "pieces cross": (
        False,
        both(change(G00, 1, piece=1), change(G10, 1, piece=0)),
        f"rank 0 sends [{G00}] to rank 1, which expects [{G00._replace(piece=1)}]",
    ),
    "reverse order on one rank": (False, lambda of: of[1].reverse(), "rank 1 does not keep the canonical order"),
    "expected from another": (
        False,
        change(G11, 2, src=0),
        f"rank 0 sends [] to rank 2, which expects [{G11._replace(src=0)}]",
    ),
    "sent to who has it": (False, change(G11, dst=0), f"{G11._replace(dst=0)}: rank 0 has that piece already"),
    "sent to who shall not have it": (False, add(G11._replace(dst=3)), "rank 3 is not to get that expert"),
    "to oneself": (False, add(G11._replace(dst=1)), "rank 1 has that piece already"),
    "somebody else's": (False, add(G00, 2), f"rank 2 lists {G00}, which is not its own"),
    "unknown rank": (
        False,
        add(G11._replace(dst=9), 1),
        f"rank 1 sends [{G11._replace(dst=9)}] to rank 9, which expects []",
    ),
    "unknown rank plays along": (False, add(G11._replace(dst=9)), "rank 9 is not to get that expert"),
    "unknown expert": (False, add(G11._replace(expert=7)), "rank 1 has no such piece to send before this round"),
    "unknown piece": (False, add(G11._replace(piece=2)), "rank 1 has no such piece to send before this round"),
    "a holder's gradient stays": (
        True,
        both(drop(R10)),
        "expert 0 piece 1: rank 0 ends with the values of ranks [0, 1]",
    ),
    "the last sum stays": (True, drop(R11), "expert 0 piece 1: rank 0 ends with the values of ranks [0]"),
    "added twice": (True, add(R11._replace(round=3)), "rank 1 has given that piece away"),
    "added by two ways": (True, add(R00._replace(round=2, dst=0)), "rank 2 has given that piece away"),
    "added twice in a round": (True, add(R00), f"{R00}: rank 2 has given that piece away"),
    "added after the sum went on": (
        True,
        both(change(R10, round=3)),
        f"{R10._replace(round=3)}: rank 1 cannot add to that piece any more",
    ),
    "added while the sum goes on": (True, change(R10, round=2), "rank 1 cannot add to that piece any more"),
    "added to a stranger": (True, change(R10, dst=3), f"{R10._replace(dst=3)}: rank 3 cannot add to that piece"),
    "a stranger's gradient": (True, add(R11._replace(src=3)), "rank 3 has no such piece to send before this round"),
    "receiver forgets a gradient": (True, drop(R11, 0), f"rank 1 sends [{R11}] to rank 0, which expects []"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_way_to_break_a_schedule_is_found_and_named(name: str) -> None:
    reduces, mutate, words = MUTATIONS[name]
    of_rank = good(reduces)
    check(of_rank, reduces)
    mutate(of_rank)
    with pytest.raises(ScheduleError, match=re.escape(words)):
        check(of_rank, reduces)


def test_ranks_that_derived_different_schedules_are_found() -> None:
    source, target = one_expert(4)
    chain, tree = (by_rank(gather_schedule(source, target, a, 2, [0] * 4), 4) for a in ("chain", "tree"))
    for rank in range(4):
        with pytest.raises(ScheduleError, match=r"rank \d sends .* to rank \d, which expects"):
            check_schedule({**chain, rank: tree[rank]}, source, target, 2, reduces=False)


def test_a_schedule_for_fewer_holders_does_not_pass() -> None:
    source, target = one_expert(4)
    schedule = gather_schedule(*one_expert(4, copies=[1, 3]), "flat", 1, [0] * 4)
    with pytest.raises(ScheduleError, match=re.escape("expert 0 piece 0: rank 2 ends with the values of ranks []")):
        check_schedule(by_rank(schedule, 4), source, target, 1, reduces=False)


def test_copies_that_a_reduction_leaves_have_no_part_in_it() -> None:
    # spRS from ranks 0, 1, 2 to ranks 0, 1: the owner gets the sum of 0 and 2.
    sharding, kept = one_expert(3, copies=[1])
    wide = sharding.everywhere()
    schedule = reduce_schedule(wide, kept, "chain", 1, [0] * 3)
    assert schedule.transfers() == [Transfer(0, 0, 0, 2, 0)]
    check_schedule(by_rank(schedule, 3), wide, kept, 1, reduces=True)
    through = reduce_schedule(wide, sharding, "chain", 1, [0] * 3)
    with pytest.raises(ScheduleError, match="rank 1 cannot add to that piece any more"):
        check_schedule(by_rank(through, 3), wide, kept, 1, reduces=True)


# --- what a schedule costs --------------------------------------------------------------------------------------------

MIB = 2**20


def simulate_ns(schedule: Schedule, chunk_bytes: int, link: LinkModel, node_W: Sequence[int]) -> float:
    """When the last piece of a gather arrives, if links serve one piece after another and the first ready goes first.

    Oracle of the cost model: a rank's link each way and, between nodes, the node's are taken one piece at a time;
    latency passes on the way and takes no link.
    """
    rank_ns = chunk_bytes * 1e9 / link.bytes_per_s / schedule.pieces
    node_ns = chunk_bytes * 1e9 / link.node_bytes_per_s / schedule.pieces if link.node_bytes_per_s else 0.0
    waiting = schedule.transfers()
    receivers = {(t.dst, t.expert) for t in waiting}
    here_ns = {(t.src, t.expert, t.piece): 0.0 for t in waiting if (t.src, t.expert) not in receivers}
    free_ns: dict[tuple[str, int], float] = {}

    def links(t: Transfer) -> dict[tuple[str, int], float]:
        used = {("up", t.src): rank_ns, ("down", t.dst): rank_ns}
        if node_W[t.src] != node_W[t.dst]:
            used |= {("out", node_W[t.src]): node_ns, ("in", node_W[t.dst]): node_ns}
        return used

    def begin_ns(t: Transfer) -> float:
        ready = here_ns.get((t.src, t.expert, t.piece), float("inf"))
        return max(ready, *(free_ns.get(name, 0.0) for name in links(t)))

    while waiting:
        t = min(waiting, key=begin_ns)
        begin = begin_ns(t)
        waiting.remove(t)
        for name, busy_ns in links(t).items():
            free_ns[name] = begin + busy_ns
        here_ns[t.dst, t.expert, t.piece] = begin + max(links(t).values()) + link.latency_ns
    return max(here_ns.values(), default=0.0)


def test_the_cost_model_is_near_a_simulation_and_chooses_nearly_as_well() -> None:
    rng, ratios, regrets = np.random.default_rng(5), [], []
    for _ in range(60):
        world, experts = int(rng.integers(2, 9)), int(rng.integers(1, 6))
        node_W = np.sort(rng.integers(0, 3, world)).tolist()
        source = Placement(rng.integers(0, world, experts), world_size=world)
        more_EW = rng.random((experts, world)) < rng.choice([0.3, 0.6, 1.0])
        target = Placement(source.owner_E, source.holders_EW | more_EW)
        node_rate = [None, 2 * 10**8, 10**9, 4 * 10**9][rng.integers(4)]
        link, chunk, pieces = LinkModel(int(rng.integers(10**6)), 10**9, node_rate), 10**7, int(rng.integers(1, 9))
        modelled, simulated = {}, {}
        for algorithm in ALGORITHMS:
            schedule = gather_schedule(source, target, algorithm, pieces, node_W)
            modelled[algorithm] = schedule_ns(schedule, chunk, link, node_W)
            simulated[algorithm] = simulate_ns(schedule, chunk, link, node_W)
            assert type(modelled[algorithm]) is int
        if source.new_pairs(target):
            ratios += [modelled[a] / simulated[a] for a in ALGORITHMS]
            chosen = min(ALGORITHMS, key=lambda a: modelled[a])
            regrets.append(simulated[chosen] / min(simulated.values()))
        else:
            assert set(modelled.values()) == {0}
    assert min(ratios) > 0.6, min(ratios)
    assert max(ratios) < 1.8, max(ratios)
    assert 0.95 < np.median(ratios) < 1.1
    assert max(regrets) < 1.5, max(regrets)
    assert np.mean(regrets) < 1.05, np.mean(regrets)


@pytest.mark.parametrize(("pieces", "world"), [(1, 2), (1, 8), (4, 8), (32, 5)])
def test_one_chain_costs_what_the_formula_says(pieces: int, world: int) -> None:
    # (pieces + depth - 1) * (latency + bytes / pieces / rate)
    schedule = gather_schedule(*one_expert(world), "chain", pieces, [0] * world)
    link = LinkModel(latency_ns=1000, bytes_per_s=10**9)
    assert schedule_ns(schedule, 32_000_000, link, [0] * world) == (pieces + world - 2) * (1000 + 32_000_000 // pieces)


@pytest.mark.parametrize(("node_rate", "cost"), [(10**8, 110), (10**9, 20), (4 * 10**9, 20)])
def test_only_hops_between_nodes_wait_for_the_link_of_the_node(node_rate: int, cost: int) -> None:
    # Owner and one copy on node 0, one copy on node 1: the whole chunk crosses once, after a hop at full speed.
    schedule = gather_schedule(*one_expert(3), "chain", 1, [0, 0, 1])
    assert schedule_ns(schedule, 10**9 // 100, LinkModel(0, 10**9, node_rate), [0, 0, 1]) == cost * 10**6
    inside = gather_schedule(*one_expert(3), "chain", 1, [1, 1, 1])
    assert schedule_ns(inside, 10**9 // 100, LinkModel(0, 10**9, node_rate), [1, 1, 1]) == 20 * 10**6
    # Over three nodes the second crossing waits for the first.
    across = gather_schedule(*one_expert(3), "chain", 1, [0, 1, 2])
    crossing_ns = max(10 * 10**6, 10**9 // 100 * 10**9 // node_rate)
    assert schedule_ns(across, 10**9 // 100, LinkModel(0, 10**9, node_rate), [0, 1, 2]) == 2 * crossing_ns


def _costs(
    source: Placement, target: Placement, link: LinkModel, node_W: Sequence[int], chunk: int
) -> dict[Algorithm, int]:
    costs = {}
    for algorithm in ALGORITHMS:
        whole = gather_schedule(source, target, algorithm, 1, node_W)
        pieces = choose_pieces(chunk, link, whole.num_rounds)
        costs[algorithm] = schedule_ns(gather_schedule(source, target, algorithm, pieces, node_W), chunk, link, node_W)
    # Shared links count for less than the model's, so the choice may cost that much more by the model.
    chosen = choose_schedule(source, target, chunk, link, node_W).algorithm
    assert costs[chosen] * SHARED_LINK_PERCENT <= min(costs.values()) * 100
    return costs


def test_clear_cases_rank_as_they_must() -> None:
    link = LinkModel(latency_ns=200_000, bytes_per_s=25_000_000)
    hot = _costs(*one_expert(8), link, [0] * 8, 4 * MIB)
    assert hot["chain"] < hot["tree"] < hot["flat"]
    assert hot["chain"] * 3 < hot["flat"], "a flat fan-out is seven times the chunk"

    single = _costs(*one_expert(8, copies=[5]), link, [0] * 8, 4 * MIB)
    assert len(set(single.values())) == 1
    assert choose_schedule(*one_expert(8, copies=[5]), 4 * MIB, link, [0] * 8).algorithm == "flat"

    # Two nodes behind a slow link: whoever crosses it more than once for one chunk pays.
    slow = LinkModel(latency_ns=200_000, bytes_per_s=250_000_000, node_bytes_per_s=25_000_000)
    node_W = [0, 0, 0, 0, 1, 1, 1, 1]
    nodes = _costs(*one_expert(8), slow, node_W, 4 * MIB)
    assert max(nodes["chain"], nodes["two_level"]) < min(nodes["flat"], nodes["tree"])

    # A chunk so small that only the number of steps counts.
    tiny = _costs(*one_expert(8, copies=[1, 2, 3, 4, 5, 6, 7]), link, [0] * 8, 64)
    assert tiny["flat"] < tiny["tree"] < tiny["chain"]


@pytest.mark.parametrize("chunk", [0, 1, MIN_PIECE_BYTES - 1, MIN_PIECE_BYTES, 4 * MIB, 2**33])
@pytest.mark.parametrize("latency", [0, 1, 200_000, 10**9])
@pytest.mark.parametrize("depth", [0, 1, 2, 63])
def test_pieces_stay_within_their_bounds(chunk: int, latency: int, depth: int) -> None:
    pieces = choose_pieces(chunk, LinkModel(latency, 10**9), depth)
    assert type(pieces) is int
    assert 1 <= pieces <= MAX_PIECES
    assert pieces == 1 or chunk // pieces >= MIN_PIECE_BYTES
    if depth <= 1:
        assert pieces == 1, "nobody passes anything on"


@pytest.mark.parametrize(("latency", "depth"), [(200_000, 3), (200_000, 7), (1_000_000, 15), (5_000_000, 31)])
def test_pieces_are_the_best_of_all(latency: int, depth: int) -> None:
    link, chunk = LinkModel(latency, 25_000_000), 8 * MIB
    cost = {p: (p + depth - 1) * (latency + chunk * 1e9 / p / 25e6) for p in range(1, MAX_PIECES + 1)}
    assert cost[choose_pieces(chunk, link, depth)] <= 1.02 * min(cost.values())


def test_the_choice_depends_on_nothing_but_its_arguments() -> None:
    rng = np.random.default_rng(0)
    source = Placement(rng.integers(0, 16, 32), world_size=16)
    pairs = [(int(rng.integers(32)), int(rng.integers(16))) for _ in range(60)]
    link, node_W = LinkModel(100_000, 10**9, 10**9), [r // 4 for r in range(16)]
    one = choose_schedule(source, source.with_copies(pairs), 4 * MIB, link, node_W)
    again = choose_schedule(source.with_copies([]), source.with_copies(pairs[::-1]), 4 * MIB, link, tuple(node_W))
    assert one == again
    assert one.transfers() == again.transfers()
    assert list(one.trees) == sorted(one.trees)
    nothing = choose_schedule(source, source, 4 * MIB, link, node_W)
    assert (nothing.algorithm, nothing.pieces, nothing.trees) == ("flat", 1, {})
