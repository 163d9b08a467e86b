"""Writes RUN/heatmaps/step_000100.png: the loads of every expert in every layer since the last picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.callbacks.base import Callback
from launch.records import LogRecord, RunInfo


class HeatmapWriter(Callback):
    """One picture at the first log record at or after every ``interval`` steps, and one at the end.

    Args:
        folder: where the pictures go; made when the first is written.
        interval: steps between pictures; 0: only at the end.
    """

    def __init__(self, folder: Path, interval: int) -> None:
        self._folder = folder
        self._interval = interval
        self._layers: tuple[int, ...] = ()
        self._load_LE: NDArray[np.int64] | None = None
        self._step = 0
        self._drawn_step = 0

    def on_start(self, info: RunInfo) -> None:
        self._layers = info.moe_layers
        self._step = self._drawn_step = info.start_step

    def on_log(self, record: LogRecord) -> None:
        if not record.load_LE:
            return  # a model without MoE layers
        load_LE = np.asarray(record.load_LE, dtype=np.int64)
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE
        self._step = record.step
        # Log and picture intervals need not divide one another: draw when a multiple of the interval has been passed.
        if self._interval and record.step // self._interval > self._drawn_step // self._interval:
            self._draw()

    def on_end(self) -> None:
        if self._load_LE is not None:
            self._draw()

    def _draw(self) -> None:
        from launch.heatmap import draw_load_heatmap

        assert self._load_LE is not None
        since = f"expert load, training steps {self._drawn_step + 1:,} to {self._step:,}"
        png = draw_load_heatmap(self._load_LE, title=since, layers=self._layers)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{self._step:06d}.png"
        partial = path.with_suffix(".partial")
        partial.write_bytes(png)
        os.replace(partial, path)
        self._load_LE, self._drawn_step = None, self._step
