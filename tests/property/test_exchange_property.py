"""What holds for every schedule: proved by the checker, by counting, and by running it on arrays in any interleaving.

W ranks, E experts.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel.exchange import ALGORITHMS, Algorithm, Schedule, Transfer, gather_schedule, reduce_schedule
from parallel.exchange_check import ScheduleError, check_schedule
from parallel.placement import Placement

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Case:
    """An spAG from ``narrow`` to ``wide``, or the spRS back."""

    narrow: Placement
    wide: Placement
    algorithm: Algorithm
    pieces: int
    node_W: list[int]
    seed: int

    def schedule(self, reduces: bool) -> Schedule:
        make = reduce_schedule if reduces else gather_schedule
        source, target = (self.wide, self.narrow) if reduces else (self.narrow, self.wide)
        return make(source, target, self.algorithm, self.pieces, self.node_W)

    def by_rank(self, reduces: bool) -> dict[int, list[Transfer]]:
        """What each rank derives by itself."""
        return {rank: self.schedule(reduces).transfers(rank) for rank in range(self.wide.world_size)}

    def check(self, of_rank: Mapping[int, Sequence[Transfer]], reduces: bool) -> None:
        source, target = (self.wide, self.narrow) if reduces else (self.narrow, self.wide)
        check_schedule(of_rank, source, target, self.pieces, reduces=reduces)


@st.composite
def cases(draw: st.DrawFn, max_world: int = 64, max_experts: int = 256, max_copies: int = 400) -> Case:
    """Owners anywhere (some ranks own nothing), nodes of any size and of any ranks, copies there before or not."""
    world, experts = draw(st.integers(1, max_world)), draw(st.integers(1, max_experts))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    owner_E = rng.choice(rng.permutation(world)[: draw(st.integers(1, world))], experts)
    node_W = rng.integers(0, draw(st.integers(1, world)), world)
    if draw(st.booleans()):
        node_W.sort()
    copies = rng.permutation(experts * world)[: draw(st.integers(0, max_copies))]
    if draw(st.booleans()):  # a few experts on all ranks instead
        copies = (rng.permutation(experts)[: max(1, max_copies // world), None] * world + np.arange(world)).ravel()
    pairs = [(int(c) // world, int(c) % world) for c in copies]
    before = pairs[: draw(st.integers(0, len(pairs)))] if draw(st.booleans()) else []
    narrow = Placement(owner_E, world_size=world).with_copies(before)
    algorithm, pieces = draw(st.sampled_from(ALGORITHMS)), draw(st.integers(1, 5))
    return Case(narrow, narrow.with_copies(pairs), algorithm, pieces, node_W.tolist(), seed)


# --- proof and counts -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_every_schedule_passes_the_proof_and_all_ranks_agree(case: Case, reduces: bool) -> None:
    schedule = case.schedule(reduces)
    everything = schedule.transfers()
    of_rank = {rank: schedule.transfers(rank) for rank in range(case.wide.world_size)}
    for rank, mine in of_rank.items():
        assert mine == [t for t in everything if rank in (t.src, t.dst)]
    case.check(of_rank, reduces)

    twin = Placement(case.narrow.owner_E.tolist(), case.narrow.holders_EW.tolist())
    other = Case(twin, twin.union(case.wide), case.algorithm, case.pieces, list(case.node_W), 0)
    assert other.schedule(reduces).transfers() == everything
    assert schedule.reversed() == case.schedule(not reduces)


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans())
def test_bytes_and_rounds_are_those_of_the_formulae(case: Case, reduces: bool) -> None:
    schedule, world = case.schedule(reduces), case.wide.world_size
    everything = schedule.transfers()
    new = set(case.narrow.new_pairs(case.wide))
    assert len(everything) == len(new) * case.pieces
    # Each copy is one end of exactly one transfer a piece, whichever way it took.
    ends = Counter((t.expert, t.src if reduces else t.dst, t.piece) for t in everything)
    assert ends == Counter((e, r, p) for e, r in new for p in range(case.pieces))

    sent_W = [7 * sum(t.src == rank for t in everything) for rank in range(world)]
    assert schedule.sent_bytes_W(7 * case.pieces, world) == sent_W
    received_W = case.narrow.gather_bytes_W(case.wide, 7 * case.pieces)
    assert sum(sent_W) == received_W.sum()
    if reduces:
        assert sent_W == received_W.tolist()

    rounds = 0
    for expert in {e for e, _ in new}:
        owner = int(case.narrow.owner_E[expert])
        nodes = Counter(case.node_W[r] for e, r in new if e == expert) + Counter([case.node_W[owner]])
        count = max(case.node_W) + 1
        sizes = [nodes[n] for n in sorted(nodes, key=lambda n: (n - case.node_W[owner]) % count)]
        holders = sum(sizes)
        depth = {
            "flat": 1,
            "chain": holders - 1,
            "tree": int(np.ceil(np.log2(holders))),
            "two_level": max(hops + size - 1 for hops, size in enumerate(sizes)),
        }[case.algorithm]
        rounds = max(rounds, depth + case.pieces - 1)
    assert schedule.num_rounds == rounds == max((t.round + 1 for t in everything), default=0)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_chains_leave_each_rank_once_and_enter_each_node_once(case: Case, reduces: bool) -> None:
    everything = case.schedule(reduces).transfers()
    if reduces:
        everything = [t._replace(src=t.dst, dst=t.src) for t in everything]
    leaves = Counter((t.expert, t.piece, t.src) for t in everything)
    crossings = [t for t in everything if case.node_W[t.src] != case.node_W[t.dst]]
    enters = Counter((t.expert, t.piece, case.node_W[t.dst]) for t in crossings)
    if case.algorithm == "chain":
        assert all(times == 1 for times in leaves.values())
    if case.algorithm in ("chain", "two_level"):
        assert all(times == 1 for times in enters.values())
        assert all(node != case.node_W[case.wide.owner_E[expert]] for expert, _, node in enters)
    if case.algorithm == "flat":
        assert all(src == case.wide.owner_E[expert] for expert, _, src in leaves)
    if case.algorithm in ("tree", "two_level"):
        limit = 2 if case.algorithm == "two_level" else case.wide.world_size.bit_length()
        assert all(times <= limit for times in leaves.values())


@settings(max_examples=60, deadline=None)
@given(cases(max_world=24, max_experts=24, max_copies=120))
def test_who_is_added_after_whom_does_not_depend_on_the_pieces(case: Case) -> None:
    # So cutting a chunk otherwise, or another place in the chunk, changes no bit of a sum.
    def order(schedule: Schedule) -> set[tuple[int, int, tuple[int, ...]]]:
        added: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for t in schedule.transfers():
            added[t.expert, t.dst, t.piece].append(t.src)
        assert all(len(set(srcs)) == len(srcs) for srcs in added.values())
        return {(expert, dst, tuple(srcs)) for (expert, dst, _), srcs in added.items()}

    whole = reduce_schedule(case.wide, case.narrow, case.algorithm, 1, case.node_W)
    assert order(case.schedule(reduces=True)) == order(whole)
    if case.algorithm == "flat":
        assert all(list(srcs) == sorted(srcs) for _, _, srcs in order(whole))


# --- run on arrays ----------------------------------------------------------------------------------------------------

Backend = Literal["eager", "rendezvous", "rounds"]
"""Sends are buffered; or wait for their receive; or whole rounds are groups, each begun when the last one is over."""

Chunks = dict[tuple[int, int], NDArray[np.int64]]
"""(rank, expert) -> (pieces, 2)."""


class BlockedError(AssertionError):
    """Nobody can go on and somebody is not through."""


def run(of_rank: Mapping[int, Sequence[Transfer]], chunks: Chunks, reduces: bool, backend: Backend, seed: int) -> None:
    """Let ranks take turns at random; messages between two ranks have no names and keep their order."""
    pick = np.random.default_rng(seed)
    key: Callable[[Transfer], Any] = (lambda t: t.round) if backend == "rounds" else (lambda t: t)
    groups = {rank: deque(list(group) for _, group in groupby(of_rank[rank], key)) for rank in of_rank}
    wire: dict[tuple[int, int], deque[NDArray[np.int64]]] = defaultdict(deque)
    expects: dict[int, list[Transfer]] = {rank: [] for rank in of_rank}
    untaken: Counter[int] = Counter()

    def over(rank: int) -> bool:
        return not expects[rank] and (backend == "eager" or not untaken[rank])

    def go_on(rank: int) -> bool:
        moved = False
        for t in list(expects[rank]):
            if wire[t.src, rank]:
                mine, value = chunks[rank, t.expert], wire[t.src, rank].popleft()
                mine[t.piece] = mine[t.piece] + value if reduces else value
                untaken[t.src] -= 1
                expects[rank].remove(t)
                moved = True
            elif backend != "rounds":
                break
        if over(rank) and groups[rank]:
            for t in groups[rank].popleft():
                if t.src == rank:
                    wire[rank, t.dst].append(chunks[rank, t.expert][t.piece].copy())
                    untaken[rank] += 1
                if t.dst == rank:
                    expects[rank].append(t)
            moved = True
        return moved

    awake = sorted(of_rank)
    while awake:
        rank = awake.pop(int(pick.integers(len(awake))))
        if go_on(rank):
            awake = [r for r in of_rank if groups[r] or not over(r)]
    if any(groups[r] or not over(r) for r in of_rank) or any(wire.values()):
        raise BlockedError


def starting_chunks(case: Case, reduces: bool) -> Chunks:
    """Random values for every holder of ``wide``; where a gather brings the true one, they are the garbage before."""
    rng = np.random.default_rng(case.seed)
    chunks = {}
    for expert in range(case.wide.num_experts):
        truth = rng.integers(-(2**40), 2**40, (case.pieces, 2))
        for rank in case.wide.holders(expert):
            has_it = not reduces and case.narrow.holders_EW[expert, rank]
            chunks[rank, expert] = truth.copy() if has_it else rng.integers(-(2**40), 2**40, (case.pieces, 2))
    return chunks


def wanted_chunks(case: Case, before: Chunks, reduces: bool) -> Chunks:
    """By definition: the owner's everywhere; or, on owners, the sum over those who give theirs up."""
    wanted: Chunks = {}
    for expert in range(case.wide.num_experts):
        owner = int(case.wide.owner_E[expert])
        keep = case.narrow.holders(expert)
        if not reduces:
            wanted |= {(rank, expert): before[owner, expert] for rank in case.wide.holders(expert)}
            continue
        wanted |= {(rank, expert): before[rank, expert] for rank in keep}
        gone = [before[rank, expert] for rank in case.wide.holders(expert) if rank not in keep]
        wanted[owner, expert] = np.sum([before[owner, expert], *gone], axis=0)
    return wanted


def differs(case: Case, of_rank: Mapping[int, Sequence[Transfer]], reduces: bool, backend: Backend, seed: int) -> bool:
    before, chunks = starting_chunks(case, reduces), starting_chunks(case, reduces)
    run(of_rank, chunks, reduces, backend, seed)
    return any(not np.array_equal(chunks[key], want) for key, want in wanted_chunks(case, before, reduces).items())


@pytest.mark.parametrize("backend", ["eager", "rendezvous", "rounds"])
@settings(max_examples=40, deadline=None)
@given(cases(max_world=24, max_experts=32, max_copies=80), st.booleans(), st.integers(0, 2**32))
def test_no_interleaving_blocks_and_all_give_copies_and_sums(
    backend: Backend, case: Case, reduces: bool, seed: int
) -> None:
    assert not differs(case, case.by_rank(reduces), reduces, backend, seed)


@settings(max_examples=40, deadline=None)
@given(cases(max_world=16, max_experts=16, max_copies=60))
def test_gathering_in_two_steps_leaves_what_gathering_at_once_does(case: Case) -> None:
    first = Case(case.narrow.sharding(), case.narrow, "tree", 2, case.node_W, case.seed)
    once = Case(case.narrow.sharding(), case.wide, case.algorithm, 2, case.node_W, case.seed)
    second = Case(case.narrow, case.wide, "two_level", 2, case.node_W, case.seed)
    stepwise, at_once = starting_chunks(once, reduces=False), starting_chunks(once, reduces=False)
    for step in (first, second):
        run(step.by_rank(False), stepwise, False, "rounds", case.seed)
    run(once.by_rank(False), at_once, False, "rounds", case.seed)
    assert stepwise.keys() == at_once.keys()
    assert all(np.array_equal(stepwise[key], at_once[key]) for key in at_once)


@pytest.mark.parametrize("backend", ["eager", "rendezvous", "rounds"])
def test_the_runs_on_arrays_can_fail(backend: Backend) -> None:
    narrow = Placement([0], world_size=3)
    case = Case(narrow, narrow.everywhere(), "chain", 1, [0, 0, 0], 1)
    first, second = Transfer(0, 0, 0, 0, 1), Transfer(1, 0, 0, 1, 2)
    assert case.by_rank(False) == {0: [first], 1: [first, second], 2: [second]}
    with pytest.raises(BlockedError):
        differs(case, {0: [], 1: [first, second], 2: [second]}, False, backend, 0)
    early = second._replace(round=0)
    if backend == "rounds":  # sent on in the round in which it comes
        assert differs(case, {0: [first], 1: [first, early], 2: [early]}, False, backend, 0)
    assert differs(case, {0: [], 1: [second], 2: [second]}, False, backend, 0)


# --- what the proof accepts works -------------------------------------------------------------------------------------


def broken(of_rank: dict[int, list[Transfer]], rng: np.random.Generator, edits: int) -> dict[int, list[Transfer]]:
    """Edit transfers at random: on both sides, or on one."""
    ranks = len(of_rank)
    for _ in range(edits):
        everything = sorted({t for mine in of_rank.values() for t in mine})
        if not everything:
            break
        t = everything[rng.integers(len(everything))]
        new = [
            [],
            [t, t],
            [t, t._replace(round=t.round + 1)],
            [t._replace(round=max(0, t.round + int(rng.choice([-1, 1]))))],
            [t._replace(dst=int(rng.integers(ranks)))],
            [t._replace(src=int(rng.integers(ranks)))],
            [t._replace(src=t.dst, dst=t.src)],
        ][rng.integers(7)]
        one_side = t.src if rng.random() < 0.2 else None
        for rank, mine in of_rank.items():
            if one_side is None or rank == one_side:
                others = [other for other in mine if other != t]
                of_rank[rank] = sorted(others + [n for n in new if rank in (n.src, n.dst)])
    return of_rank


@settings(max_examples=300, deadline=None)
@given(cases(max_world=5, max_experts=3, max_copies=8), st.booleans(), st.integers(1, 4), st.integers(0, 2**32))
def test_what_the_proof_accepts_works_and_what_does_not_work_it_refuses(
    case: Case, reduces: bool, edits: int, seed: int
) -> None:
    assume(case.narrow != case.wide)
    of_rank = broken(case.by_rank(reduces), np.random.default_rng(seed), edits)
    try:
        case.check(of_rank, reduces)
    except ScheduleError:
        return
    for backend in ("eager", "rendezvous", "rounds"):
        assert not differs(case, of_rank, reduces, backend, seed)
