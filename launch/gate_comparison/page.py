"""The comparison as one HTML page: the table, every run as a dot, and what changed over time."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from launch.gate_comparison.gate_cost import REFERENCE
from launch.gate_comparison.results import GateResult, RunResult, Timeline
from launch.gate_comparison.table import Report, columns, notices, options_text, summary, title, varies
from launch.report.curves import Chart, DrawnChart, Series, draw
from launch.report.page import source, templates
from launch.run_dir import environment


def render_html(report: Report) -> str:
    """The comparison as one page that needs no other file and no network."""
    pages = templates()
    best, worst = _range(report)
    found = columns(report)
    rows = [
        {
            "label": gate.label,
            "options": options_text(gate),
            "cells": [column.text(gate) for column in found],
            "dots": [_place(run.bits_per_byte, best, worst) for run in gate.runs],
            "mean": _place(gate.mean(lambda run: run.bits_per_byte), best, worst),
        }
        for gate in report.gates
    ]
    return pages.get_template("gate_comparison/page.html").render(
        style=source(pages, "report/page.css"),
        script=source(pages, "report/page.js"),
        title=title(report),
        summary=summary(report),
        notices=notices(report),
        columns=found,
        rows=rows,
        best=f"{best:.3f}",
        worst=f"{worst:.3f}",
        experts=_charts(report, "experts per token", lambda run: run.experts_over_time, varies),
        imbalance=_charts(report, "max / mean load", lambda run: run.imbalance_over_time, lambda gate: True),
        left_out=report.left_out,
        command=shlex.join(report.command),
        machine=environment(),
    )


def _charts(
    report: Report, unit: str, pick: Callable[[RunResult], Timeline], wanted: Callable[[GateResult], bool]
) -> list[DrawnChart]:
    """A small chart for each gate, with the reference gate beside it."""
    reference = next((gate for gate in report.gates if gate.label == REFERENCE), None)
    drawn = []
    for gate in sorted(filter(wanted, report.gates), key=lambda gate: gate.label):
        shown = [gate, reference] if reference is not None and reference is not gate else [gate]
        series = [Series(g.label, t.steps, t.values) for g in shown for t in [g.over_time(pick)]]
        chart = draw(Chart(gate.label, unit, series, floor=1.0), report.config.train.steps)
        if chart is not None:
            drawn.append(chart)
    return drawn


def _range(report: Report) -> tuple[float, float]:
    """Bits per byte at the left and the right end of the strip; runs that went astray end at its right."""
    values = sorted(run.bits_per_byte for gate in report.gates for run in gate.runs)
    if not values:
        return 0.0, 1.0
    middle = values[len(values) // 2]
    low, high = values[0], min(values[-1], middle + 3 * (middle - values[0]) + 1e-3)
    return low, max(high, low + 1e-3)


def _place(value: float, low: float, high: float) -> float:
    """Per cent of the strip from the left."""
    return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 1)
