"""Loads summed over the log records since the last picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from launch.records import LogRecord, RunInfo


class LoadWindow:
    """Adds up load matrices (layers x experts) and draws them.

    Attributes:
        first_step: steps done when the window began.
        step: steps done at the last record; a picture shows steps first_step + 1 to step.
    """

    def __init__(self) -> None:
        self.first_step = 0
        self.step = 0
        self._layers: tuple[int, ...] = ()
        self._load_LE: NDArray[np.int64] | None = None

    def start(self, info: RunInfo) -> None:
        """Begin where this process begins."""
        self._layers = info.moe_layers
        self.step = self.first_step = info.start_step

    def add(self, record: LogRecord) -> None:
        """Count one record; one of a model without MoE layers adds nothing."""
        self.step = record.step
        if record.load_LE:
            load_LE = np.asarray(record.load_LE, dtype=np.int64)
            self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    def take_png(self) -> bytes | None:
        """The picture of the window, which then begins anew; None when nothing was counted."""
        if self._load_LE is None:
            return None
        from launch.heatmap import draw_load_heatmap

        title = f"expert load, training steps {self.first_step + 1:,} to {self.step:,}"
        png = draw_load_heatmap(self._load_LE, title=title, layers=self._layers)
        self._load_LE, self.first_step = None, self.step
        return png
