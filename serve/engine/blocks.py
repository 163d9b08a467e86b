"""The pool of key-value blocks: who holds which, and which still hold a prompt that may come again. Pure bookkeeping.

A block is in one of three states. *Used*: at least one running sequence has it in its table; several may share a block
that is full, because a full block never changes. *Cached*: nobody holds it, its content is known by a key, and it is
the first to be taken when nothing is free, oldest first. *Free*: its content is of no use to anybody.

``free + cached + used == total`` at all times; :meth:`BlockPool.check` proves it from scratch.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockKey = bytes


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Key of a full block: its tokens and, through ``parent``, all tokens before it.

    Args:
        parent: key of the block before it; of the first one, what else the content depends on: the weights' version.
        tokens: of this block.

    A cryptographic digest: two prompts that collided would read each other's keys and values.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Bookkeeping of ``total`` blocks of ``block_size`` positions.

    Attributes:
        queries, hits: tokens looked up among cached blocks since start, and found.
    """

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one position, got {total} of {block_size}")
        self.total, self.block_size = total, block_size
        self.queries = self.hits = 0
        self._free = list(range(total - 1, -1, -1))  # taken from the end: neighbours first, which attention reads best
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._holders: dict[int, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._holders)

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`take` can give."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, positions: int) -> int:
        """Blocks that so many positions need."""
        return -(-positions // self.block_size)

    def take(self, count: int) -> list[int]:
        """Blocks for one new holder, free ones first, then the cached ones that were let go first.

        Raises:
            ValueError: there are not so many.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def take_known(self, keys: Iterable[BlockKey]) -> list[int]:
        """Blocks that hold the longest known beginning of ``keys``, for one more holder."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._cached.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def num_known(self, keys: Iterable[BlockKey]) -> tuple[int, int]:
        """How many blocks :meth:`take_known` would give, and how many of them nobody holds now."""
        known = idle = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            known += 1
            idle += block in self._cached
        return known, idle

    def publish(self, block: int, key: BlockKey) -> None:
        """A used block is full and holds ``key``. A second block of one content stays anonymous."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One holder gives its blocks back. The end of a prompt is forgotten before its beginning."""
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
                continue
            del self._holders[block]
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def forget(self) -> int:
        """No content is known any more (the weights changed); returns how many cached blocks that freed."""
        freed = len(self._cached)
        self._free.extend(reversed(self._cached))
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()
        return freed

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Proves the books against the block tables of all holders.

        Raises:
            AssertionError: a block is lost, held twice by one holder, or in two states.
        """
        held: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a block stands twice in one table: {table}"
            held.update(table)
        assert dict(held) == self._holders, f"holders {self._holders} are not those of the tables {dict(held)}"
        parts = [*self._free, *self._cached, *self._holders]
        assert sorted(parts) == list(range(self.total)), "free + cached + used != total"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks disagree"
        assert set(self._cached) <= set(self._key_of), "a cached block without content"
