"""RUN/step_N.trace.json: one step on all ranks in Chrome's trace format, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launch.callbacks.base import Callback


class StepTraceWriter(Callback):
    """Writes a trace when it is told one.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_step_trace(self, step: int, trace: dict[str, Any]) -> None:
        path = self._folder / f"step_{step}.trace.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(trace), encoding="utf-8")
        os.replace(partial, path)
