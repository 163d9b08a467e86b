"""Weights & Biases: the same numbers and pictures as TensorBoard; a resumed run goes on in the same wandb run."""

from __future__ import annotations

import html
import io
import secrets
from pathlib import Path
from typing import Any

from launch.callbacks.base import Callback
from launch.callbacks.load_window import LoadWindow
from launch.callbacks.tracker_values import eval_values, train_values
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord
from moe.errors import UserError

ID_FILE = "wandb_id.txt"
"""File in the run directory that holds the id of its wandb run."""


class WandbWriter(Callback):
    """One wandb run for one run directory. wandb's own environment variables (WANDB_MODE=offline, ...) hold.

    Args:
        run_dir: the run directory; keeps the wandb id and the local wandb files.
        project: name of the wandb project.

    Raises:
        UserError: the wandb package is not installed.
    """

    def __init__(self, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"track.wandb is on but wandb cannot be imported ({error}):"
                " pip install 'moeyard[track]', or set track.wandb=false"
            ) from error
        self._wandb: Any = wandb
        self._run: Any = None
        self._run_dir = run_dir
        self._project = project
        self._layers: tuple[int, ...] = ()
        self._window = LoadWindow()

    def on_start(self, info: RunInfo) -> None:
        id_file = self._run_dir / ID_FILE
        if id_file.is_file():
            run_id = id_file.read_text(encoding="utf-8").strip()
        else:
            run_id = secrets.token_hex(4)
            id_file.write_text(run_id + "\n", encoding="utf-8")
        self._run = self._wandb.init(
            project=self._project,
            name=self._run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(self._run_dir),
            config={**info.config, "derived": dict(info.derived)},
        )
        # Its own counter must never go back, and a resume from an earlier checkpoint does: "step" is the axis instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._layers = info.moe_layers
        self._window.start(info)

    def on_log(self, record: LogRecord) -> None:
        if self._run is None:
            return
        self._run.log({"step": record.step, **train_values(record, self._layers)})
        self._window.add(record)

    def on_eval(self, record: EvalRecord) -> None:
        if self._run is not None:
            self._run.log({"step": record.step, **eval_values(record)})
            self._log_heatmap()

    def on_sample(self, record: SampleRecord) -> None:
        if self._run is not None:
            text = f"<pre>{html.escape(record.prompt + record.text)}</pre>"
            self._run.log({"step": record.step, "sample": self._wandb.Html(text)})

    def on_end(self) -> None:
        if self._run is not None:
            self._log_heatmap()
            self._run.finish()
            self._run = None

    def _log_heatmap(self) -> None:
        png = self._window.take_png()
        if png is None:
            return
        from PIL import Image

        picture = Image.open(io.BytesIO(png)).convert("RGB")
        self._run.log({"step": self._window.step, "experts/load": self._wandb.Image(picture)})
