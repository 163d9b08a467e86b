"""TensorBoard: scalars, the load heatmap at every evaluation, and samples. View with ``tensorboard --logdir runs``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.callbacks.base import Callback
from launch.callbacks.load_window import LoadWindow
from launch.callbacks.tracker_values import eval_values, train_values
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord
from moe.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter(Callback):
    """Event files of one run. A resumed run hides what was written after the step that it resumes from.

    Args:
        folder: where event files go.

    Raises:
        UserError: the tensorboard package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"track.tensorboard is on but tensorboard cannot be imported ({error}):"
                " pip install tensorboard, or set track.tensorboard=false"
            ) from error
        self._writer_class = SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._layers: tuple[int, ...] = ()
        self._window = LoadWindow()

    def on_start(self, info: RunInfo) -> None:
        purge_step = info.start_step + 1 if info.start_step else None
        self._writer = self._writer_class(str(self._folder), purge_step=purge_step)
        self._layers = info.moe_layers
        self._window.start(info)
        if not info.start_step:
            rows = "".join(f"| {key} | {value} |\n" for key, value in info.derived.items())
            self._writer.add_text("run", f"| what | value |\n|---|---|\n{rows}", 0)

    def on_log(self, record: LogRecord) -> None:
        if self._writer is None:
            return
        for name, value in train_values(record, self._layers).items():
            self._writer.add_scalar(name, value, record.step)
        self._window.add(record)

    def on_eval(self, record: EvalRecord) -> None:
        if self._writer is None:
            return
        for name, value in eval_values(record).items():
            self._writer.add_scalar(name, value, record.step)
        self._add_heatmap(self._writer)
        self._writer.flush()

    def on_sample(self, record: SampleRecord) -> None:
        if self._writer is not None:
            # Indented by four spaces, Markdown shows the text as it is, without reading marks in it.
            text = "\n".join("    " + line for line in (record.prompt + record.text).splitlines())
            self._writer.add_text("sample", text, record.step)

    def on_end(self) -> None:
        if self._writer is not None:
            self._add_heatmap(self._writer)
            self._writer.close()
            self._writer = None

    def _add_heatmap(self, writer: SummaryWriter) -> None:
        png = self._window.take_png()
        if png is None:
            return
        from PIL import Image

        picture_HWC = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        writer.add_image("experts/load", picture_HWC, self._window.step, dataformats="HWC")
