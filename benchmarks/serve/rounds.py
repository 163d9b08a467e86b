"""Sides that take turns, so that a machine whose speed changes by the minute treats them alike; and how to tell it."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls every side once a round, in turning order; the values of each side."""
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            values[name].append(sides[name]())
    return values


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median with the smallest and the largest."""
    return f"{statistics.median(values):,.{digits}f} [{min(values):,.{digits}f}-{max(values):,.{digits}f}]"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round: values of one round saw the same machine."""
    return [a / b for a, b in zip(values, base, strict=True)]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """One JSON object with the machine in it."""
    if path is not None:
        path.write_text(json.dumps({**machine(), **result}) + "\n", encoding="utf-8")
