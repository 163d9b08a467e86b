"""Moving tokens to expert order and back, deterministic in forward and backward on every device.

Two linear maps that are each other's transpose. ``gather_rows`` copies each token once per chosen expert, rows sorted
by expert; ``combine_rows`` adds a token's rows up, weighted. Both directions read by index and never scatter with
collisions, so sums run in one fixed order: by rank within the token.

Shape suffixes: T tokens, D width, N chosen (token, expert) pairs = rows, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class RowOrder:
    """Where the rows of one routing plan stand after sorting by expert.

    Attributes:
        token_N: (N,) int64 token of each sorted row.
        pair_N: (N,) int64 pair (in the plan's order) of each sorted row.
        row_N: (N,) int64 sorted row of each pair: the inverse permutation of ``pair_N``.
        row_ptr_T1: (T + 1,) int64; token t owns pairs ``row_ptr[t]:row_ptr[t + 1]``.
        uniform_k: K when every token has exactly K pairs, else None.
    """

    token_N: Tensor
    pair_N: Tensor
    row_N: Tensor
    row_ptr_T1: Tensor
    uniform_k: int | None

    @property
    def num_tokens(self) -> int:
        return self.row_ptr_T1.numel() - 1


def gather_rows(x_TD: Tensor, order: RowOrder) -> Tensor:
    """(T, D) tokens -> (N, D) rows sorted by expert. Its gradient adds up each token's rows."""
    if not torch.is_grad_enabled():
        return x_TD.index_select(0, order.token_N)
    return _gather_rows(x_TD, order)


def gather_rows_reference(x_TD: Tensor, order: RowOrder) -> Tensor:
    """The same as plain indexing."""
    return x_TD[order.token_N]


def combine_rows(y_ND: Tensor, weight_N: Tensor, order: RowOrder) -> Tensor:
    """(N, D) sorted rows -> (T, D) weighted sum per token; zero where a token has no row.

    Args:
        y_ND: (N, D) expert outputs in sorted order.
        weight_N: (N,) weight of each pair, in the plan's order; cast to the dtype of the sum.
        order: the order that ``gather_rows`` used.

    Sums of half-precision rows are formed in fp32 and rounded once.
    """
    if not torch.is_grad_enabled():
        return _sum_rows(y_ND, weight_N, order)
    return _combine_rows(y_ND, weight_N, order)


def combine_rows_reference(y_ND: Tensor, weight_N: Tensor, order: RowOrder) -> Tensor:
    """The same as one index_add (which CUDA adds in no fixed order)."""
    dtype = _sum_dtype(y_ND.dtype)
    weighted_ND = y_ND.to(dtype) * weight_N.to(dtype)[order.pair_N].unsqueeze(1)
    y_TD = weighted_ND.new_zeros(order.num_tokens, y_ND.shape[1]).index_add(0, order.token_N, weighted_ND)
    return y_TD.to(y_ND.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_rows(y_ND: Tensor, weight_N: Tensor | None, order: RowOrder) -> Tensor:
    """(T, D) sum over each token's rows, one rank within the token after another."""
    dtype, k = _sum_dtype(y_ND.dtype), order.uniform_k
    if k:
        row_TK = order.row_N.view(-1, k)
        weight_TK = None if weight_N is None else weight_N.to(dtype).view(-1, k)
        sum_TD = y_ND.index_select(0, row_TK[:, 0]).to(dtype)
        if weight_TK is not None:
            sum_TD.mul_(weight_TK[:, :1])
        for rank in range(1, k):
            part_TD = y_ND.index_select(0, row_TK[:, rank])
            if weight_TK is None:
                sum_TD.add_(part_TD)
            else:
                sum_TD.addcmul_(part_TD.to(dtype), weight_TK[:, rank : rank + 1])
        return sum_TD.to(y_ND.dtype)
    sum_TD = y_ND.new_zeros(order.num_tokens, y_ND.shape[1], dtype=dtype)
    count_T = order.row_ptr_T1.diff()
    for rank in range(int(count_T.max()) if count_T.numel() else 0):
        token_M = (count_T > rank).nonzero().squeeze(1)  # tokens that have a row of this rank: each only once
        pair_M = order.row_ptr_T1[token_M] + rank
        part_MD = y_ND.index_select(0, order.row_N[pair_M]).to(dtype)
        if weight_N is not None:
            part_MD.mul_(weight_N[pair_M].to(dtype).unsqueeze(1))
        sum_TD.index_copy_(0, token_M, part_MD.add_(sum_TD.index_select(0, token_M)))
    return sum_TD.to(y_ND.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TD.index_select(0, order.token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad_ND, None, ctx.order), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N)
        ctx.order = order
        return _sum_rows(y_ND, weight_N, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y_ND, weight_N = ctx.saved_tensors
        order: RowOrder = ctx.order
        dtype = _sum_dtype(y_ND.dtype)
        grad_ND = grad_TD.index_select(0, order.token_N).to(dtype)
        grad_weight_N = None
        if ctx.needs_input_grad[1]:
            grad_row_N = torch.linalg.vecdot(grad_ND, y_ND.to(dtype))
            grad_weight_N = grad_row_N.index_select(0, order.row_N).to(weight_N.dtype)
        grad_y_ND = None
        if ctx.needs_input_grad[0]:
            grad_y_ND = grad_ND.mul_(weight_N.to(dtype)[order.pair_N].unsqueeze(1)).to(y_ND.dtype)
        return grad_y_ND, grad_weight_N, None


# Function.apply is untyped; these say what comes back.
_gather_rows: Callable[[Tensor, RowOrder], Tensor] = _GatherRows.apply
_combine_rows: Callable[[Tensor, Tensor, RowOrder], Tensor] = _CombineRows.apply
