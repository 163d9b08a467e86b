"""What every rank of a serving gang does alike: hold experts by a placement, and change to another one in steps.

A change is prepared (memory), moved and built (layer by layer, owners send), and only when all ranks have all of it
committed, which copies nothing and cannot fail. Until then every rank computes with what it had.

Shape suffixes: L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.experts import ExpertBank
from parallel.exchange import gather_schedule
from parallel.gang_experts import HeldExperts, bank_of_chunks, chunk_of, expert_bytes
from parallel.gang_link import GangLink
from parallel.placement import Placement


@dataclass
class _Staged:
    """A change that does not hold yet: what each layer shall be, as far as it changes."""

    placements: list[Placement]
    room: list[dict[int, Tensor]]
    copies: dict[int, ExpertBank | None] = field(default_factory=dict)
    owned: dict[int, ExpertBank] = field(default_factory=dict)


class GangMember:
    """The experts of one rank.

    Args:
        link: to the other ranks.
        banks: of each MoE layer, the experts that this rank holds by ``placements``.
    """

    def __init__(self, link: GangLink, banks: Sequence[HeldExperts], placements: Sequence[Placement]) -> None:
        self._link, self.banks, self.placements = link, list(banks), list(placements)
        self._staged: _Staged | None = None

    def held(self, layer: int) -> list[int]:
        """Experts of ``layer`` that this rank computes, in the order of its rows."""
        return self.placements[layer].held_by(self._link.rank)

    # --- other copies -------------------------------------------------------------------------------------------------

    def prepare(self, placements: Sequence[Placement]) -> None:
        """Make room for what this rank will receive; raises what the allocator raises."""
        room = [
            {expert: self._room(layer) for expert in self._coming(layer, target)}
            for layer, target in enumerate(placements)
        ]
        self._staged = _Staged(list(placements), room)

    def _room(self, layer: int) -> Tensor:
        return torch.empty(expert_bytes(self.banks[layer].owned), dtype=torch.uint8, device=self._link.device)

    def _coming(self, layer: int, target: Placement) -> list[int]:
        here = self.placements[layer].copied_to(self._link.rank)
        return [expert for expert in target.copied_to(self._link.rank) if expert not in here]

    def move(self, layer: int) -> None:
        """This rank's part of the spAG that brings the layer's copies to their new holders.

        Raises:
            GangError: a rank did not do its part.
        """
        assert self._staged is not None
        old, new, rank = self.placements[layer], self._staged.placements[layer], self._link.rank
        kept = Placement(old.owner_E, old.holders_EW & new.holders_EW)
        schedule = gather_schedule(kept, new, "flat", 1, [0] * new.world_size)
        arrived, owned = self._staged.room[layer], old.owned_by(rank)
        # All messages are under way at once; an expert's number tells them apart.
        pending = []
        leaving: dict[int, Tensor] = {}
        for transfer in schedule.transfers(rank):
            if transfer.dst == rank:
                pending.append(self._link.receive(arrived[transfer.expert], transfer.src, 1 + transfer.expert))
                continue
            if transfer.expert not in leaving:
                leaving[transfer.expert] = chunk_of(self.banks[layer].owned, owned.index(transfer.expert))
            pending.append(self._link.send(leaving[transfer.expert], transfer.dst, 1 + transfer.expert))
        for message in pending:
            message.wait()

    def build(self, layer: int) -> None:
        """Make a bank of the layer's copies, old and new, all of which are here; raises what the allocator raises."""
        assert self._staged is not None
        bank, arrived, rank = self.banks[layer], self._staged.room[layer], self._link.rank
        old, new = self.placements[layer].copied_to(rank), self._staged.placements[layer].copied_to(rank)
        if old == new:
            return
        if not new:
            self._staged.copies[layer] = None
            return
        chunks = [
            arrived[expert] if expert in arrived else chunk_of(bank.copies or bank.owned, old.index(expert))
            for expert in new
        ]
        self._staged.copies[layer] = bank_of_chunks(bank.owned, chunks)
        arrived.clear()

    # --- other weights ------------------------------------------------------------------------------------------------

    def stage_weights(self, layer: int, chunks: Sequence[Tensor]) -> None:
        """New weights of all experts that this rank holds in ``layer``, in the order of :meth:`held`."""
        if self._staged is None:
            self._staged = _Staged(list(self.placements), [])
        bank = self.banks[layer]
        self._staged.owned[layer] = bank_of_chunks(bank.owned, chunks[: bank.num_owned])
        if chunks[bank.num_owned :]:
            self._staged.copies[layer] = bank_of_chunks(bank.owned, chunks[bank.num_owned :])

    # --- both ---------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """What was staged holds from now on."""
        assert self._staged is not None
        for layer, owned in self._staged.owned.items():
            self.banks[layer].owned = owned
        for layer, copies in self._staged.copies.items():
            self.banks[layer].copies = copies
        self.placements, self._staged = self._staged.placements, None

    def drop(self) -> None:
        """Forget what was staged."""
        self._staged = None
