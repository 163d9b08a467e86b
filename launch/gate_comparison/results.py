"""What the runs' metrics say: one :class:`RunResult` each, and one :class:`GateResult` over the seeds of a gate.

Names: L MoE layers, E experts. Imbalance is max / mean load of a layer's experts, a mean over layers: 1 is even.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.gate_comparison.runs import PlannedRun
from launch.heatmap import load_ratio
from launch.report.read_run import RunData, mapping, number, read_run, whole

LATE = 0.75
"""Numbers "in training" are means over the steps after this share of the run, when schedules have ended."""


@dataclass(frozen=True)
class Timeline:
    """A number over the steps of training."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        bits_per_byte: on the whole validation text, routed as text is generated.
        experts_per_token: pairs that were computed, per token, in training; drops do not count.
        imbalance: in training; eval_imbalance on the validation text.
        dead: share of experts that no token was offered to, in the last log interval; dropped: of pairs, in training.
        tokens_per_s: median over log intervals, beside whatever else ran.
        agreement: of the surrogate with the trained gate (Jaccard index); nan for gates that generate text themselves.
        surrogate_imbalance, batch_imbalance: max / mean load on the validation text by the surrogate and by the gate.
    """

    label: str
    seed: int
    folder: Path
    bits_per_byte: float
    experts_per_token: float
    imbalance: float
    eval_imbalance: float
    dead: float
    dropped: float
    tokens_per_s: float
    train_s: float
    tokens: int
    agreement: float = math.nan
    surrogate_imbalance: float = math.nan
    batch_imbalance: float = math.nan
    experts_over_time: Timeline = field(default_factory=lambda: Timeline([], []))
    imbalance_over_time: Timeline = field(default_factory=lambda: Timeline([], []))


@dataclass(frozen=True)
class GateResult:
    """The finished runs of one gate."""

    label: str
    options: Mapping[str, Any]
    runs: Sequence[RunResult]

    def mean(self, value: Callable[[RunResult], float]) -> float:
        """Mean over seeds; nan when there is none."""
        return statistics.fmean(map(value, self.runs)) if self.runs else math.nan

    def spread(self, value: Callable[[RunResult], float]) -> float:
        """Sample standard deviation over seeds; nan for fewer than two."""
        return statistics.stdev(map(value, self.runs)) if len(self.runs) > 1 else math.nan

    def over_time(self, pick: Callable[[RunResult], Timeline]) -> Timeline:
        """Mean over seeds, step by step where all of them have a value."""
        by_step = [dict(zip(t.steps, t.values, strict=True)) for t in map(pick, self.runs)]
        steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
        return Timeline(steps, [statistics.fmean(values[step] for values in by_step) for step in steps])


def collect(gates: Mapping[str, Mapping[str, Any]], runs: Sequence[PlannedRun]) -> list[GateResult]:
    """Results of the gates that have finished runs, lowest mean bits per byte first."""
    found = []
    for label, options in gates.items():
        finished = [read_result(run) for run in runs if run.label == label and run.is_finished()]
        if finished:
            found.append(GateResult(label, options, finished))
    return sorted(found, key=lambda gate: gate.mean(lambda run: run.bits_per_byte))


def read_result(run: PlannedRun) -> RunResult:
    """The result of a finished run, from its metrics file."""
    folder = run.folder()
    assert folder is not None, "not finished"
    data = read_run(folder)
    final = next(row for row in reversed(data.evals) if row.get("final"))
    late = [row for row in data.train if whole(row["step"]) > LATE * data.last_step] or data.train
    surrogate = mapping(final.get("surrogate"))
    experts = _experts_over_time(data, run.config.train.global_batch * run.config.train.seq_len)
    return RunResult(
        label=run.label,
        seed=run.seed,
        folder=folder,
        bits_per_byte=number(final.get("bits_per_byte")),
        experts_per_token=_late_mean(experts, data.last_step),
        imbalance=_mean(late, "imbalance"),
        eval_imbalance=_imbalance(final.get("load_LE")),
        dead=number(late[-1].get("dead_expert_fraction")) if late else math.nan,
        dropped=_mean(late, "dropped_fraction"),
        tokens_per_s=statistics.median(number(row.get("tokens_per_s")) for row in data.train),
        train_s=number(data.train[-1].get("elapsed_s")),
        tokens=whole(data.train[-1].get("tokens_seen")),
        agreement=number(surrogate.get("agreement")),
        surrogate_imbalance=1 + number(surrogate.get("max_vio")),
        batch_imbalance=1 + number(surrogate.get("batch_max_vio")),
        experts_over_time=experts,
        imbalance_over_time=Timeline(
            [whole(row["step"]) for row in data.train], [number(row.get("imbalance")) for row in data.train]
        ),
    )


def _experts_over_time(data: RunData, tokens_per_step: int) -> Timeline:
    """Pairs per token and layer of each log interval."""
    bins = [b for b in data.timeline.bins if b.last_step > b.first_step]
    values = [
        float(b.load_LE.sum()) / ((b.last_step - b.first_step) * tokens_per_step * b.load_LE.shape[0]) for b in bins
    ]
    return Timeline([b.last_step for b in bins], values)


def _late_mean(timeline: Timeline, last_step: int) -> float:
    late = [v for s, v in zip(timeline.steps, timeline.values, strict=True) if s > LATE * last_step]
    return statistics.fmean(late) if late else math.nan


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean over steps: a row stands for as many as its interval has."""
    weights = [whole(row.get("covers_steps")) for row in rows]
    values = [number(row.get(key)) for row in rows]
    return float(np.average(values, weights=weights)) if sum(weights) else math.nan


def _imbalance(load_LE: object) -> float:
    if not isinstance(load_LE, list) or not load_LE:
        return math.nan
    return float(load_ratio(load_LE).max(axis=1).mean())
