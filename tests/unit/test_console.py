"""What is printed is what was recorded: every number of a log line, the log file, no colours outside a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launch.callbacks.console import ConsoleLog, format_duration, format_log
from launch.callbacks.metrics_file import MetricsFile
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord

pytestmark = pytest.mark.unit

INFO = RunInfo(
    name="demo",
    run_dir=Path("runs/demo"),
    steps=200,
    start_step=0,
    world_size=2,
    tokens_per_step=64,
    num_experts=2,
    moe_layers=(1,),
    derived={"parameters": "1,000 (500 active per token)"},
    config={"run": {"name": "demo"}},
)
RECORD = LogRecord(
    step=50,
    loss=3.21449,
    aux={"balance": 1.02},
    gate={},
    lr=0.0021,
    grad_norm=0.817,
    tokens_per_s=12345.6,
    tokens_seen=3200,
    elapsed_s=2.5,
    eta_s=75.4,
    imbalance=1.184,
    dead_expert_fraction=0.0,
    dropped_fraction=0.0042,
    memory_gib=0.513,
    load_LE=[[30, 34]],
    phase_s={"forward": 0.01},
)


def test_log_line_carries_every_promised_number() -> None:
    assert format_log(RECORD, 200) == (
        "step 50/200  25%  loss 3.2145  gnorm 0.82  lr 2.10e-03  12,346 tok/s  imb 1.18  drop 0.4%"
        "  mem 0.51 GiB  eta 1m15s"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3700, "1h01m"), (-3, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_plain_text_without_a_terminal_and_the_same_in_the_log_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = ConsoleLog(tmp_path / "log.txt", quiet=False, stream=stream)
    console.on_start(INFO)
    console.on_log(RECORD)
    console.on_eval(EvalRecord(50, 2.0, 1.5, 100, 190, 0.1, [[1, 2]], final=True))
    console.on_sample(SampleRecord(50, "To be", ", or\nnot [bold]"))
    console.on_message("resumed")
    console.on_end()
    printed, logged = stream.getvalue(), (tmp_path / "log.txt").read_text()
    assert "\x1b" not in printed
    for text in (
        format_log(RECORD, 200),
        "final validation: 1.5000 bits per byte",
        "| To be, or",
        "| not [bold]",
        "resumed",
    ):
        assert text in printed, text
        assert text in logged, text
    assert "1,000 (500 active per token)" in printed


def test_quiet_prints_nothing_but_still_logs(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = ConsoleLog(tmp_path / "log.txt", quiet=True, stream=stream)
    console.on_start(INFO)
    console.on_log(RECORD)
    console.on_end()
    assert stream.getvalue() == ""
    assert "loss 3.2145" in (tmp_path / "log.txt").read_text()


def test_metrics_rows_hold_the_records_exactly(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.on_start(INFO)
    metrics.on_log(RECORD)
    metrics.on_checkpoint(50, tmp_path / "step_000050")
    metrics.on_end()
    metrics.on_checkpoint(60, tmp_path / "late")  # a background save that outlives the run must not fail
    start, train, checkpoint = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (start["kind"], start["step"], start["world_size"]) == ("start", 0, 2)
    assert train["loss"] == RECORD.loss
    assert train["load_LE"] == [[30, 34]]
    assert checkpoint == {"kind": "checkpoint", "step": 50, "path": str(tmp_path / "step_000050")}
