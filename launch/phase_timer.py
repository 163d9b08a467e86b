"""Where the time of a training loop goes, by named phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall seconds by phase; phases do not nest. On CUDA each phase waits for its kernels when it ends.

    Args:
        device: where the timed work runs.

    Attributes:
        latest: the phase that began last; "start" before any.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self.latest = "start"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block's wall time to ``name``."""
        start, self.latest = time.perf_counter(), name
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and start anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
