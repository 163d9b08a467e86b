"""Keys and values of all sequences in blocks, and one forward pass's view of them.

Shape suffixes: L layers, P blocks, b positions of a block, G key-value heads, d head width, T new tokens,
H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.ops.native import NativeOps
from moe.ops.paged_attention import PagedPlan, Piece, paged_attention, plan_paged_attention, store

GIB = 2**30


class PagedKV:
    """Storage of ``num_blocks`` blocks for every layer. Zeros at first: masked positions are read, and must be finite.

    Args:
        config: gives layers, heads and head width.
        num_blocks: P.
        block_size: b.
        dtype, device: the model's.
        ops: native ops, which attend for single queries; see :func:`moe.ops.paged_attention.plan_paged_attention`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ops: NativeOps | None = None,
    ) -> None:
        self._ops = ops
        shape = (config.num_layers, num_blocks, block_size, config.kv_heads, config.width_per_head)
        self.k_LPbGd = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LPbGd = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.position_bytes = 2 * self.k_LPbGd[:, 0, 0].numel() * self.k_LPbGd.element_size()

    def batch(self, pieces: Sequence[Piece], *, alone: bool = False) -> PagedBatch:
        """The view of one forward pass over these pieces; see :func:`moe.ops.paged_attention.plan_paged_attention`."""
        pool = self.k_LPbGd
        plan = plan_paged_attention(
            pieces, self.block_size, dtype=pool.dtype, device=pool.device, alone=alone, ops=self._ops
        )
        return PagedBatch(self, plan)


class PagedBatch:
    """A :class:`moe.attention.AttentionCache` for one pass over one row of T tokens of many sequences."""

    def __init__(self, kv: PagedKV, plan: PagedPlan) -> None:
        self._kv, self._plan = kv, plan

    def positions(self, length: int) -> Tensor:
        """(1, T) each token's position in its own sequence."""
        if length != self._plan.position_T.numel():
            raise ValueError(f"this pass was planned for {self._plan.position_T.numel()} tokens, got {length}")
        return self._plan.position_T.unsqueeze(0)

    def attend(self, layer: int, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """See :meth:`moe.attention.AttentionCache.attend`; B = 1."""
        k_PbGd, v_PbGd = self._kv.k_LPbGd[layer], self._kv.v_LPbGd[layer]
        store(k_BGTd[0], k_PbGd, self._plan)
        store(v_BGTd[0], v_PbGd, self._plan)
        return paged_attention(q_BHTd[0], k_PbGd, v_PbGd, self._plan).transpose(0, 1).unsqueeze(0)

    def advance(self, length: int) -> None:
        """Which positions are old is the scheduler's knowledge."""


def choose_num_blocks(
    config: ModelConfig, block_size: int, max_sequences: int, gib: float | None, element_bytes: int
) -> int:
    """Blocks to allocate: what ``gib`` holds, or enough for four full contexts and for all sequences at a quarter.

    At least one full context always fits: a sequence must be able to run alone.
    """
    context = -(-config.max_seq_len // block_size)
    if gib is None:
        return max(4 * context, max_sequences * -(-context // 4)) if max_sequences > 1 else context
    block_bytes = 2 * config.num_layers * block_size * config.kv_heads * config.width_per_head * element_bytes
    return max(context, int(gib * GIB) // block_bytes)
