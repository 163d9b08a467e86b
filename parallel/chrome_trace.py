"""One training step as a picture in time: what each rank did, and below it what its link carried for copies.

The format is Chrome's trace event format, which chrome://tracing and Perfetto open. Each rank is a process with two
tracks: its step, cut at the events of :mod:`parallel.schedule` and at the exchanges of tokens, and its communicator.
On a GPU the first track shows when work was handed to the device, not when it ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from parallel.collectives import Handle

Track = Literal["step", "copies"]
TRACKS: tuple[Track, ...] = ("step", "copies")
SHORTEST_S = 5e-6
"""Shorter events than this would be invisible and are left out."""

_BEFORE = {
    "counts": "attention, gate",
    "dispatch": "place rows",
    "combine": "experts",
    "gradient of dispatch": "experts backward",
}
"""What a rank computes before an exchange of this name."""


@dataclass(frozen=True)
class TraceEvent:
    """Something that took time on one rank.

    Attributes:
        begin_s, end_s: by the wall clock, so that ranks can be laid side by side.
        sent_bytes: payload that this rank sent in it; None where nothing is sent.
    """

    track: Track
    name: str
    begin_s: float
    end_s: float
    sent_bytes: int | None = None


class StepRecorder:
    """Notes the events of one step on one rank. Times that it is given are of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.events: list[TraceEvent] = []
        self._since_s = time.perf_counter()
        self._wall_s = time.time() - self._since_s
        self._in_backward = False
        self._above = ""  # what backward computes until the next layer's experts are reached

    def forward_begins(self) -> None:
        """A micro-batch begins; what came before, in this step, is no part of a forward or backward pass."""
        self.reached("data")
        self._in_backward = False

    def backward_begins(self) -> None:
        """The loss is known."""
        self.reached("head, loss")
        self._in_backward, self._above = True, "head backward"

    def backward_ends(self) -> None:
        """Gradients of everything are here or on their way."""
        self.reached(self._above)
        self._in_backward = False

    def reached(self, what: str) -> None:
        """Since the last event the rank has computed ``what``."""
        self._fill(what, time.perf_counter())

    def waited(self, what: str, begin_s: float, before: str) -> None:
        """The rank waited from ``begin_s`` till now; until then it computed ``before``."""
        self._fill(before, begin_s)
        self._fill(what, time.perf_counter())

    def exchanged(self, label: str, begin_s: float, sent_bytes: int) -> None:
        """The rank exchanged rows from ``begin_s`` till now; ``label`` is "layer 3 dispatch" and the like."""
        _, number, what = label.split(" ", 2)
        again = " again" if self._in_backward and not what.startswith("gradient") else ""
        if what == "gradient of combine":
            before = self._above
        else:
            before = f"layer {number} {_BEFORE[what]}{again}" if what in _BEFORE else "optimizer"
        self._fill(before, begin_s)
        self._fill(label + again, time.perf_counter(), sent_bytes)
        if what == "gradient of dispatch":
            self._above = f"layer {number} attention backward"

    def collectives(self, handles: Iterable[Handle]) -> None:
        """What the communicator has done."""
        for handle in handles:
            self._add("copies", handle.label, handle.began_s, handle.ended_s, handle.sent_bytes)

    def _fill(self, name: str, until_s: float, sent_bytes: int | None = None) -> None:
        self._add("step", name, self._since_s, until_s, sent_bytes)
        self._since_s = until_s

    def _add(self, track: Track, name: str, begin_s: float, end_s: float, sent_bytes: int | None) -> None:
        if end_s - begin_s >= SHORTEST_S:
            self.events.append(TraceEvent(track, name, begin_s + self._wall_s, end_s + self._wall_s, sent_bytes))


def chrome_trace(events_by_rank: Sequence[Sequence[TraceEvent]]) -> dict[str, Any]:
    """The events of all ranks as one JSON-able trace that begins at 0.

    Source: Trace Event Format, "JSON Object Format": complete events (X) in microseconds, and metadata (M).

    Args:
        events_by_rank: in the order of ranks.
    """
    begin_s = min((event.begin_s for events in events_by_rank for event in events), default=0.0)
    rows: list[dict[str, Any]] = []
    for rank, events in enumerate(events_by_rank):
        rows.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        rows.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for track_number, track in enumerate(TRACKS):
            name = {"ph": "M", "name": "thread_name", "pid": rank, "tid": track_number, "args": {"name": track}}
            order = {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": track_number}
            rows += [name, {**order, "args": {"sort_index": track_number}}]
        for event in events:
            row: dict[str, Any] = {
                "ph": "X",
                "name": event.name,
                "cat": event.track,
                "pid": rank,
                "tid": TRACKS.index(event.track),
                "ts": round((event.begin_s - begin_s) * 1e6, 3),
                "dur": round((event.end_s - event.begin_s) * 1e6, 3),
            }
            if event.sent_bytes is not None:
                row["args"] = {"sent_bytes": event.sent_bytes}
            rows.append(row)
    return {"traceEvents": rows, "displayTimeUnit": "ms"}
