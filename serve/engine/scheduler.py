"""Which sequences compute how many tokens in the next forward pass. A state machine: no model, no threads, no clock.

Every pass may hold anything: one token of each decoding sequence, and pieces of prompts as large as the token budget
still allows (Orca's iteration-level batching, OSDI 2022; Sarathi's chunked prefill, arXiv:2308.16369). Decoding
sequences go first, so a long prompt delays nobody by more than one pass of ``max_step_tokens``.

A sequence starts when its known tokens fit into blocks that nobody uses; it asks for one more block whenever it has
filled its last. If there is none, the sequence of the worst rank gives all its blocks back and is computed again later
from its tokens (recompute instead of swapping, arXiv:2309.06180 section 4.5). The best one always advances, so every
sequence ends.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from serve.engine.blocks import BlockKey, BlockPool
from serve.engine.sequence import Sequence


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one forward pass.

    Attributes:
        max_sequences: sequences that run at once.
        max_step_tokens: positions that one pass computes; at least ``max_sequences``, so that decoding never waits.

    Raises:
        ValueError: that is not so.
    """

    max_sequences: int = 32
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, got {self.max_sequences}")
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"max_step_tokens {self.max_step_tokens} must be at least max_sequences {self.max_sequences}"
            )


class Slice(NamedTuple):
    """Tokens ``start:stop`` of a sequence are computed in this pass."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def ends_known(self) -> bool:
        """Its last position predicts a token that nobody knows yet."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Sequences that wait or run, and the blocks that they hold.

    Args:
        pool: the blocks.
        limits: bounds of a pass.
        root: what the cache's content depends on besides tokens: the weights' version.

    One round is :meth:`plan`, the forward pass, :meth:`commit`, then :meth:`append` or :meth:`end` for each sequence
    whose slice ended its known tokens.
    """

    def __init__(self, pool: BlockPool, limits: BatchLimits, root: BlockKey = b"") -> None:
        self.pool, self.limits, self.root = pool, limits, root
        self.waiting: list[Sequence] = []  # both sorted by rank
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.holding = False  # nobody new starts

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits for its turn.

        Raises:
            ValueError: it was added before, has no tokens, or could never fit into the pool.
        """
        if sequence.status != "new":
            raise ValueError(f"sequence {sequence.id} is {sequence.status}")
        if not sequence.tokens or self.pool.blocks_for(len(sequence.tokens)) > self.pool.total:
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit into {self.pool.total} blocks")
        sequence.status = "waiting"
        bisect.insort(self.waiting, sequence, key=_rank)

    def end(self, sequence: Sequence) -> None:
        """The sequence is over, whatever it was doing; its blocks are free, or cached. Again: nothing happens."""
        if sequence.status == "waiting":
            self.waiting.remove(sequence)
        elif sequence.status == "running":
            self.running.remove(sequence)
            self._release(sequence)
        sequence.status = "ended"

    def plan(self) -> list[Slice]:
        """Slices of the next pass, those of single tokens first; empty when nobody can compute anything."""
        budget, preemptions = self.limits.max_step_tokens, self.preemptions
        planned: dict[Sequence, Slice] = {}
        # Ranks decide who gives way, so the best come first among decoding and among prefilling sequences alike.
        for sequence in [s for s in self.running if s.pending == 1] + [s for s in self.running if s.pending > 1]:
            if sequence.status != "running":  # pre-empted by an earlier one
                continue
            count = min(sequence.pending, budget)
            if count and self._grow(sequence, sequence.computed + count, planned):
                planned[sequence] = Slice(sequence, sequence.computed, sequence.computed + count)
                budget -= count
        if not self.holding and self.preemptions == preemptions:
            self._start_waiting(planned, budget)
        return sorted(planned.values(), key=lambda s: (s.stop - s.start > 1, s.stop if s.stop - s.start == 1 else 0))

    def _grow(self, sequence: Sequence, positions: int, planned: dict[Sequence, Slice]) -> bool:
        """Blocks for so many positions, if need be at the cost of worse ranks; False: the sequence itself gave way."""
        missing = self.pool.blocks_for(positions) - len(sequence.blocks)
        while missing > self.pool.num_available:
            victim = self.running[-1]
            planned.pop(victim, None)
            self.preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.pool.take(missing)
        return True

    def _start_waiting(self, planned: dict[Sequence, Slice], budget: int) -> None:
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self.limits.max_sequences:
                return
            if _waits_for_leader(sequence):
                continue
            if not self._start(sequence):
                return  # nobody overtakes, or a large prompt would wait for ever
            count = min(sequence.pending, budget)
            planned[sequence] = Slice(sequence, sequence.computed, sequence.computed + count)
            budget -= count

    def _start(self, sequence: Sequence) -> bool:
        """From waiting to running with blocks for all known tokens, reused ones first; False when there are too few."""
        # The last known token is always computed: its output is what is wanted.
        keys = sequence.full_keys(self.root, self.pool.block_size, len(sequence.tokens) - 1) if sequence.reuse else []
        known, idle = self.pool.num_known(keys)
        missing = self.pool.blocks_for(len(sequence.tokens)) - known
        # One block to grow by for everybody who runs, or the newcomer would soon be sent back.
        if missing + len(self.running) > self.pool.num_available - idle:
            return False
        sequence.blocks = self.pool.take_known(keys)
        sequence.computed = known * self.pool.block_size
        sequence.blocks += self.pool.take(missing)
        if sequence.reuse:
            self.pool.queries += len(sequence.tokens)
            self.pool.hits += sequence.computed
        if sequence.reused is None:
            sequence.reused = min(sequence.computed, sequence.prompt_len)
        self.waiting.remove(sequence)
        sequence.status = "running"
        bisect.insort(self.running, sequence, key=_rank)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """From running back to waiting; what it had computed may still be found in the cache."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = "waiting"
        bisect.insort(self.waiting, sequence, key=_rank)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0

    def commit(self, slices: Iterable[Slice]) -> None:
        """The pass over these slices is done: their tokens are computed, and their full blocks can be shared."""
        size = self.pool.block_size
        for sequence, start, stop in slices:
            if sequence.status != "running":
                continue  # aborted meanwhile
            sequence.computed = stop
            if stop // size > start // size:
                keys = sequence.full_keys(self.root, size, stop)
                for index in range(start // size, stop // size):
                    self.pool.publish(sequence.blocks[index], keys[index])

    def append(self, sequence: Sequence, token: int) -> None:
        """A token that the model chose, to be computed next."""
        sequence.tokens.append(token)

    def renew(self, root: BlockKey) -> None:
        """The weights changed: nothing that was computed counts any more. Running sequences are computed again."""
        for sequence in list(self.running):
            self.preempt(sequence)
        for sequence in self.waiting:
            sequence.keys = []
        self.pool.forget()
        self.root = root

    def check(self) -> None:
        """Proves the invariants that hold between rounds.

        Raises:
            AssertionError: one does not.
        """
        self.pool.check(sequence.blocks for sequence in self.running)
        assert len(self.running) <= self.limits.max_sequences, "more sequences run than may"
        for sequences, status in ((self.waiting, "waiting"), (self.running, "running")):
            assert [s.rank for s in sequences] == sorted(s.rank for s in sequences), f"{status} is not sorted"
            assert all(s.status == status for s in sequences), f"a sequence in {status} says otherwise"
        assert not any(s.blocks or s.computed for s in self.waiting), "a waiting sequence holds blocks"
        for sequence in self.running:
            held = len(sequence.blocks) * self.pool.block_size
            assert sequence.computed <= min(held, len(sequence.tokens)), f"{sequence.id} computed more than it holds"


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _waits_for_leader(sequence: Sequence) -> bool:
    """Its prompt is being computed by another, which has not ended and still has prompt before it."""
    leader = sequence.leader
    if leader is None or not sequence.reuse or sequence.reused is not None:
        return False
    return leader.status in ("waiting", "running") and leader.computed < leader.prompt_len
