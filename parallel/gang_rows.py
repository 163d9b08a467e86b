"""Rows on their way from rank 0 of a serving gang to a worker: how one message carries counts and rows.

The body of the order is the counts of the worker's experts (int64), filled up to :data:`ALIGN_BYTES`, then the rows.

Shape suffixes: T tokens, D width, N rows for the worker, e experts that it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.gang_link import ALIGN_BYTES, HEADER_INTS, GangLink, Op, Pending
from parallel.placement import Ints


def _counts_bytes(held: int) -> int:
    return -(-held * 8 // ALIGN_BYTES) * ALIGN_BYTES


def send_rows(link: GangLink, rank: int, layer: int, load_e: Ints, x_TD: Tensor, token_N: Tensor) -> list[Pending]:
    """Send the tokens ``token_N`` of ``x_TD``, sorted by held expert, ``load_e`` (e,) of each. Copies them once."""
    count, begin = token_N.numel(), _counts_bytes(load_e.size)
    row_bytes = 0 if x_TD.is_cuda else count * x_TD.shape[1] * x_TD.element_size()
    message = link.message(Op.EXPERTS, (layer, count), begin + row_bytes)
    inline = message.numel() > HEADER_INTS * 8
    body = message[HEADER_INTS * 8 :] if inline else torch.empty(begin + row_bytes, dtype=torch.uint8)
    body[: load_e.size * 8].view(torch.int64).copy_(torch.from_numpy(load_e))
    if row_bytes:
        torch.index_select(x_TD, 0, token_N, out=body[begin:].view(x_TD.dtype).view(count, -1))
    sent = [link.send(message, rank)]
    if not inline:
        sent.append(link.send(body, rank))
    if x_TD.is_cuda:
        sent.append(link.send(x_TD.index_select(0, token_N), rank))
    return sent


def rows_in(body: Tensor, held: int, count: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(load_e, rows_ND) of an order's body, as views; no rows where they travel by themselves."""
    begin = _counts_bytes(held)
    load_e = body[: held * 8].view(torch.int64)
    rows_ND = body[begin : begin + count * dim * dtype.itemsize].view(dtype).view(-1, dim)
    return load_e, rows_ND
