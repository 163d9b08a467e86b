"""Where a run's numbers about experts over ranks go: log line, metrics.jsonl, trackers, loads.trace; and options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.callbacks.base import CallbackList
from launch.callbacks.console import format_log
from launch.callbacks.load_trace_writer import LoadTraceWriter
from launch.callbacks.metrics_file import MetricsFile
from launch.callbacks.tracker_values import train_values
from launch.records import LogRecord, RunInfo
from parallel.engine_metrics import EngineMetrics
from parallel.load_trace import TraceReader
from tests.small_run import config

pytestmark = pytest.mark.unit

ENGINE = EngineMetrics(
    steps=10,
    imbalance_before_L=[2.0, 1.5],
    imbalance_after_L=[1.25, 1.0],
    copies_L=[3.0, 4.5],
    sent_bytes={"spAG": 2.0**21, "spRS": 2.0**20, "tokens": 2.0**22, "counts": 1024.0, "owners": 0.0},
    copies_hidden_s=0.03,
    copies_exposed_s=0.01,
    tokens_waited_s=0.2,
    copy_peak_bytes=2**29,
)
RECORD = LogRecord(
    50, 3.0, {}, {}, 1e-3, 1.0, 900.0, 640, 1.0, 2.0, 2.5, 0.0, 0.0, 0.25, [[3, 1], [2, 2]], {"data": 0.1}, ENGINE
)  # fmt: skip


def info(run_dir: Path, start_step: int = 0, world_size: int = 2) -> RunInfo:
    return RunInfo("r", run_dir, 40, start_step, world_size, 64, 4, (0, 1, 2), {}, {})


def test_the_log_line_tells_how_level_ranks_became_and_what_was_hidden() -> None:
    assert "  imb 2.50  ranks 1.75->1.12  hid 75%  drop" in format_log(RECORD, 100)
    still = replace(RECORD, engine=replace(ENGINE, copies_hidden_s=0.0, copies_exposed_s=0.0))
    assert "  ranks 1.75->1.12  drop" in format_log(still, 100)
    assert "ranks" not in format_log(replace(RECORD, engine=None), 100)


def test_a_row_of_metrics_has_them_only_where_there_is_an_engine(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.on_start(info(tmp_path))
    metrics.on_log(RECORD)
    metrics.on_log(replace(RECORD, engine=None))
    metrics.on_end()
    _, spread, local = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert EngineMetrics(**spread["engine"]) == ENGINE
    assert "engine" not in local


def test_pain_12_trackers_get_a_bounded_set_of_scalars() -> None:
    values = train_values(RECORD, (0, 1))
    assert {name: value for name, value in values.items() if name.startswith("ranks/")} == {
        "ranks/imbalance_before": 1.75,
        "ranks/imbalance_after": 1.125,
        "ranks/copies": 7.5,
        "ranks/copy_peak_gib": 0.5,
        "ranks/copies_hidden_s": 0.03,
        "ranks/copies_exposed_s": 0.01,
        "ranks/tokens_waited_s": 0.2,
        "ranks/sent_mib/spAG": 2.0,
        "ranks/sent_mib/spRS": 1.0,
        "ranks/sent_mib/tokens": 4.0,
        "ranks/sent_mib/counts": 2.0**-10,
        "ranks/sent_mib/owners": 0.0,
    }
    assert not [name for name in train_values(replace(RECORD, engine=None), (0, 1)) if name.startswith("ranks/")]


def counts(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 99, (3, 2, 4))


def test_a_resumed_run_continues_its_load_trace(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    for start, stop in ((0, 5), (3, 7)):
        writer = LoadTraceWriter(path, config())
        writer.on_start(info(tmp_path, start))
        for step in range(start + 1, stop + 1):
            writer.on_loads(step, counts(step + 100 * start))
        writer.on_end()
    reader = TraceReader(path)
    assert (reader.header.shape, reader.header.experts_per_token) == ((3, 2, 4), 2)
    assert (reader.header.width, reader.header.expert_hidden) == (64, 96)
    read = dict(reader)
    assert list(read) == [1, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(read[3], counts(3))
    assert np.array_equal(read[4], counts(304)), "what is trained again replaces what was"


def test_a_trace_of_other_ranks_is_left_alone_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loads.trace"
    for world_size in (2, 3):
        callbacks = CallbackList([LoadTraceWriter(path, config())])
        callbacks.on_start(info(tmp_path, world_size=world_size))
        callbacks.on_loads(1, np.ones((3, world_size, 4), dtype=np.int64))
        callbacks.on_end()
    assert TraceReader(path).header.world_size == 2
    assert len(list(TraceReader(path))) == 1
    assert "loads.trace was recorded as" in capsys.readouterr().err


def test_options_that_could_record_nothing_are_refused() -> None:
    assert config(track__load_trace=True, parallel__mode="local").check() == []
    assert config(track__chrome_trace_step=3, parallel__mode="ep").check() == []
    (local,) = config(track__chrome_trace_step=3, parallel__mode="local").check()
    assert local.startswith("track.chrome_trace_step: ")
    assert "parallel.mode=local" in local
    (late,) = config(track__chrome_trace_step=9, train__steps=8, parallel__mode="ep").check()
    assert late == "track.chrome_trace_step: step 9 never comes, train.steps is 8"
