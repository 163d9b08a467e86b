"""Paged attention against its readable reference, and against attention over contiguous keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.ops.causal_attention import causal_attention_reference
from moe.ops.native import LEVELS, NativeOps, choose_native_ops
from moe.ops.paged_attention import Piece, paged_attention, paged_attention_reference, plan_paged_attention, store

pytestmark = pytest.mark.unit

SIZE, BLOCKS, HEADS, WIDTH = 4, 40, 4, 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def filled_pool(groups: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    k_PbGd, v_PbGd = (torch.randn(BLOCKS, SIZE, groups, WIDTH, generator=rng).to(dtype) for _ in range(2))
    return k_PbGd, v_PbGd


def needed_ops() -> NativeOps:
    found = choose_native_ops()
    if found.ops is None:
        pytest.skip(f"{found.reason}: install g++ and leave MOEYARD_NATIVE unset to run this")
    return found.ops


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


@pytest.mark.parametrize("native", [False, True])
@settings(deadline=None, max_examples=40)
@given(pieces(), st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_every_query_sees_its_own_sequence_and_nothing_else(
    native: bool, batch: list[Piece], groups: int, dtype: torch.dtype, alone: bool
) -> None:
    k_PbGd, v_PbGd = filled_pool(groups, dtype, 0)
    tokens = sum(piece.new for piece in batch)
    q_HTd = torch.randn(HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = plan_paged_attention(batch, SIZE, dtype=dtype, alone=alone, ops=needed_ops() if native else None)
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


# --- native ops -------------------------------------------------------------------------------------------------------

paths = pytest.mark.parametrize(
    ("level", "dtype"), [(level, dtype) for level in LEVELS[:3] for dtype in (torch.float32, torch.bfloat16)]
)


def singles(
    lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype, size: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q_BHd, k_PbGd, v_PbGd, table_BC, length_B): blocks in any order, none of them two sequences'."""
    rng = torch.Generator().manual_seed(sum(lengths))
    columns = -(-max(lengths) // size)
    table_BC = torch.randperm(len(lengths) * columns, generator=rng).view(-1, columns)
    q_BHd = torch.randn(len(lengths), heads, width, generator=rng).to(dtype)
    k_PbGd, v_PbGd = (torch.randn(table_BC.numel(), size, groups, width, generator=rng).to(dtype) for _ in range(2))
    return q_BHd, k_PbGd, v_PbGd, table_BC, torch.tensor(lengths)


def exact(q_BHd: Tensor, k_PbGd: Tensor, v_PbGd: Tensor, table_BC: Tensor, length_B: Tensor) -> Tensor:
    """The formula in fp64."""
    rows = []
    for q_Hd, table_C, length in zip(q_BHd.double(), table_BC, length_B.tolist(), strict=True):
        repeat = q_Hd.shape[0] // k_PbGd.shape[2]
        k_SHd, v_SHd = (
            pool[table_C].flatten(0, 1)[:length].double().repeat_interleave(repeat, 1) for pool in (k_PbGd, v_PbGd)
        )
        score_HS = torch.einsum("hd,shd->hs", q_Hd, k_SHd) / q_Hd.shape[1] ** 0.5
        rows.append(torch.einsum("hs,shd->hd", torch.softmax(score_HS, 1), v_SHd))
    return torch.stack(rows)


@paths
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "width"),
    [([1], 1, 1, 1), ([5, 1, 33], 4, 4, 8), ([70, 3], 8, 2, 64), ([9, 17], 7, 1, 20), ([130], 6, 2, 100)],
)
def test_native_singles_are_the_formula(
    level: str, dtype: torch.dtype, lengths: list[int], heads: int, groups: int, width: int
) -> None:
    ops = needed_ops()
    if level not in ops.levels():
        pytest.skip(f"this CPU has {ops.best_level} at most; {level} runs on a newer one")
    given = singles(lengths, heads, groups, width, dtype)
    found_BHd = ops.attend_singles(*given, level)
    assert found_BHd.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 3}[dtype]  # of results that are rounded once
    torch.testing.assert_close(found_BHd.double(), exact(*given), atol=tolerance, rtol=tolerance)


@paths
def test_a_native_query_has_the_same_bits_in_any_company_and_on_any_number_of_threads(
    level: str, dtype: torch.dtype
) -> None:
    ops = needed_ops()
    if level not in ops.levels():
        pytest.skip(f"this CPU has {ops.best_level} at most; {level} runs on a newer one")
    q_BHd, k_PbGd, v_PbGd, table_BC, length_B = singles([900, 3, 401, 77], 8, 4, 72, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together_BHd = ops.attend_singles(q_BHd, k_PbGd, v_PbGd, table_BC, length_B, level)
    finally:
        torch.set_num_threads(before)
    for b in range(4):
        one = slice(b, b + 1)
        alone_1Hd = ops.attend_singles(q_BHd[one], k_PbGd, v_PbGd, table_BC[one], length_B[one], level)
        assert torch.equal(alone_1Hd, together_BHd[one])


def test_native_singles_with_large_scores_and_with_scores_that_are_not_numbers() -> None:
    ops = needed_ops()
    q_BHd, k_PbGd, v_PbGd, table_BC, length_B = singles([21, 6], 2, 1, 16, torch.float32)
    given = q_BHd * 1e4, k_PbGd, v_PbGd, table_BC, length_B  # one position takes it all
    torch.testing.assert_close(ops.attend_singles(*given).double(), exact(*given), atol=1e-5, rtol=1e-5)
    k_PbGd[table_BC[1, 0], 2] = torch.nan
    found_BHd = ops.attend_singles(q_BHd, k_PbGd, v_PbGd, table_BC, length_B)
    assert found_BHd[0].isfinite().all()
    assert found_BHd[1].isnan().all()


def test_native_singles_refuse_what_does_not_fit() -> None:
    ops = needed_ops()
    q, k, v, table, length = singles([6, 2], 4, 2, 8, torch.float32)
    for wrong, words in (
        ((q, k, v, table, torch.tensor([9, 2])), "length_B gives sequence 0 9 positions, its table has blocks for 8"),
        ((q, k, v, table, torch.tensor([6, 0])), "length_B gives sequence 1 0 positions"),
        ((q, k, v, table + 3, length), "table_BC names block"),
        ((q[:, :3], k, v, table, length), "q_BHd has 3 heads, no multiple of the 2 of k_PbGd"),
        ((q, k[..., :4], v, table, length), r"k_PbGd has shape \(4, 4, 2, 4\), expected \(P, b, G, d=8\)"),
        ((q.bfloat16(), k, v, table, length), "they must be the same"),
        ((q, k, v, table.int(), length), "table_BC is of dtype Int, expected Long"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.attend_singles(*wrong)
