"""Paged attention against its readable reference, and against attention over contiguous keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.ops.causal_attention import causal_attention_reference
from moe.ops.paged_attention import Piece, paged_attention, paged_attention_reference, plan_paged_attention, store

pytestmark = pytest.mark.unit

SIZE, BLOCKS, HEADS, WIDTH = 4, 40, 4, 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def filled_pool(groups: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    k_PbGd, v_PbGd = (torch.randn(BLOCKS, SIZE, groups, WIDTH, generator=rng).to(dtype) for _ in range(2))
    return k_PbGd, v_PbGd


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """Sequences of any length at any place; tables are distinct blocks in any order, or neighbours."""
    free = draw(st.permutations(range(BLOCKS)))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        past, new = draw(st.integers(0, 17)), draw(st.sampled_from([1, 1, 2, 5, 9]))
        count = -(-(past + new) // SIZE)
        table, free = free[:count], free[count:]
        if len(table) < count:
            break
        found.append(Piece(sorted(table) if draw(st.booleans()) else table, past, new))
    return sorted(found, key=lambda piece: piece.new > 1)


@settings(deadline=None, max_examples=40)
@given(pieces(), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_every_query_sees_its_own_sequence_and_nothing_else(
    batch: list[Piece], groups: int, dtype: torch.dtype, alone: bool
) -> None:
    k_PbGd, v_PbGd = filled_pool(groups, dtype, 0)
    tokens = sum(piece.new for piece in batch)
    q_HTd = torch.randn(HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = plan_paged_attention(batch, SIZE, dtype=dtype, alone=alone)
    assert plan.position_T.tolist() == [p for piece in batch for p in range(piece.past, piece.past + piece.new)]
    found_THd = paged_attention(q_HTd, k_PbGd, v_PbGd, plan)
    wanted_THd = paged_attention_reference(q_HTd.float(), k_PbGd.float(), v_PbGd.float(), plan)
    torch.testing.assert_close(found_THd.float(), wanted_THd, atol=TOLERANCE[dtype], rtol=0)


def test_a_sequence_in_scattered_blocks_is_attended_to_as_if_it_were_in_one_piece() -> None:
    length, groups = 13, 2
    rng = torch.Generator().manual_seed(2)
    q_HTd = torch.randn(HEADS, length, WIDTH, generator=rng)
    k_GTd, v_GTd = torch.randn(2, groups, length, WIDTH, generator=rng)
    k_PbGd, v_PbGd = torch.zeros(2, BLOCKS, SIZE, groups, WIDTH)
    wanted_HTd = causal_attention_reference(q_HTd[None], k_GTd[None], v_GTd[None])[0]
    table = [7, 3, 30, 12]
    for start, stop in ((0, 6), (6, 7), (7, 13)):  # a chunk, one token, a chunk
        plan = plan_paged_attention([Piece(table, start, stop - start)], SIZE, dtype=torch.float32)
        store(k_GTd[:, start:stop], k_PbGd, plan)
        store(v_GTd[:, start:stop], v_PbGd, plan)
        found_THd = paged_attention(q_HTd[:, start:stop], k_PbGd, v_PbGd, plan)
        torch.testing.assert_close(found_THd.transpose(0, 1), wanted_HTd[:, start:stop], atol=2e-6, rtol=0)
    assert k_PbGd[7, 0].equal(k_GTd[:, 0])
    assert k_PbGd[12, 0].equal(k_GTd[:, 12])
    assert not k_PbGd[12, 1:].any()


def test_a_token_attends_the_same_bits_alone_whatever_is_beside_it() -> None:
    k_PbGd, v_PbGd = filled_pool(2, torch.float32, 3)
    q_HTd = torch.randn(HEADS, 9, WIDTH, generator=torch.Generator().manual_seed(4))
    whole = plan_paged_attention([Piece([5, 6, 7], 0, 9)], SIZE, dtype=torch.float32, alone=True)
    wanted_THd = paged_attention(q_HTd, k_PbGd, v_PbGd, whole)
    for past, new in ((0, 4), (4, 1), (5, 4)):
        others = [Piece([20, 1, 2, 3], 11, 1), Piece([5, 6, 7], past, new), Piece([30, 31], 3, 2)]
        plan = plan_paged_attention(others, SIZE, dtype=torch.float32, alone=True)
        mixed_HTd = torch.cat([q_HTd[:, :1], q_HTd[:, past : past + new], q_HTd[:, 3:5]], 1)
        found_THd = paged_attention(mixed_HTd, k_PbGd, v_PbGd, plan)[1 : 1 + new]
        assert found_THd.equal(wanted_THd[past : past + new])


def test_too_few_blocks_are_named() -> None:
    with pytest.raises(ValueError, match="2 blocks of 4 cannot hold 9 positions"):
        plan_paged_attention([Piece([0, 1], 8, 1)], SIZE, dtype=torch.float32)
