"""Ctrl-C once: finish the step, save, stop. Twice: stop now."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

EXIT_CODE = 130
_ECHO_S = 2.0
"""One Ctrl-C can reach a worker twice, from the terminal and from torchrun; a second press comes later than this."""


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag that the trainer reads between steps.

    Use as a context manager around training; the former handlers come back at the end.
    """

    def __init__(self, announce: bool) -> None:
        self.requested = False
        self._announce = announce
        self._first_at = 0.0
        self._former: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._first_at > _ECHO_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_at = True, now
            if self._announce:
                print(
                    f"\n{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)",
                    file=sys.stderr,
                    flush=True,
                )
