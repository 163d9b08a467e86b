"""The trace file's format, and how a recorder names the time between exchanges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.callbacks.step_trace_writer import StepTraceWriter
from parallel import chrome_trace as module
from parallel.chrome_trace import StepRecorder, TraceEvent, chrome_trace
from parallel.collectives import Handle

pytestmark = pytest.mark.unit


class Clock:
    """Stands in for ``time``: moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s + 5000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def named(recorder: StepRecorder, track: str = "step") -> list[tuple[str, float, float, int | None]]:
    return [
        (e.name, round(e.begin_s - 5100, 6), round(e.end_s - 5100, 6), e.sent_bytes)
        for e in recorder.events
        if e.track == track
    ]


def exchange(recorder: StepRecorder, clock: Clock, label: str, begin_s: float, end_s: float) -> None:
    clock.now_s = 100 + end_s
    recorder.exchanged(label, 100 + begin_s, 7)


def test_time_between_exchanges_is_named_by_what_follows(clock: Clock) -> None:
    recorder = StepRecorder()
    clock.now_s = 101
    recorder.forward_begins()
    exchange(recorder, clock, "layer 0 counts", 2, 3)
    exchange(recorder, clock, "layer 0 dispatch", 3, 4)
    clock.now_s = 105
    recorder.waited("layer 0 wait for copies", 104.5, before="layer 0 place rows")
    exchange(recorder, clock, "layer 0 combine", 6, 7)
    clock.now_s = 108
    recorder.backward_begins()
    exchange(recorder, clock, "layer 0 combine", 9, 9.5)  # computed again
    exchange(recorder, clock, "layer 0 gradient of combine", 10, 11)
    exchange(recorder, clock, "layer 0 gradient of dispatch", 12, 13)
    clock.now_s = 114
    recorder.backward_ends()
    exchange(recorder, clock, "layer 0 new owners", 15, 16)
    assert named(recorder) == [
        ("data", 0, 1, None),
        ("layer 0 attention, gate", 1, 2, None),
        ("layer 0 counts", 2, 3, 7),
        ("layer 0 dispatch", 3, 4, 7),
        ("layer 0 place rows", 4, 4.5, None),
        ("layer 0 wait for copies", 4.5, 5, None),
        ("layer 0 experts", 5, 6, None),
        ("layer 0 combine", 6, 7, 7),
        ("head, loss", 7, 8, None),
        ("layer 0 experts again", 8, 9, None),
        ("layer 0 combine again", 9, 9.5, 7),
        ("head backward", 9.5, 10, None),
        ("layer 0 gradient of combine", 10, 11, 7),
        ("layer 0 experts backward", 11, 12, None),
        ("layer 0 gradient of dispatch", 12, 13, 7),
        ("layer 0 attention backward", 13, 14, None),
        ("optimizer", 14, 15, None),
        ("layer 0 new owners", 15, 16, 7),
    ]


def test_collectives_have_a_track_of_their_own(clock: Clock) -> None:
    recorder = StepRecorder()
    nothing = Handle("spAG layer 1", 0, 101.0, began_s=101.0, ended_s=101.0)
    recorder.collectives([Handle("spAG layer 0", 64, 100.5, began_s=101.0, ended_s=103.0), nothing])
    assert named(recorder, "copies") == [("spAG layer 0", 1, 3, 64)]
    assert named(recorder) == []


def test_the_file_has_a_process_for_each_rank_and_begins_at_zero(tmp_path: Path) -> None:
    events = [
        [
            TraceEvent("step", "layer 0 experts", 50.002, 50.0045),
            TraceEvent("copies", "spAG layer 1", 50.001, 50.003, 9),
        ],
        [TraceEvent("step", "layer 0 dispatch", 50.0, 50.001, 0)],
        [],
    ]
    StepTraceWriter(tmp_path).on_step_trace(7, chrome_trace(events))
    trace = json.loads((tmp_path / "step_7.trace.json").read_text())
    rows = [row for row in trace["traceEvents"] if row["ph"] == "X"]
    assert [(row["pid"], row["tid"], row["name"], row["ts"], row["dur"], row.get("args")) for row in rows] == [
        (0, 0, "layer 0 experts", 2000.0, 2500.0, None),
        (0, 1, "spAG layer 1", 1000.0, 2000.0, {"sent_bytes": 9}),
        (1, 0, "layer 0 dispatch", 0.0, 1000.0, {"sent_bytes": 0}),
    ]
    names = {
        (row["pid"], row.get("tid")): row["args"]["name"]
        for row in trace["traceEvents"]
        if row["name"] in ("process_name", "thread_name")
    }
    assert names[0, None] == "rank 0"
    assert names[2, None] == "rank 2"
    assert (names[1, 0], names[1, 1]) == ("step", "copies")
    assert not list(tmp_path.glob("*.partial"))
