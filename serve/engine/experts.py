"""Counts of the experts' work: since start, and between the start and the stop of a recording.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from serve.client import ExpertRecord


class ExpertCounts:
    """Fed once per forward pass by the engine's thread; reading it copies, so any thread may."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._total_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._recording: _Recording | None = None

    def add(self, load_LE: Tensor, tokens: int) -> None:
        """One pass over ``tokens`` positions."""
        load_LE = load_LE.cpu()
        self._total_LE += load_LE
        if self._recording is not None and self._recording.ended_s is None:
            self._recording.add(load_LE, tokens)

    def clear(self) -> None:
        """Start again from zero: warm-up is nobody's load."""
        self._total_LE.zero_()

    def total(self) -> tuple[tuple[int, ...], ...]:
        """(L, E) tokens that each expert has taken since start."""
        return tuple(tuple(load_E) for load_E in self._total_LE.tolist())

    def record(self, *, start: bool) -> ExpertRecord:
        """Begin a recording from zero, or end the one that runs; what was recorded until now."""
        record = self.recorded()
        if start:
            self._recording = _Recording(torch.zeros_like(self._total_LE))
        elif self._recording is not None and self._recording.ended_s is None:
            self._recording.ended_s = time.monotonic()
            record = self.recorded()
        return record

    def recorded(self) -> ExpertRecord:
        """The last recording as far as it is; an empty one when there was none."""
        return ExpertRecord() if self._recording is None else self._recording.value()


class _Recording:
    def __init__(self, load_LE: Tensor) -> None:
        self.load_LE = load_LE
        self.peak_L = torch.ones(load_LE.shape[0])
        self.steps = self.tokens = 0
        self.started_s = time.monotonic()
        self.ended_s: float | None = None

    def add(self, load_LE: Tensor, tokens: int) -> None:
        self.load_LE += load_LE
        self.steps += 1
        self.tokens += tokens
        pairs_L = load_LE.sum(-1)
        imbalance_L = load_LE.max(-1).values * load_LE.shape[1] / pairs_L.clamp_min(1)
        # A single decoded token is as imbalanced as can be, and says nothing.
        telling_L = pairs_L >= load_LE.shape[1]
        self.peak_L = torch.where(telling_L, torch.maximum(self.peak_L, imbalance_L), self.peak_L)

    def value(self) -> ExpertRecord:
        ended_s = time.monotonic() if self.ended_s is None else self.ended_s
        return ExpertRecord(
            recording=self.ended_s is None,
            seconds=ended_s - self.started_s,
            steps=self.steps,
            tokens=self.tokens,
            load=tuple(tuple(load_E) for load_E in self.load_LE.tolist()),
            peak_imbalance=tuple(self.peak_L.tolist()),
        )
