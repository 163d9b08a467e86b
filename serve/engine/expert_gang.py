"""A model whose experts are spread over processes: what the engine needs of them, and when it asks for what.

The engine's process is rank 0 and has everything but most experts. ``parallel`` implements the protocol, ``launch``
starts the processes; the engine knows neither.

Shape suffixes: L MoE layers, E experts, W processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.errors import UserError
from moe.transformer import Transformer
from serve.engine.experts import ExpertCounts

LOG = logging.getLogger("moeyard.serve.engine")


class ExpertGang(Protocol):
    """Called by the engine's thread between passes, but for ``describe`` and ``close``.

    Every method but these two raises when a process is gone or does not answer in time; the engine then is dead.
    """

    def attach(self, model: Transformer) -> None:
        """Spread the experts of a whole model, whose weights the other processes have already."""
        ...

    def swap(self, model: Transformer) -> None:
        """Spread a whole model of the same shape whose weights the other processes do not have."""
        ...

    def rows(self) -> Tensor:
        """(L, W) int64 rows that each process has computed since the start."""
        ...

    def rebalance(self, load_LE: Tensor) -> Mapping[str, Any]:
        """Hold experts by these (L, E) loads from the next pass on; a summary in JSON values, with "changed"."""
        ...

    def check(self) -> None:
        """Raise if a process is gone. Bounded in time."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Placement, rows and imbalance in JSON values. From any thread."""
        ...

    def close(self) -> None:
        """End the other processes. May be called again, and from any thread once no pass runs."""
        ...


@dataclass(frozen=True)
class RebalancePolicy:
    """When experts are moved.

    Attributes:
        every_steps: passes between two looks at the imbalance; 0: experts are moved only when somebody asks.
        threshold: the imbalance from which it is worth it.
        min_tokens: positions of the passes since the last look, below which loads say too little.

    Raises:
        UserError: a value out of range.
    """

    every_steps: int = 256
    threshold: float = 1.15
    min_tokens: int = 256

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 0), ("threshold", 1), ("min_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"rebalance.{name} must be at least {least}, got {getattr(self, name)}")


# How often an idle engine looks after the other processes.
CHECK_S = 1.0


class GangKeeper:
    """Looks after a gang for the engine: signs of life while idle, other placements while busy.

    Attributes:
        gang: the gang.
        last_summary: what came of the last rebalance, for people.
    """

    def __init__(self, gang: ExpertGang, policy: RebalancePolicy | None = None) -> None:
        self.gang, self.policy = gang, policy or RebalancePolicy()
        self.last_summary: Mapping[str, Any] | None = None
        self._checked_s = 0.0
        self._passes = 0
        self._seen: _Look | None = None

    def after_pass(self, counts: ExpertCounts, tokens: int) -> None:
        """A pass is over. ``counts``, ``tokens``: experts' work and positions since the engine's start."""
        self._checked_s = time.monotonic()  # every worker that had rows has just shown that it lives
        self._passes += 1
        if not self.policy.every_steps or self._passes < self.policy.every_steps:
            return
        if tokens - (self._seen.tokens if self._seen else 0) < self.policy.min_tokens:
            return
        rows_LW = self.gang.rows()
        if imbalance_of(rows_LW - self._seen.rows_LW if self._seen else rows_LW) >= self.policy.threshold:
            self.rebalance(counts, tokens)
        else:
            self._look(counts, tokens)

    def rebalance(self, counts: ExpertCounts, tokens: int) -> Mapping[str, Any]:
        """By the loads since the last look; by all loads if there are none since."""
        before_LE = self._seen.load_LE if self._seen else None
        seen = self._look(counts, tokens)
        since_LE = seen.load_LE if before_LE is None else seen.load_LE - before_LE
        self.last_summary = self.gang.rebalance(since_LE if since_LE.any() else seen.load_LE)
        LOG.info("experts rebalanced: %s", self.last_summary)
        return self.last_summary

    def _look(self, counts: ExpertCounts, tokens: int) -> _Look:
        self._passes = 0
        self._seen = _Look(tokens, torch.tensor(counts.total(), dtype=torch.int64), self.gang.rows())
        return self._seen

    def while_idle(self) -> None:
        """About once a second a sign of life of every process; nothing in between."""
        now_s = time.monotonic()
        if now_s - self._checked_s >= CHECK_S:
            self.gang.check()
            self._checked_s = time.monotonic()


@dataclass(frozen=True)
class _Look:
    """The counters when the imbalance was last looked at."""

    tokens: int
    load_LE: Tensor
    rows_LW: Tensor


def imbalance_of(rows_LW: Tensor) -> float:
    """The busiest process's rows over the mean's, layers added up, as each layer waits for all; 1.0 without rows."""
    total = int(rows_LW.sum())
    return int(rows_LW.amax(1).sum()) * rows_LW.shape[1] / total if total else 1.0
