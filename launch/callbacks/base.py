"""What a callback may see: one method an event, all optional. Only rank 0 has callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord


class Callback:
    """Base with empty events; a callback overrides what it needs and must not change what it is given."""

    def on_start(self, info: RunInfo) -> None:
        """Training is about to begin (or to go on, when ``info.start_step`` > 0)."""

    def on_step(self, step: int) -> None:
        """An optimizer step is done; called every step, so it must be cheap."""

    def on_loads(self, step: int, count_LWE: NDArray[np.int64]) -> None:
        """With track.load_trace, every step: (L, W, E) rows that each rank had for each expert of each layer."""

    def on_step_trace(self, step: int, trace: dict[str, Any]) -> None:
        """With track.chrome_trace_step, once: a trace in Chrome's format."""

    def on_log(self, record: LogRecord) -> None:
        """A log interval is over."""

    def on_eval(self, record: EvalRecord) -> None:
        """An evaluation is done."""

    def on_sample(self, record: SampleRecord) -> None:
        """A sample was generated."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_message(self, text: str) -> None:
        """Something worth one line happened (a resume, an interrupt, a fallback and why)."""

    def on_end(self) -> None:
        """Training is over, normally or by interrupt."""


class CallbackList(Callback):
    """Passes each event to several callbacks, in order.

    A callback that fails (a full disk, a tracker's server) is reported once on stderr and costs only what it would have
    written: training goes on, and it is asked again at the next event.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = list(callbacks)
        self._reported: set[int] = set()

    def on_start(self, info: RunInfo) -> None:
        self._tell(lambda callback: callback.on_start(info))

    def on_step(self, step: int) -> None:
        self._tell(lambda callback: callback.on_step(step))

    def on_loads(self, step: int, count_LWE: NDArray[np.int64]) -> None:
        self._tell(lambda callback: callback.on_loads(step, count_LWE))

    def on_step_trace(self, step: int, trace: dict[str, Any]) -> None:
        self._tell(lambda callback: callback.on_step_trace(step, trace))

    def on_log(self, record: LogRecord) -> None:
        self._tell(lambda callback: callback.on_log(record))

    def on_eval(self, record: EvalRecord) -> None:
        self._tell(lambda callback: callback.on_eval(record))

    def on_sample(self, record: SampleRecord) -> None:
        self._tell(lambda callback: callback.on_sample(record))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._tell(lambda callback: callback.on_checkpoint(step, path))

    def on_message(self, text: str) -> None:
        self._tell(lambda callback: callback.on_message(text))

    def on_end(self) -> None:
        self._tell(lambda callback: callback.on_end())

    def _tell(self, event: Callable[[Callback], None]) -> None:
        for index, callback in enumerate(self._callbacks):
            try:
                event(callback)
            except Exception as error:
                if index not in self._reported:
                    self._reported.add(index)
                    what = f"{type(callback).__name__} failed: {type(error).__name__}: {error}"
                    print(f"warning: {what}; training goes on without what it writes", file=sys.stderr, flush=True)
