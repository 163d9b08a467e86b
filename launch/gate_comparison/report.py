"""Writes the comparison: a page, Markdown, and JSON with every number."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from launch.gate_comparison.page import render_html
from launch.gate_comparison.results import Timeline
from launch.gate_comparison.table import Report, columns, formatted, notices, options_text, summary, title, varies
from launch.run_dir import environment

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "results.json"


def write_reports(report: Report, out: Path) -> tuple[Path, Path]:
    """Write page, Markdown and JSON; returns where the first two are."""
    texts = {HTML_FILE: render_html(report), MARKDOWN_FILE: render_markdown(report), JSON_FILE: render_json(report)}
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out / name)
    return out / HTML_FILE, out / MARKDOWN_FILE


def render_markdown(report: Report) -> str:
    """The comparison as Markdown."""
    lines = [f"# {title(report)}", "", summary(report), ""]
    lines += [f"**{notice}**\n" for notice in notices(report)]
    found = columns(report)
    if report.gates:
        lines += ["| gate | " + " | ".join(column.title for column in found) + " |", "|---" * (len(found) + 1) + "|"]
        lines += [
            f"| {gate.label} | " + " | ".join(column.text(gate) for column in found) + " |" for gate in report.gates
        ]
        lines += ["", *(f"- **{column.title}**: {column.meaning}" for column in found), ""]
    varying = [gate for gate in report.gates if varies(gate)]
    if varying:
        marks = _quarters(report.config.train.steps)
        lines += ["## Experts per token over time", ""]
        lines += ["| gate | " + " | ".join(f"step {step:,}" for step in marks) + " |", "|---" * (len(marks) + 1) + "|"]
        for gate in varying:
            cells = [formatted(_at(gate.over_time(lambda run: run.experts_over_time), step), ".2f") for step in marks]
            lines.append(f"| {gate.label} | " + " | ".join(cells) + " |")
        lines.append("")
    if report.left_out:
        lines += ["## Left out", "", *(f"- `{name}`: {why}" for name, why in report.left_out.items()), ""]
    lines += ["## Options", "", *(f"- `{gate.label}`: {options_text(gate)}" for gate in report.gates), ""]
    lines += ["```bash", shlex.join(report.command), "```", ""]
    return "\n".join(lines)


def render_json(report: Report) -> str:
    """Every number, with those of each run."""
    gates = [
        {
            "label": gate.label,
            "options": dict(gate.options),
            "cost": asdict(report.costs[gate.label]) if gate.label in report.costs else None,
            "runs": [{**asdict(run), "folder": str(run.folder)} for run in gate.runs],
        }
        for gate in report.gates
    ]
    values = {
        "config": report.config.model_dump(mode="json"),
        "tokens": report.tokens,
        "jobs": report.jobs,
        "command": list(report.command),
        "environment": environment(),
        "gates": gates,
        "left_out": dict(report.left_out),
        "failures": dict(report.failures),
        "unfinished": list(report.unfinished),
    }
    return json.dumps(_finite(values), indent=1) + "\n"


def _quarters(steps: int) -> list[int]:
    return sorted({max(1, round(steps * share)) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)})


def _at(timeline: Timeline, step: int) -> float:
    """The value of the interval that ``step`` lies in."""
    later = [value for at, value in zip(timeline.steps, timeline.values, strict=True) if at >= step]
    return later[0] if later else math.nan


def _finite(value: object) -> object:
    """The same value with None for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
