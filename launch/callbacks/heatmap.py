"""Writes RUN/heatmaps/step_000100.png: the loads of every expert in every layer since the last picture."""

from __future__ import annotations

import os
from pathlib import Path

from launch.callbacks.base import Callback
from launch.callbacks.load_window import LoadWindow
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
        self._window = LoadWindow()

    def on_start(self, info: RunInfo) -> None:
        self._window.start(info)

    def on_log(self, record: LogRecord) -> None:
        self._window.add(record)
        # Log and picture intervals need not divide one another: draw when a multiple of the interval has been passed.
        if self._interval and record.step // self._interval > self._window.first_step // self._interval:
            self._write()

    def on_end(self) -> None:
        self._write()

    def _write(self) -> None:
        png = self._window.take_png()
        if png is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{self._window.step:06d}.png"
        partial = path.with_suffix(".partial")
        partial.write_bytes(png)
        os.replace(partial, path)
