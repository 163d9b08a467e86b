"""Reads what a run left behind, however far it came: metrics.jsonl row by row, config, command and environment.

Memory stays bounded by the number of scalar rows: loads are merged into at most 2 x ``MAX_LOAD_BINS`` matrices as they
are read. Names: L MoE layers, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.run_dir import CONFIG_FILE, METRICS_FILE
from moe.errors import UserError

MAX_LOAD_BINS = 96

Row = dict[str, Any]


class ReportError(UserError):
    """There is nothing to report on."""

    exit_code = 2


@dataclass
class LoadBin:
    """Loads summed over the steps first_step + 1 .. last_step."""

    first_step: int
    last_step: int
    load_LE: NDArray[np.int64]


@dataclass
class LoadTimeline:
    """Load matrices in the order of their steps; when they become too many, neighbours are merged."""

    bins: list[LoadBin] = field(default_factory=list)

    def add(self, first_step: int, last_step: int, rows: object) -> None:
        """Append one interval; loads of another shape than those before (or no loads) are left out."""
        try:
            load_LE = np.asarray(rows, dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            return
        if load_LE.ndim != 2 or not load_LE.size or (self.bins and self.bins[0].load_LE.shape != load_LE.shape):
            return
        self.bins.append(LoadBin(first_step, last_step, load_LE))
        if len(self.bins) > 2 * MAX_LOAD_BINS:
            even = self.bins[: len(self.bins) // 2 * 2]
            merged = [
                LoadBin(a.first_step, b.last_step, a.load_LE + b.load_LE)
                for a, b in zip(even[::2], even[1::2], strict=True)
            ]
            self.bins = merged + self.bins[len(even) :]

    def drop_after(self, step: int) -> None:
        """Forget what a resume from ``step`` trains again."""
        self.bins = [b for b in self.bins if b.last_step <= step]


@dataclass
class RunData:
    """A run as its files tell it.

    Attributes:
        start: the newest start row; empty when there is none.
        starts: step at which each process began; more than one after resumes.
        train: train rows without loads, ordered by step, each with ``covers_steps``: how many steps it averages over.
        broken_rows: lines that are no JSON object, or have no step (a kill can cut the last one short).
    """

    path: Path
    start: Row = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    timeline: LoadTimeline = field(default_factory=LoadTimeline)
    broken_rows: int = 0
    config_text: str = ""
    config: Row = field(default_factory=dict)
    command: str = ""
    environment: Row = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((whole(row.get("step")) for row in (*self.train, *self.evals)), default=0)

    @property
    def steps(self) -> int:
        """Steps that the run was to have; 0 when not known."""
        return whole(self.start.get("steps"))


def read_run(path: Path) -> RunData:
    """Everything that the run directory ``path`` tells.

    Raises:
        ReportError: it is no run directory.
    """
    if not path.is_dir():
        raise ReportError(f"{path} is not a folder; give the run directory, for example runs/tiny-20250101-120000")
    if not (path / METRICS_FILE).is_file() and not (path / CONFIG_FILE).is_file():
        raise ReportError(f"{path} is not a run directory: it has neither {METRICS_FILE} nor {CONFIG_FILE}")
    run = RunData(path, config_text=_text(path / CONFIG_FILE), command=_text(path / "command.txt").strip())
    run.environment = _json_object(_text(path / "env.json"))
    run.config = _yaml_object(run.config_text)
    if (path / METRICS_FILE).is_file():
        with (path / METRICS_FILE).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.strip():
                    _add_line(run, line)
    return run


def number(value: object) -> float:
    """``value`` as a float, nan when it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def whole(value: object) -> int:
    """``value`` as an int, 0 when it is no finite number."""
    return int(number(value)) if math.isfinite(number(value)) else 0


def mapping(value: object) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _add_line(run: RunData, line: str) -> None:
    row = _json_object(line)
    kind = row.get("kind")
    step = whole(row.get("step"))
    if not row or (kind in ("train", "eval") and not math.isfinite(number(row.get("step")))):
        run.broken_rows += 1
    elif kind == "start":
        begin = whole(row.get("start_step"))
        run.start = row
        run.starts.append(begin)
        run.train = [r for r in run.train if whole(r["step"]) <= begin]
        run.evals = [r for r in run.evals if whole(r.get("step")) <= begin]
        run.samples = [r for r in run.samples if whole(r.get("step")) <= begin]
        run.timeline.drop_after(begin)
    elif kind == "train":
        # Loads are counted on across a resume, times begin anew with the process, which may be inside an interval.
        logged = whole(run.train[-1]["step"]) if run.train else 0
        row["step"] = step
        row["covers_steps"] = max(1, step - max(logged, run.starts[-1] if run.starts else 0))
        run.timeline.add(logged, step, row.pop("load_LE", None))
        run.train.append(row)
    elif kind == "eval":
        run.evals.append(row)
    elif kind == "sample":
        run.samples.append(row)
    elif kind == "checkpoint":
        run.checkpoints.append(row)
    elif kind == "message":
        run.messages.append(str(row.get("text", "")))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json_object(text: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _yaml_object(text: str) -> Row:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # the page shows the text all the same
    return value if isinstance(value, dict) else {}
