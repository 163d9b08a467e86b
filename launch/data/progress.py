"""Progress of long preparations: a bar on a terminal, a few plain lines elsewhere, nothing when told to be quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

PLAIN_INTERVAL_S = 10.0

Advance = Callable[[int], None]


class Reporter:
    """Says on stderr what goes on; ``enabled=False`` says nothing at all."""

    def __init__(self, enabled: bool, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console(stderr=True)

    def line(self, text: str) -> None:
        """One plain line."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total_bytes: int) -> Iterator[Advance]:
        """A stretch of work over ``total_bytes``; what it yields is called with the bytes just done."""
        if not self.enabled:
            yield lambda done: None
        elif self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, TimeRemainingColumn(), console=self.console) as bar:
                task = bar.add_task(label, total=total_bytes)
                yield lambda done: bar.advance(task, done)
        else:
            yield self._plain(label, total_bytes)

    def _plain(self, label: str, total_bytes: int) -> Advance:
        self.line(f"{label}: {total_bytes / 1e6:,.1f} MB")
        done_bytes, last_s = 0, time.monotonic()

        def advance(done: int) -> None:
            nonlocal done_bytes, last_s
            done_bytes += done
            if time.monotonic() - last_s > PLAIN_INTERVAL_S:
                last_s = time.monotonic()
                self.line(f"{label}: {done_bytes / max(1, total_bytes):.0%}")

        return advance
