"""Moving experts to new owners: fp32 weights and optimizer state, in place, between two steps.

One layer after another, so that no more than one layer's experts exist twice. Every rank works out the same list of
moves; each moved row of each tensor is one message, in one order on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.sharded_experts import ShardedExperts
from parallel.sharder import Move
from parallel.token_dispatch import RowExchange


def move_experts(
    experts: ShardedExperts,
    owned: Sequence[int],
    moves: Sequence[Move],
    optimizer: torch.optim.Optimizer,
    exchange: RowExchange,
    label: str,
) -> None:
    """Make this rank the owner of ``owned`` in one layer.

    Args:
        experts: the layer's; parameter, gradient and owned list change.
        owned: the experts that this rank owns from now on, in the order of rows.
        moves: of this layer, all ranks', the same list on every rank.
        optimizer: its state of the layer's parameter moves along; state without rows (a step count) stays.
        label: the layer's name in error texts.
    """
    param = experts.chunks_eX
    state = optimizer.state[param]
    rows = {key: value for key, value in sorted(state.items()) if value.shape == param.shape}
    old_row = {expert: row for row, expert in enumerate(experts.owned)}
    sizes = (len(owned), experts.chunk_numel)
    old = {"weights": param.detach(), **rows}
    new = {key: tensor.new_empty(sizes) for key, tensor in old.items()}
    for row, expert in enumerate(owned):
        if expert in old_row:
            for key, tensor in old.items():
                new[key][row] = tensor[old_row[expert]]
    place = {expert: row for row, expert in enumerate(owned)}
    outgoing: list[tuple[int, Tensor]] = []
    incoming: list[tuple[int, Tensor]] = []
    for move in sorted(moves):
        for key in old:
            if move.src == exchange.rank:
                outgoing.append((move.dst, old[key][old_row[move.expert]]))
            elif move.dst == exchange.rank:
                incoming.append((move.src, new[key][place[move.expert]]))
    exchange.swap(outgoing, incoming, "owners", f"{label} new owners")
    param.data = new.pop("weights")
    param.grad = None
    for key, tensor in new.items():
        state[key] = tensor
    experts.owned = list(owned)
    experts.forget()
