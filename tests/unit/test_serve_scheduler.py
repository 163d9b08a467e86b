"""The scheduler and the block pool: single rules by example, and invariants under random traffic."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.engine.blocks import BlockPool, block_key
from serve.engine.scheduler import BatchLimits, Scheduler, Slice
from serve.engine.sequence import Sequence

pytestmark = pytest.mark.unit


def make(blocks: int = 16, size: int = 4, sequences: int = 4, tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), BatchLimits(sequences, tokens), b"w1")


def prompt(
    name: str, length: int, *, first: int = 0, priority: int = 0, arrival: int = 0, reuse: bool = True
) -> Sequence:
    return Sequence((name, 0), list(range(first, first + length)), length, (priority, arrival), reuse=reuse)


def spans(slices: list[Slice]) -> list[tuple[str, int, int]]:
    return [(part.sequence.id[0], part.start, part.stop) for part in slices]


def run_step(scheduler: Scheduler, token: int = 7) -> list[tuple[str, int, int]]:
    """One round; every sequence that reached its end gets ``token``."""
    slices = scheduler.plan()
    found = spans(slices)
    scheduler.commit(slices)
    for part in slices:
        if part.stop == len(part.sequence.tokens):
            scheduler.append(part.sequence, token)
    scheduler.check()
    return found


def test_a_long_prompt_is_cut_into_chunks_and_decoding_sequences_go_first() -> None:
    scheduler = make()
    scheduler.add(prompt("a", 3, arrival=1))
    assert run_step(scheduler) == [("a", 0, 3)]
    scheduler.add(prompt("b", 40, first=100, arrival=2))
    assert run_step(scheduler) == [("a", 3, 4), ("b", 0, 15)]
    assert run_step(scheduler) == [("a", 4, 5), ("b", 15, 30)]
    assert run_step(scheduler) == [("a", 5, 6), ("b", 30, 40)]
    assert run_step(scheduler) == [("a", 6, 7), ("b", 40, 41)]


def test_priority_then_arrival_decides_who_starts() -> None:
    scheduler = make(sequences=1)
    for name, priority, arrival in (("late", 0, 3), ("early", 0, 2), ("urgent", -1, 9)):
        scheduler.add(prompt(name, 2, priority=priority, arrival=arrival))
    order = []
    while not scheduler.idle:
        (part,) = scheduler.plan()
        scheduler.commit([part])
        scheduler.end(part.sequence)
        order.append(part.sequence.id[0])
    assert order == ["urgent", "early", "late"]


def test_nobody_overtakes_a_prompt_that_waits_for_blocks() -> None:
    scheduler = make(blocks=4)
    scheduler.add(prompt("a", 8, arrival=1))
    run_step(scheduler)
    scheduler.add(prompt("large", 12, first=50, arrival=2))
    scheduler.add(prompt("small", 1, first=90, arrival=3))
    assert run_step(scheduler) == [("a", 8, 9)]
    scheduler.end(scheduler.running[0])
    assert run_step(scheduler) == [("large", 0, 12)]  # and the last block is there for it to grow into


def test_the_worst_rank_gives_way_and_is_computed_again_from_its_tokens() -> None:
    scheduler = make(blocks=5)
    first, second = prompt("a", 7, arrival=1), prompt("b", 7, first=50, arrival=2)
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [("a", 0, 7), ("b", 0, 7)]
    run_step(scheduler)
    run_step(scheduler)  # a takes the fifth block, b has none left to grow into
    assert (first.status, second.status, scheduler.preemptions) == ("running", "waiting", 1)
    assert second.tokens == [*range(50, 57), 7, 7]
    assert second.computed == 0
    scheduler.end(first)
    # Its full blocks are still known, so only what was not in one is computed anew.
    assert run_step(scheduler) == [("b", 8, 9)]
    assert second.reused == 0  # of its prompt, at its first start


def test_the_prefix_cache_gives_whole_blocks_but_never_the_last_token() -> None:
    scheduler = make(tokens=12)
    one = prompt("a", 8, arrival=1)
    scheduler.add(one)
    run_step(scheduler)
    scheduler.end(one)
    assert (scheduler.pool.num_cached, scheduler.pool.num_used) == (2, 0)
    again, longer, fresh = prompt("b", 8, arrival=2), prompt("c", 11, arrival=3), prompt("d", 8, arrival=4, reuse=False)
    for sequence in (again, longer, fresh):
        scheduler.add(sequence)
    assert run_step(scheduler) == [("b", 4, 8), ("c", 8, 11), ("d", 0, 5)]
    assert [s.reused for s in (again, longer, fresh)] == [4, 8, 0]
    assert (scheduler.pool.queries, scheduler.pool.hits) == (8 + 8 + 11, 12)
    assert again.blocks[0] == longer.blocks[0]  # shared
    assert again.blocks[1] != longer.blocks[1]  # computed again, because its last token was wanted


def test_pain_11_other_weights_find_nothing_in_the_cache() -> None:
    scheduler = make()
    one, running = prompt("a", 8, arrival=1), prompt("r", 5, first=60, arrival=2)
    scheduler.add(one)
    scheduler.add(running)
    run_step(scheduler)
    scheduler.end(one)
    scheduler.renew(b"w2")
    scheduler.check()
    assert (scheduler.pool.num_cached, scheduler.pool.num_used, running.status) == (0, 0, "waiting")
    scheduler.add(prompt("b", 8, arrival=3))
    assert run_step(scheduler) == [("r", 0, 6), ("b", 0, 8)]


def test_samples_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    scheduler = make(tokens=8)
    leader, follower = prompt("a", 12, arrival=1), prompt("b", 12, arrival=2)
    follower.leader = leader
    scheduler.add(leader)
    scheduler.add(follower)
    assert run_step(scheduler) == [("a", 0, 8)]
    assert run_step(scheduler) == [("a", 8, 12)]
    assert run_step(scheduler) == [("a", 12, 13), ("b", 8, 12)]
    assert leader.blocks[:2] == follower.blocks[:2]
    orphan = prompt("c", 12, first=30, arrival=4)
    orphan.leader = prompt("gone", 12, first=30, arrival=3)
    scheduler.add(orphan.leader)
    scheduler.add(orphan)
    scheduler.end(orphan.leader)
    assert ("c", 0, 6) in run_step(scheduler)


def test_what_can_never_run_is_refused() -> None:
    scheduler = make(blocks=2)
    with pytest.raises(ValueError, match="9 tokens do not fit into 2 blocks"):
        scheduler.add(prompt("a", 9))
    with pytest.raises(ValueError, match="max_step_tokens 3 must be at least max_sequences 4"):
        BatchLimits(4, 3)
    one = prompt("a", 2)
    scheduler.add(one)
    with pytest.raises(ValueError, match="is waiting"):
        scheduler.add(one)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_key_stands_for_its_whole_beginning(one: list[int], two: list[int]) -> None:
    same = one == two
    assert (block_key(b"w", one) == block_key(b"w", two)) == same
    assert (block_key(block_key(b"w", one), [1]) == block_key(block_key(b"w", two), [1])) == same
    assert block_key(b"w", one) != block_key(b"v", one)


class Traffic(RuleBasedStateMachine):
    """Arrivals, aborts, passes, finished answers and weight changes in any order."""

    @initialize(
        blocks=st.integers(6, 14),
        size=st.integers(1, 4),
        sequences=st.integers(1, 4),
        extra=st.integers(0, 9),
    )
    def begin(self, blocks: int, size: int, sequences: int, extra: int) -> None:
        self.scheduler = make(blocks, size, sequences, sequences + extra)
        self.capacity = blocks * size
        self.live: list[Sequence] = []
        self.count = self.version = self.idle_rounds = 0

    @rule(
        length=st.integers(1, 20),
        first=st.integers(0, 1),
        priority=st.integers(-1, 1),
        reuse=st.booleans(),
        siblings=st.integers(1, 3),
    )
    def arrive(self, length: int, first: int, priority: int, reuse: bool, siblings: int) -> None:
        length = min(length, self.capacity - 1)
        leader = None
        for index in range(siblings):
            self.count += 1
            sequence = prompt(f"s{self.count}", length, first=first, priority=priority, arrival=self.count, reuse=reuse)
            sequence.leader, leader = leader, leader or sequence
            self.scheduler.add(sequence)
            self.live.append(sequence)
            assert index < 3

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data(), token=st.integers(0, 2))
    def compute(self, data: st.DataObject, token: int) -> None:
        scheduler = self.scheduler
        best = min(scheduler.running + scheduler.waiting, key=lambda s: s.rank)
        slices = scheduler.plan()
        assert slices, "somebody can always compute something"
        assert len({part.sequence for part in slices}) == len(slices)
        assert sum(part.stop - part.start for part in slices) <= scheduler.limits.max_step_tokens
        assert all(part.start == part.sequence.computed < part.stop for part in slices)
        assert all(len(part.sequence.blocks) * scheduler.pool.block_size >= part.stop for part in slices)
        decoding = [part.stop - part.start for part in slices]
        assert decoding == sorted(decoding, key=lambda count: count > 1), "single tokens first"
        if best.status == "running" and best.pending == 1:
            assert best in {part.sequence for part in slices}, "the best rank always advances"
        scheduler.commit(slices)
        for part in slices:
            sequence = part.sequence
            if part.stop < len(sequence.tokens):
                continue
            if len(sequence.tokens) == self.capacity or data.draw(st.integers(0, 5)) == 0:
                scheduler.end(sequence)
                self.live.remove(sequence)
            else:
                scheduler.append(sequence, token)

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.scheduler.end(sequence)
        self.scheduler.end(sequence)
        self.live.remove(sequence)

    @rule()
    def change_weights(self) -> None:
        self.version += 1
        self.scheduler.renew(b"v%d" % self.version)

    @rule()
    def forget(self) -> None:
        pool = self.scheduler.pool
        freed, cached = pool.forget(), 0
        assert pool.num_cached == cached
        assert freed >= 0

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            known = {id(s) for s in self.scheduler.running + self.scheduler.waiting}
            assert known == {id(s) for s in self.live}

    def teardown(self) -> None:
        """Without new arrivals everybody comes to an end, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if self.scheduler.idle:
                break
            slices = self.scheduler.plan()
            assert slices
            self.scheduler.commit(slices)
            for part in slices:
                if part.stop == len(part.sequence.tokens):
                    if len(part.sequence.tokens) >= min(self.capacity, part.sequence.prompt_len + 6):
                        self.scheduler.end(part.sequence)
                    else:
                        self.scheduler.append(part.sequence, 1)
        assert self.scheduler.idle
        assert self.scheduler.pool.num_used == 0
        self.scheduler.check()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
