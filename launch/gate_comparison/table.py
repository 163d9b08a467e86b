"""What a comparison tells, as text: its columns, notices and headings, the same on the page and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launch.callbacks.console import format_duration
from launch.config import TrainConfig
from launch.gate_comparison.gate_cost import REFERENCE, GateCost
from launch.gate_comparison.results import GateResult, RunResult

VARIES = 0.05
"""Experts per token are shown over time where they change by more than this share."""


@dataclass(frozen=True)
class Report:
    """Everything that a report tells; ``unfinished`` and ``failures`` name runs."""

    config: TrainConfig
    gates: Sequence[GateResult]
    costs: Mapping[str, GateCost]
    left_out: Mapping[str, str]
    failures: Mapping[str, str]
    unfinished: Sequence[str]
    seeds: int
    jobs: int
    command: Sequence[str]

    @property
    def tokens(self) -> int:
        """Tokens that every run trains on."""
        train = self.config.train
        return train.steps * train.global_batch * train.seq_len


@dataclass(frozen=True)
class Column:
    """One column of the table: its heading, what it means, and its text for a gate."""

    title: str
    meaning: str
    text: Callable[[GateResult], str]


def columns(report: Report) -> list[Column]:
    """The columns, without those that have nothing to say about any gate."""

    def mean(pick: Callable[[RunResult], float], form: str) -> Callable[[GateResult], str]:
        return lambda gate: formatted(gate.mean(pick), form)

    def per_byte(gate: GateResult) -> str:
        spread = gate.spread(lambda run: run.bits_per_byte)
        return formatted(gate.mean(lambda run: run.bits_per_byte), ".4f") + (
            f" ± {spread:.4f}" if math.isfinite(spread) else ""
        )

    def cost(gate: GateResult) -> str:
        found = report.costs.get(gate.label)
        return f"{found.ms:.2f} ({found.ratio:.1f}x)" if found else ""

    reference = next((c.reference for c in report.costs.values()), REFERENCE)
    found = [
        Column("bits per byte", "on the whole validation text, mean ± standard deviation over seeds", per_byte),
        Column(
            "experts per token",
            "computed in the last quarter of training; drops and zero-computation experts do not count",
            mean(lambda run: run.experts_per_token, ".2f"),
        ),
        Column(
            "imbalance",
            "max / mean load in the last quarter of training, mean over layers and log intervals; 1 is even",
            mean(lambda run: run.imbalance, ".2f"),
        ),
        Column(
            "at evaluation",
            "the same on the validation text, routed as text is generated",
            mean(lambda run: run.eval_imbalance, ".2f"),
        ),
        Column("dead", "experts without a token in the last log interval", mean(lambda run: run.dead, ".1%")),
        Column("dropped", "pairs over capacity in the last quarter", mean(lambda run: run.dropped, ".1%")),
        Column(
            "agreement",
            "of the surrogate that generates text with the gate as trained (Jaccard index of the pairs)",
            mean(lambda run: run.agreement, ".2f"),
        ),
        Column(
            "tokens/s",
            "of a whole training process, "
            + ("alone" if report.jobs == 1 else f"{report.jobs} side by side")
            + " on this machine",
            mean(lambda run: run.tokens_per_s, ",.0f"),
        ),
        Column(
            "gate, ms",
            f"forward and backward of a layer's gate, trained, on a micro-batch and one thread; against {reference}'s",
            cost,
        ),
    ]
    return [column for column in found if any(column.text(gate) for gate in report.gates)]


def title(report: Report) -> str:
    return f"{len(report.gates)} gates on {report.config.run.name}"


def summary(report: Report) -> str:
    """One sentence on what was done."""
    train, model = report.config.train, report.config.model
    runs = [run for gate in report.gates for run in gate.runs]
    took = sum(run.train_s for run in runs)
    return (
        f"{report.tokens:,} tokens each ({train.steps:,} steps of {train.global_batch} x {train.seq_len}), "
        f"{report.seeds} seed{'s' if report.seeds > 1 else ''}, {model.num_moe_layers} MoE layers of "
        f"{model.moe.num_experts} experts; {len(runs)} runs, {format_duration(took)} of training in all."
    )


def notices(report: Report) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = []
    if report.unfinished:
        found.append(
            f"Not finished: {len(report.unfinished)} of the runs are still to do; the same command goes on with them."
        )
    found += [f"Failed: {name}: {why}" for name, why in report.failures.items()]
    if report.gates and len({len(gate.runs) for gate in report.gates}) > 1:
        found.append("Gates have different numbers of finished seeds.")
    if report.seeds < 3:
        found.append(f"{report.seeds} seed{'s say' if report.seeds > 1 else ' says'} little about small differences.")
    return found


def options_text(gate: GateResult) -> str:
    """The options that the variant sets, as one would type them."""

    def flat(options: Mapping[str, object], prefix: str) -> list[str]:
        parts = []
        for key, value in options.items():
            inner = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}={value}"]
            parts += inner
        return parts

    return " ".join(flat(gate.options, "gate."))


def formatted(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def varies(gate: GateResult) -> bool:
    values = gate.over_time(lambda run: run.experts_over_time).values
    return bool(values) and max(values) - min(values) > VARIES * max(values)
