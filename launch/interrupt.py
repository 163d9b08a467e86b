"""Ctrl-C once: finish the step, save, stop. Twice: stop now."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
_ECHO_S = 2.0
"""One Ctrl-C can reach a worker twice, from the terminal and from torchrun; a second press comes later than this."""


class Interrupt:
    """SIGINT and SIGTERM: a flag that the trainer reads between steps while it trains, KeyboardInterrupt otherwise.

    Use as a context manager around the run, and :meth:`deferred` around training; the former handlers come back at the
    end.
    """

    def __init__(self, announce: bool) -> None:
        self.requested = False
        self._announce = announce
        self._deferred = False
        self._first_at: float | None = None
        self._former: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a first signal only sets ``requested``: whoever runs here reads it and stops in good order."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is not None and now - self._first_at <= _ECHO_S:
            return
        again, self._first_at = self._first_at is not None, now
        if again or not self._deferred:
            raise KeyboardInterrupt
        self.requested = True
        if self._announce:
            text = f"\n{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)\n"
            os.write(2, text.encode())  # print could meet itself, interrupted in the middle of another line
