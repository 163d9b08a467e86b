"""The callbacks that a config asks for, in the order in which they are told."""

from __future__ import annotations

from pathlib import Path

from launch.callbacks.base import Callback, CallbackList
from launch.callbacks.console import ConsoleLog
from launch.callbacks.metrics_file import MetricsFile
from launch.config import TrainConfig
from launch.run_dir import LOAD_TRACE_FILE, METRICS_FILE


def build_callbacks(config: TrainConfig, run_dir: Path, quiet: bool) -> CallbackList:
    """Callbacks of one run; trackers are imported only when they are used.

    Raises:
        UserError: a tracker is asked for whose package is not installed.
    """
    callbacks: list[Callback] = [MetricsFile(run_dir / METRICS_FILE), ConsoleLog(run_dir / "log.txt", quiet)]
    if config.track.tensorboard:
        from launch.callbacks.tensorboard_writer import TensorBoardWriter

        callbacks.append(TensorBoardWriter(run_dir / "tensorboard"))
    if config.track.wandb:
        from launch.callbacks.wandb_writer import WandbWriter

        callbacks.append(WandbWriter(run_dir, config.track.wandb_project))
    if config.track.load_trace:
        from launch.callbacks.load_trace_writer import LoadTraceWriter

        callbacks.append(LoadTraceWriter(run_dir / LOAD_TRACE_FILE, config))
    if config.track.chrome_trace_step is not None:
        from launch.callbacks.step_trace_writer import StepTraceWriter

        callbacks.append(StepTraceWriter(run_dir))
    from launch.callbacks.heatmap import HeatmapWriter

    callbacks.append(HeatmapWriter(run_dir / "heatmaps", config.track.heatmap_interval))
    return CallbackList(callbacks)
