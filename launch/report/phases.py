"""Where the wall time of the training loop went, from the phase times of the train rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.report.read_run import Row, mapping, number, whole

COMPUTE = ("forward", "backward", "optimizer")
"""Phases that are the model's own work."""

ORDER = (*COMPUTE, "reduce", "data", "log", "eval", "sample", "checkpoint")


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    share: float
    """of wall time"""
    ms_per_step: float


@dataclass(frozen=True)
class PhaseTimes:
    """Phases, those of the model first; ``other`` is the wall time that no phase was charged with."""

    phases: list[Phase]
    wall_s: float
    steps: int
    compute_share: float


def phase_times(train: Sequence[Row], tokens_per_step: float) -> PhaseTimes | None:
    """Totals over all train rows; None when no row has phase times.

    A row's wall time is its steps x tokens per step / its tokens per second: the interval that its phases lie in.

    Args:
        train: rows of kind "train" with ``covers_steps``.
        tokens_per_step: global tokens of one optimizer step.
    """
    seconds: dict[str, float] = {}
    wall_s, steps = 0.0, 0
    for row in train:
        phase_s = {name: number(value) for name, value in mapping(row.get("phase_s")).items()}
        wall = whole(row["covers_steps"]) * tokens_per_step / (number(row.get("tokens_per_s")) or math.nan)
        if not phase_s or not math.isfinite(wall):
            continue
        wall_s += wall
        steps += whole(row["covers_steps"])
        for name, value in phase_s.items():
            if math.isfinite(value):
                seconds[name] = seconds.get(name, 0.0) + value * whole(row["covers_steps"])
    if not steps or wall_s <= 0:
        return None
    total = max(wall_s, sum(seconds.values()))
    seconds["other"] = total - sum(seconds.values())
    names = [n for n in ORDER if n in seconds] + sorted(set(seconds) - {*ORDER, "other"}) + ["other"]
    phases = [Phase(n, seconds[n], seconds[n] / total, 1000 * seconds[n] / steps) for n in names]
    return PhaseTimes(phases, total, steps, sum(p.share for p in phases if p.name in COMPUTE))
