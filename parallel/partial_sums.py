"""Sums on the way from the holders of an expert to its owner, in a wider dtype than the parts where asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.exchange import Transfer, piece_of


class PartialSums:
    """What one rank adds up in one sparse reduce-scatter.

    Parts that are of the sum's dtype are added to in place. Of narrower ones the sum is kept beside, piece by piece and
    only until it is sent, so that a rank that holds gradients in bf16 does not need them all in fp32.

    Args:
        chunks: by expert, flat; those that this rank owns must be of ``dtype``.
        dtype: of sums, in which they travel; None: that of the chunks.
    """

    def __init__(self, chunks: Mapping[int, Tensor], pieces: int, dtype: torch.dtype | None) -> None:
        self._chunks, self._pieces, self._dtype = chunks, pieces, dtype
        self._wider: dict[tuple[int, int], Tensor] = {}

    def room(self, t: Transfer) -> Tensor:
        """New memory for what comes by ``t``."""
        part = self._part(t)
        return torch.empty_like(part, dtype=self._dtype or part.dtype)

    def add(self, t: Transfer, came: Tensor) -> None:
        """``came`` has come by ``t`` and may be kept."""
        part = self._part(t)
        if part.dtype == came.dtype:
            part.add_(came)
        elif (kept := self._wider.get((t.expert, t.piece))) is not None:
            kept.add_(came)
        else:
            self._wider[t.expert, t.piece] = came.add_(part)

    def take(self, t: Transfer) -> Tensor:
        """What to send by ``t``: this rank's part and all that was added to it."""
        kept = self._wider.pop((t.expert, t.piece), None)
        if kept is not None:
            return kept
        part = self._part(t)
        return part.to(self._dtype or part.dtype)

    def widens(self, t: Transfer) -> bool:
        """Does sending by ``t`` take memory beside the chunk's?"""
        return self._dtype not in (None, self._chunks[t.expert].dtype)

    def _part(self, t: Transfer) -> Tensor:
        return piece_of(self._chunks[t.expert], t.piece, self._pieces)
