"""Two running estimates: how often requests end, and how fast a counter grows. Pure: the caller has the clock."""

from __future__ import annotations

from collections import deque

MAX_WAIT_S = 60.0


class ServiceTime:
    """Mean time between two ends of requests, recent ones weighing most."""

    def __init__(self) -> None:
        self._mean_s = 1.0
        self._last_s: float | None = None

    def ended(self, now_s: float) -> None:
        """A request has ended."""
        if self._last_s is not None:
            self._mean_s += 0.2 * (min(now_s - self._last_s, MAX_WAIT_S) - self._mean_s)
        self._last_s = now_s

    def until_one_ends(self) -> float:
        """Seconds after which a refused request may find room."""
        return min(self._mean_s, MAX_WAIT_S)


class Throughput:
    """Growth per second of a counter over the last ``window_s`` seconds."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._points: deque[tuple[float, int]] = deque()

    def add(self, count: int, now_s: float) -> None:
        """The counter's value now. Points closer than a hundredth of the window are merged."""
        if len(self._points) > 1 and now_s - self._points[-2][0] < self._window_s / 100:
            self._points.pop()
        self._points.append((now_s, count))
        while now_s - self._points[0][0] > self._window_s:
            self._points.popleft()

    def per_s(self, now_s: float) -> float:
        """0 when nothing was added lately."""
        points = list(self._points)
        if len(points) < 2 or now_s - points[-1][0] > self._window_s:
            return 0.0
        return (points[-1][1] - points[0][1]) / max(now_s - points[0][0], 1e-9)
