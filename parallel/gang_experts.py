"""The experts of one layer that one rank of a serving gang holds: those that it owns, and copies of hot ones.

Works on any bank whose tensors are all stacked by expert (plain and packed ones are), so weights travel as the bytes
that are computed with, and a copy gives the owner's bits.

Shape suffixes: e experts held here, N rows sorted by them, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe.experts import ExpertBank
from moe.ops.grouped_mm import ExpertOp


class HeldExperts(ExpertBank):
    """A bank of owned experts and one of copies, computed one after the other.

    Args:
        owned: the bank of those that are owned; of size 0 where there are none.

    Attributes:
        num_owned: experts in ``owned``; rows of theirs come first.
    """

    def __init__(self, owned: ExpertBank) -> None:
        super().__init__()
        self.owned = owned
        self.copies: ExpertBank | None = None
        self.num_owned = num_stacked(owned)

    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[ExpertOp, str]:
        """See :meth:`moe.experts.ExpertBank.op_choice`."""
        return self.owned.op_choice(dtype, device)

    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """A rank of a gang has a part of the model, and saves none."""
        raise NotImplementedError("experts that are spread over a serving gang cannot be saved")

    def forward(self, rows_ND: Tensor, load_e: Tensor) -> Tensor:
        """(N, D) rows sorted by held expert, owned ones first, ``load_e`` (e,) of each -> (N, D)."""
        owned_e, copied_e = load_e[: self.num_owned], load_e[self.num_owned :]
        count = int(owned_e.sum()) if copied_e.numel() else rows_ND.shape[0]
        parts = []
        if count:
            parts.append(self.owned(rows_ND[:count], owned_e))
        if count < rows_ND.shape[0]:
            assert self.copies is not None
            parts.append(self.copies(rows_ND[count:], copied_e))
        if not parts:
            return torch.empty_like(rows_ND)
        result: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result


# --- stacks of tensors and the bytes of one expert --------------------------------------------------------------------


def _stacks(bank: ExpertBank) -> dict[str, Tensor]:
    stacks = {name: tensor.detach() for name, tensor in (*bank.named_parameters(), *bank.named_buffers())}
    if not stacks or any(bank.children()) or len({tensor.shape[0] for tensor in stacks.values()}) != 1:
        raise TypeError(f"the tensors of a {type(bank).__name__} are not stacked by expert, so they cannot be spread")
    return stacks


def num_stacked(bank: ExpertBank) -> int:
    """Experts in ``bank``.

    Raises:
        TypeError: it is no bank of stacked tensors.
    """
    return next(iter(_stacks(bank).values())).shape[0]


def sub_bank(bank: ExpertBank, experts: Sequence[int]) -> ExpertBank:
    """A bank of the same kind with copies of these experts only, in this order."""
    return _rebuilt(bank, {name: stack[list(experts)] for name, stack in _stacks(bank).items()}, len(experts))


def expert_bytes(bank: ExpertBank) -> int:
    """Bytes of one expert's weights."""
    return sum(stack[:0].element_size() * stack.shape[1:].numel() for stack in _stacks(bank).values())


def chunk_of(bank: ExpertBank, expert: int) -> Tensor:
    """(bytes,) uint8 copy of all weights of the ``expert``-th of the bank."""
    return torch.cat([stack[expert].reshape(-1).view(torch.uint8) for stack in _stacks(bank).values()])


def bank_of_chunks(like: ExpertBank, chunks: Sequence[Tensor]) -> ExpertBank:
    """A bank of the kind of ``like`` from its experts' bytes; see :func:`chunk_of`."""
    stacks: dict[str, Tensor] = {}
    begin = 0
    for name, stack in _stacks(like).items():
        size = stack.element_size() * stack.shape[1:].numel()
        fresh = stack.new_empty((len(chunks), *stack.shape[1:]))
        for expert, chunk in enumerate(chunks):
            fresh[expert].view(-1).view(torch.uint8).copy_(chunk[begin : begin + size])
        stacks[name] = fresh
        begin += size
    return _rebuilt(like, stacks, len(chunks))


def _rebuilt(bank: ExpertBank, stacks: Mapping[str, Tensor], num_experts: int) -> ExpertBank:
    # A shallow copy keeps whatever else the kind of bank knows (widths, the choice of its op).
    fresh = copy.copy(bank)
    parameters = {name: nn.Parameter(stacks[name], requires_grad=False) for name, _ in bank.named_parameters()}
    buffers = {name: stacks[name] for name, _ in bank.named_buffers()}
    fresh.__dict__.update(_parameters=parameters, _buffers=buffers, num_experts=num_experts)
    return fresh
