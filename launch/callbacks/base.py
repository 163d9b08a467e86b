"""What a callback may see: one method an event, all optional. Only rank 0 has callbacks."""

from __future__ import annotations

from pathlib import Path

from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord


class Callback:
    """Base with empty events; a callback overrides what it needs and must not change what it is given."""

    def on_start(self, info: RunInfo) -> None:
        """Training is about to begin (or to go on, when ``info.start_step`` > 0)."""

    def on_step(self, step: int) -> None:
        """An optimizer step is done; called every step, so it must be cheap."""

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
