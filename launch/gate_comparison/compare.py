"""The whole comparison: plan, train, measure, report. Calling it again goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import TrainConfig
from launch.data import prepare_data
from launch.gate_comparison.gate_cost import measure_gates
from launch.gate_comparison.progress import Progress
from launch.gate_comparison.report import Report, write_reports
from launch.gate_comparison.results import collect
from launch.gate_comparison.runs import PlannedRun, check_same_options, only_one, plan_runs
from launch.gate_comparison.training import default_jobs, train_all
from launch.gate_comparison.variants import Variants


@dataclass(frozen=True)
class Comparison:
    """What has come of it: the pages, and why by the name of each run that failed."""

    html: Path
    markdown: Path
    failures: dict[str, str]


def compare(
    config: TrainConfig, variants: Variants, *, seeds: int, out: Path, command: Sequence[str], jobs: int | None = None
) -> Comparison:
    """Train every variant with every seed for equal tokens and write ``out/report.html``, ``.md`` and ``results.json``.

    Args:
        config: what all runs share; its gate counts for nothing here.
        command: what a user typed, for the report.
        jobs: processes side by side; None: one a core, or a GPU.

    Raises:
        ConfigError: the runs cannot be trained, or ``out`` holds runs of other options.
        RunDirError: another process works in ``out``.
        KeyboardInterrupt: interrupted; everything is saved, and what is finished is reported.
    """
    planned = plan_runs(config, variants.gates, seeds, out)
    jobs = min(jobs or default_jobs(), len(planned))
    with only_one(out):
        check_same_options(planned, out)
        prepare_data(config.data, seq_len=config.train.seq_len, progress=True)  # once, before processes want it
        failures: dict[str, str] = {}
        try:
            with Progress(len(planned), config.train.steps) as progress:
                failures = train_all(planned, out, jobs, progress)
        except KeyboardInterrupt:
            _report(config, variants, planned, failures, out, command, jobs, with_costs=False)
            raise
        html, markdown = _report(config, variants, planned, failures, out, command, jobs, with_costs=True)
    return Comparison(html, markdown, failures)


def _report(
    config: TrainConfig,
    variants: Variants,
    planned: Sequence[PlannedRun],
    failures: dict[str, str],
    out: Path,
    command: Sequence[str],
    jobs: int,
    *,
    with_costs: bool,
) -> tuple[Path, Path]:
    gates = collect(variants.gates, planned)
    costs = measure_gates(gates) if gates and with_costs else {}
    unfinished = [run.name for run in planned if run.name not in failures and not run.is_finished()]
    return write_reports(
        Report(
            config=config,
            gates=gates,
            costs=costs,
            left_out=variants.left_out,
            failures=failures,
            unfinished=unfinished,
            seeds=len({run.seed for run in planned}),
            jobs=jobs,
            command=list(command),
        ),
        out,
    )
