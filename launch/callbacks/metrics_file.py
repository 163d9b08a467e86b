"""metrics.jsonl: everything that happened in a run, one JSON object a line, flushed at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from launch.callbacks.base import Callback
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord


class MetricsFile(Callback):
    """Appends rows ``{"kind": ..., "step": ..., ...}``; field names are those of the records."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_start(self, info: RunInfo) -> None:
        self._file = self._path.open("a", encoding="utf-8")
        row = asdict(info)
        del row["config"]
        self._write("start", {"step": info.start_step, **row, "run_dir": str(info.run_dir)})

    def on_log(self, record: LogRecord) -> None:
        row = asdict(record)
        if record.engine is None:
            del row["engine"]
        self._write("train", row)

    def on_eval(self, record: EvalRecord) -> None:
        self._write("eval", asdict(record))

    def on_sample(self, record: SampleRecord) -> None:
        self._write("sample", asdict(record))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._write("checkpoint", {"step": step, "path": str(path)})

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, kind: str, row: dict[str, object]) -> None:
        if self._file is None:
            return  # a background save can finish after the run has ended
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()
