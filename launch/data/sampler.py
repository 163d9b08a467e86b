"""Which tokens make up row g of step s, and which windows validate: pure functions, no state to save.

Names: B rows, S tokens of a sequence (targets), T the same positions as a mask; a row of ids has S + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from launch.data.cache import checksum
from launch.data.permutation import Mixture, derive_key, permute
from launch.data.shards import Domain
from moe.errors import DataError
from moe.tokenizer import Tokenizer


@dataclass(frozen=True)
class SequenceBatch:
    """One step's sequences.

    Attributes:
        ids: (B, S + 1) int64; inputs are all but the last column, targets all but the first.
        domains: (B,) int64, index of the domain that each row comes from.
    """

    ids: Tensor
    domains: Tensor


@dataclass(frozen=True)
class Place:
    """Where a window begins: domain index and token offset."""

    domain: int
    start: int


class _Windows:
    """The training windows of one domain, epoch after epoch.

    In each epoch the windows do not overlap in their targets and come in an order of their own; where the first one
    begins is drawn anew, so that over the epochs text meets the window's edges in different places. An epoch leaves
    out fewer than two sequences of tokens, at either end.
    """

    def __init__(self, domain: Domain, seed: int, seq_len: int) -> None:
        tokens = len(domain.tokens)
        if tokens < seq_len + 1:
            raise DataError(f"domain {domain.name!r} has {tokens} tokens, a sequence needs {seq_len + 1}")
        self._seq_len = seq_len
        self._name = domain.name
        self._seed = seed
        # The same number of windows at every offset, so that draw j is in epoch j // count without counting epochs.
        self.count = max(1, (tokens - seq_len) // seq_len)
        self._slack = tokens - 1 - self.count * seq_len
        self._epoch = (-1, 0, 0)

    def start(self, draw: int) -> int:
        """Token offset of the ``draw``-th window."""
        epoch, position = divmod(draw, self.count)
        if self._epoch[0] != epoch:
            key = derive_key("order", self._seed, self._name, epoch)
            self._epoch = (epoch, key, derive_key("offset", key) % (self._slack + 1))
        _, key, offset = self._epoch
        return offset + self._seq_len * permute(position, self.count, key)


class TrainSampler:
    """The training data of every step.

    Row ``g`` of step ``s`` depends on (seed, s, g) and the data alone: any number of ranks that share out the rows sees
    the same global batch, and a resumed run goes on where it was. Domains come up by weight (:class:`Mixture`), and
    each domain's windows once per epoch of that domain.

    Attributes:
        fingerprint: identifies data, order and mixture; equal when a resumed run sees the same rows.
    """

    def __init__(self, domains: Sequence[Domain], seed: int, seq_len: int, global_batch: int) -> None:
        """Raises DataError when a domain is shorter than a sequence."""
        self.domains = list(domains)
        self.seq_len = seq_len
        self.global_batch = global_batch
        self._windows = [_Windows(domain, seed, seq_len) for domain in domains]
        self._mixture = Mixture([domain.weight for domain in domains], derive_key("mixture", seed))
        self.fingerprint = checksum(
            {
                "seed": seed,
                "seq_len": seq_len,
                "global_batch": global_batch,
                "domains": [[d.name, d.weight, len(d.tokens), d.fingerprint] for d in domains],
            }
        )

    @property
    def windows_per_epoch(self) -> list[int]:
        """Windows in one epoch of each domain."""
        return [windows.count for windows in self._windows]

    def places(self, step: int, start: int, stop: int) -> list[Place]:
        """Where rows ``start .. stop - 1`` of the global batch of ``step`` (0-based) come from."""
        if not 0 <= start <= stop <= self.global_batch:
            raise IndexError(f"rows {start} to {stop} are not all in a global batch of {self.global_batch}")
        first = step * self.global_batch + start
        drawn = self._mixture.counts(first)
        places = []
        for draw in range(first, first + stop - start):
            domain = self._mixture.choose(draw)
            places.append(Place(domain, self._windows[domain].start(drawn[domain])))
            drawn[domain] += 1
        return places

    def rows(self, step: int, start: int, stop: int) -> Tensor:
        """Token ids of those rows: (stop - start, S + 1) int64."""
        return self._read(self.places(step, start, stop))

    def batch(self, step: int) -> SequenceBatch:
        """The whole global batch of ``step``."""
        places = self.places(step, 0, self.global_batch)
        return SequenceBatch(self._read(places), torch.tensor([place.domain for place in places]))

    def _read(self, places: Sequence[Place]) -> Tensor:
        ids = np.empty((len(places), self.seq_len + 1), dtype=np.int64)
        for row, place in enumerate(places):
            ids[row] = self.domains[place.domain].tokens[place.start : place.start + self.seq_len + 1]
        return torch.from_numpy(ids)


class EvalWindows:
    """Non-overlapping windows that cover the validation text: each of its tokens is a target exactly once.

    The windows of all domains are put in one fixed shuffled order, so that the first n are a sample of the whole and a
    short evaluation says about the same as the full one.
    """

    def __init__(self, domains: Sequence[Domain], seq_len: int, tokenizer: Tokenizer) -> None:
        """Raises DataError when there is nothing to predict."""
        self.domains = list(domains)
        self.seq_len = seq_len
        self._pad_id = tokenizer.eos_id
        self._lengths = tokenizer.text_lengths
        # Tokens 1.. are targets; the leading end-of-text token is only context.
        counts = [-(-(len(domain.tokens) - 1) // seq_len) for domain in domains]
        self._ends = list(accumulate(counts))
        self.num_sequences = self._ends[-1] if self._ends else 0
        if self.num_sequences == 0:
            raise DataError("there is no validation text")
        self._key = derive_key("validation order")

    def places(self, start: int, stop: int) -> list[Place]:
        """Where windows ``start .. stop - 1`` come from."""
        if not 0 <= start <= stop <= self.num_sequences:
            raise IndexError(f"windows {start} to {stop} are not all among {self.num_sequences}")
        places = []
        for row in range(start, stop):
            index = permute(row, self.num_sequences, self._key)
            domain = int(np.searchsorted(self._ends, index, side="right"))
            first = self._ends[domain - 1] if domain else 0
            places.append(Place(domain, (index - first) * self.seq_len))
        return places

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Windows ``start .. stop - 1``.

        Returns:
            ids (B, S + 1) int64, padded with end-of-text; valid_BT (B, S) bool, which targets count.
        """
        places = self.places(start, stop)
        ids = np.full((len(places), self.seq_len + 1), self._pad_id, dtype=np.int64)
        valid_BT = np.zeros((len(places), self.seq_len), dtype=bool)
        for row, place in enumerate(places):
            tokens = self.domains[place.domain].tokens[place.start : place.start + self.seq_len + 1]
            ids[row, : len(tokens)] = tokens
            valid_BT[row, : len(tokens) - 1] = True
        return torch.from_numpy(ids), torch.from_numpy(valid_BT)

    def row_bytes(self, start: int, stop: int) -> np.ndarray:
        """UTF-8 bytes of text that each window's targets stand for, shape (B,), int64.

        End-of-text targets are predicted but add no bytes. With a tokenizer that loses some text (case, spaces), its
        tokens' bytes are scaled to those of the documents, to keep bits per byte those of the real text.
        """
        counts = []
        for place in self.places(start, stop):
            domain = self.domains[place.domain]
            counted = int(self._lengths[domain.tokens[place.start + 1 : place.start + self.seq_len + 1]].sum())
            if domain.token_bytes is not None and 0 < domain.token_bytes != domain.text_bytes:
                counted = round(counted * domain.text_bytes / domain.token_bytes)
            counts.append(counted)
        return np.array(counts, dtype=np.int64)

    def text_bytes(self, start: int = 0, stop: int | None = None) -> int:
        """UTF-8 bytes of text behind windows ``start .. stop - 1`` (None: to the last), for bits per byte."""
        return int(self.row_bytes(start, self.num_sequences if stop is None else stop).sum())
