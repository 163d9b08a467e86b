"""One continuation of one prompt as the scheduler sees it: tokens, how many are computed, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from serve.engine.blocks import BlockKey, block_key

SequenceId: TypeAlias = tuple[str, int]
"""(request id, index of the sequence in its request)."""


@dataclass(eq=False, slots=True)
class Sequence:
    """What the scheduler knows of a sequence; it never looks at what the tokens mean.

    Attributes:
        id: unique.
        tokens: prompt and generated ones.
        prompt_len: how many of them are the prompt.
        rank: (priority, order of arrival): the smallest is served first and pre-empted last.
        leader: sequence with the same prompt that computes it first; this one waits until it can share the blocks.
        reuse: may take what is cached of its prompt. Not when every position's output is needed.
        status: where it is.
        computed: tokens whose keys and values are in the cache.
        reused: of the prompt's tokens, those that were found in the cache at its first start.
        blocks: block table.
        keys: key of each full block of ``tokens``, as far as they were asked for.
    """

    id: SequenceId
    tokens: list[int]
    prompt_len: int
    rank: tuple[int, int]
    leader: Sequence | None = None
    reuse: bool = True
    status: Literal["new", "waiting", "running", "ended"] = "new"
    computed: int = 0
    reused: int | None = None
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed; 1 while it is decoding."""
        return len(self.tokens) - self.computed

    def full_keys(self, root: BlockKey, block_size: int, upto: int) -> list[BlockKey]:
        """Keys of the full blocks within the first ``upto`` tokens."""
        count = upto // block_size
        while len(self.keys) < count:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else root
            self.keys.append(block_key(parent, self.tokens[start : start + block_size]))
        return self.keys[:count]
