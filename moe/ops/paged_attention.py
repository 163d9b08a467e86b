"""Attention over a paged key-value cache: sequences of different lengths, each at its own place, in one pass.

The cache of a layer is a pool of blocks of positions (PagedAttention, arXiv:2309.06180, section 4.1). A sequence's
*block table* lists its blocks in order, so position ``p`` stands in block ``table[p // size]`` at offset ``p % size``.
The new positions of all sequences stand one after another in one row of T tokens.

The reference reads every query's keys by themselves. The torch form stores new keys and values once, attends new
positions of a long piece together, and all single queries of similar lengths in one padded call. What it still pays is
a copy: torch's attention wants contiguous keys, so blocks are gathered first unless they happen to be neighbours.
Native ops, where there are some, read the blocks where they are, and take single queries of any lengths in one call.

Shape suffixes: T new tokens, B sequences of a group, S positions attended to, H query heads, G key-value heads,
R = H / G query heads per key-value head, P blocks of the pool, b positions of a block, C blocks of a table, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.native import NativeOps

# Queries are padded to the longest of their group: a group may pad its shortest by so much, and by this many blocks.
_PADDING_FACTOR = 1.5
_PADDING_BLOCKS = 4


class Piece(NamedTuple):
    """New positions of one sequence: ``new`` of them after ``past`` earlier ones, in the blocks ``table``."""

    table: Sequence[int]
    past: int
    new: int


@dataclass(frozen=True)
class _Blocks:
    """Where the keys of some sequences are: a run of neighbours, or rows of blocks padded to one length."""

    run: tuple[int, int] | None
    index: Tensor | None
    num_sequences: int

    def read(self, pool_PbGd: Tensor, length: int) -> Tensor:
        """(B, G, S, d) keys or values of the first ``length`` positions; a view if the blocks are neighbours."""
        heads, width = pool_PbGd.shape[2:]
        if self.run is not None:
            first, last = self.run
            return pool_PbGd[first:last].view(1, -1, heads, width)[:, :length].transpose(1, 2)
        assert self.index is not None
        rows = pool_PbGd.view(pool_PbGd.shape[0], -1).index_select(0, self.index)
        return rows.view(self.num_sequences, -1, heads, width)[:, :length].transpose(1, 2)


@dataclass(frozen=True)
class _Singles:
    """Rows ``start:stop`` are single queries of as many sequences; ``bias_B11S`` hides what is longer than each."""

    start: int
    stop: int
    blocks: _Blocks
    length: int
    bias_B11S: Tensor | None


@dataclass(frozen=True)
class _NativeSingles:
    """Rows ``start:stop`` are single queries of as many sequences, of ``length_B`` positions in blocks ``table_BC``."""

    start: int
    stop: int
    table_BC: Tensor
    length_B: Tensor
    ops: NativeOps


@dataclass(frozen=True)
class _Run:
    """Rows ``start:stop`` are neighbouring positions of one sequence after ``past`` others."""

    start: int
    stop: int
    blocks: _Blocks
    past: int
    mask_TS: Tensor | None


@dataclass(frozen=True)
class PagedPlan:
    """How to attend in one forward pass: the same for every layer. Made by :func:`plan_paged_attention`."""

    pieces: tuple[Piece, ...]
    slot_T: Tensor
    position_T: Tensor
    singles: tuple[_Singles | _NativeSingles, ...]
    runs: tuple[_Run, ...]


def plan_paged_attention(
    pieces: Sequence[Piece],
    block_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    alone: bool = False,
    ops: NativeOps | None = None,
) -> PagedPlan:
    """Work out slots, masks and groups once for all layers.

    Args:
        pieces: in the order of their rows. Single queries that stand next to each other, sorted by length, share calls.
        block_size: b.
        dtype: of the queries; masks have it.
        alone: attend for every token by itself, so that no result depends on what is computed beside it.
        ops: native ops, which attend for single queries; for CPU tensors that they take.

    Raises:
        ValueError: a table has too few blocks for its positions.
    """
    slots: list[int] = []
    positions: list[int] = []
    singles: list[_Singles | _NativeSingles] = []
    runs: list[_Run] = []
    waiting: list[Piece] = []
    row = 0

    def close(before: int) -> None:
        if waiting and ops is not None:
            singles.append(_native_singles(waiting, before - len(waiting), block_size, ops))
        elif waiting:
            singles.append(_singles(waiting, before - len(waiting), block_size, dtype, device))
        waiting.clear()

    for piece in pieces:
        length = piece.past + piece.new
        if len(piece.table) * block_size < length:
            raise ValueError(f"{len(piece.table)} blocks of {block_size} cannot hold {length} positions")
        positions.extend(range(piece.past, length))
        slots.extend(piece.table[p // block_size] * block_size + p % block_size for p in range(piece.past, length))
        if alone:
            for offset in range(piece.new):
                waiting.append(Piece(piece.table, piece.past + offset, 1))
                if ops is None:
                    close(row + offset + 1)
        elif piece.new == 1:
            if waiting and ops is None and not _similar(waiting[0], piece, block_size):
                close(row)
            waiting.append(piece)
        else:
            close(row)
            runs.append(_run(piece, row, block_size, device))
        row += piece.new
    close(row)
    return PagedPlan(
        tuple(pieces),
        torch.tensor(slots, device=device),
        torch.tensor(positions, device=device),
        tuple(singles),
        tuple(runs),
    )


def _similar(first: Piece, piece: Piece, block_size: int) -> bool:
    short, long = sorted((first.past + 1, piece.past + 1))
    return long <= short * _PADDING_FACTOR + _PADDING_BLOCKS * block_size


def _singles(
    pieces: list[Piece], start: int, block_size: int, dtype: torch.dtype, device: torch.device | str
) -> _Singles:
    lengths = [piece.past + 1 for piece in pieces]
    longest = max(lengths)
    blocks = _blocks_of([piece.table for piece in pieces], -(-longest // block_size), device)
    bias_B11S = None
    if min(lengths) < longest:
        beyond_BS = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device).unsqueeze(1)
        bias_B11S = torch.zeros(len(pieces), 1, 1, longest, dtype=dtype, device=device)
        bias_B11S.masked_fill_(beyond_BS[:, None, None], float("-inf"))
    return _Singles(start, start + len(pieces), blocks, longest, bias_B11S)


def _native_singles(pieces: list[Piece], start: int, block_size: int, ops: NativeOps) -> _NativeSingles:
    tables = [piece.table[: piece.past // block_size + 1] for piece in pieces]
    columns = max(map(len, tables))
    table_BC = torch.tensor([[*table, *[0] * (columns - len(table))] for table in tables])  # what is beyond is not read
    length_B = torch.tensor([piece.past + 1 for piece in pieces])
    return _NativeSingles(start, start + len(pieces), table_BC, length_B, ops)


def _run(piece: Piece, row: int, block_size: int, device: torch.device | str) -> _Run:
    length = piece.past + piece.new
    blocks = _blocks_of([piece.table], -(-length // block_size), device)
    mask_TS = None
    if piece.past:
        mask_TS = torch.ones(piece.new, length, dtype=torch.bool, device=device).tril_(piece.past)
    return _Run(row, row + piece.new, blocks, piece.past, mask_TS)


def _blocks_of(tables: Sequence[Sequence[int]], count: int, device: torch.device | str) -> _Blocks:
    if len(tables) == 1:
        table = list(tables[0][:count])
        if table == list(range(table[0], table[0] + count)):
            return _Blocks((table[0], table[0] + count), None, 1)
    # A shorter table is filled up with its own first block, which is finite and masked.
    rows = [list(table[:count]) + [table[0]] * (count - len(table)) for table in tables]
    return _Blocks(None, torch.tensor(rows, device=device).view(-1), len(tables))


def store(new_GTd: Tensor, pool_PbGd: Tensor, plan: PagedPlan) -> None:
    """Write new keys or values into their slots."""
    pool_PbGd.flatten(0, 1).index_copy_(0, plan.slot_T, new_GTd.transpose(0, 1).to(pool_PbGd.dtype))


def paged_attention(q_HTd: Tensor, k_PbGd: Tensor, v_PbGd: Tensor, plan: PagedPlan) -> Tensor:
    """(T, H, d) causal attention of every new position to its own sequence, itself included.

    Args:
        q_HTd: queries of the new positions.
        k_PbGd, v_PbGd: the layer's pool; keys and values of the new positions are stored already.
        plan: of these positions.
    """
    heads, _, width = q_HTd.shape
    groups = k_PbGd.shape[2]
    out_THd = torch.empty(q_HTd.shape[1], heads, width, dtype=q_HTd.dtype, device=q_HTd.device)
    for part in plan.singles:
        if isinstance(part, _NativeSingles):
            q_BHd = q_HTd[:, part.start : part.stop].transpose(0, 1)
            out_BHd = part.ops.attend_singles(q_BHd, k_PbGd, v_PbGd, part.table_BC, part.length_B)
            if len(out_BHd) == len(out_THd):
                return out_BHd
            out_THd[part.start : part.stop] = out_BHd
            continue
        k_BGSd, v_BGSd = part.blocks.read(k_PbGd, part.length), part.blocks.read(v_PbGd, part.length)
        q_BHd = q_HTd[:, part.start : part.stop].transpose(0, 1)
        if q_HTd.dtype == torch.bfloat16:
            out_BHd = F.scaled_dot_product_attention(
                q_BHd.unsqueeze(2), k_BGSd, v_BGSd, part.bias_B11S, enable_gqa=groups != heads
            )
        else:  # heads that share keys as rows of one query: up to 1.7 times as fast in fp32
            q_BGRd = q_BHd.reshape(-1, groups, heads // groups, width)
            out_BHd = F.scaled_dot_product_attention(q_BGRd, k_BGSd, v_BGSd, part.bias_B11S)
        out_THd[part.start : part.stop] = out_BHd.reshape(-1, heads, width)
    for run in plan.runs:
        length = run.past + run.stop - run.start
        k_1GSd, v_1GSd = run.blocks.read(k_PbGd, length), run.blocks.read(v_PbGd, length)
        out_1Htd = F.scaled_dot_product_attention(
            q_HTd[None, :, run.start : run.stop],
            k_1GSd,
            v_1GSd,
            run.mask_TS,
            is_causal=run.mask_TS is None,
            enable_gqa=groups != heads,
        )
        out_THd[run.start : run.stop] = out_1Htd[0].transpose(0, 1)
    return out_THd


def paged_attention_reference(q_HTd: Tensor, k_PbGd: Tensor, v_PbGd: Tensor, plan: PagedPlan) -> Tensor:
    """The same as the formula says, one query after another."""
    heads, block = q_HTd.shape[0], k_PbGd.shape[1]
    rows: list[Tensor] = []
    for piece in plan.pieces:
        for position in range(piece.past, piece.past + piece.new):
            where = [(piece.table[p // block], p % block) for p in range(position + 1)]
            k_SGd = torch.stack([k_PbGd[block_id, offset] for block_id, offset in where])
            v_SGd = torch.stack([v_PbGd[block_id, offset] for block_id, offset in where])
            repeat = heads // k_SGd.shape[1]
            k_SHd, v_SHd = k_SGd.repeat_interleave(repeat, 1), v_SGd.repeat_interleave(repeat, 1)
            score_SH = torch.einsum("hd,shd->sh", q_HTd[:, len(rows)], k_SHd) / q_HTd.shape[2] ** 0.5
            rows.append(torch.einsum("sh,shd->hd", torch.softmax(score_SH, 0), v_SHd))
    return torch.stack(rows)
