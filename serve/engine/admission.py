"""The bounded line of requests: pure bookkeeping, no threads, no clock.

An unbounded queue turns overload into time-outs for everybody; a bounded one answers the overflow at once. Both
limits are checked before a request costs anything: requests bound the wait in turns, prompt tokens bound the work that
stands before the first token. Admission is all or nothing, and an idle engine takes any request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class QueueLimits:
    """``max_requests`` may wait besides the running one, with ``max_prompt_tokens`` in all."""

    max_requests: int = 64
    max_prompt_tokens: int = 262_144

    def __post_init__(self) -> None:
        if self.max_requests < 0 or self.max_prompt_tokens < 1:
            raise ValueError(f"queue limits must be positive, got {self}")


class RequestLine(Generic[T]):
    """First come, first served; at most one request is out of the line and running."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._waiting: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._running: str | None = None
        self.waiting_prompt_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return 0 if self._running is None else 1

    @property
    def idle(self) -> bool:
        return self._running is None and not self._waiting

    def refusal(self, prompt_tokens: int) -> Literal["requests", "prompt_tokens"] | None:
        """The limit that one more request with so many prompt tokens would break, or None."""
        if self.idle:
            return None
        # A request that waits while nothing runs is about to run, so it does not count against the line.
        if self.num_waiting + self.num_running > self.limits.max_requests:
            return "requests"
        if self._waiting and self.waiting_prompt_tokens + prompt_tokens > self.limits.max_prompt_tokens:
            return "prompt_tokens"
        return None

    def add(self, request_id: str, item: T, prompt_tokens: int) -> None:
        if request_id in self._waiting or request_id == self._running:
            raise ValueError(f"request id {request_id!r} is already in the line")
        self._waiting[request_id] = (item, prompt_tokens)
        self.waiting_prompt_tokens += prompt_tokens

    def remove(self, request_id: str) -> T | None:
        """Takes a waiting request out; None when it does not wait (any more)."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return None
        self.waiting_prompt_tokens -= entry[1]
        return entry[0]

    def start_next(self) -> T | None:
        """The request whose turn it is becomes the running one; None when nobody waits."""
        if self._running is not None:
            raise RuntimeError(f"request {self._running!r} is still running")
        if not self._waiting:
            return None
        request_id, (item, prompt_tokens) = self._waiting.popitem(last=False)
        self.waiting_prompt_tokens -= prompt_tokens
        self._running = request_id
        return item

    def finish(self) -> None:
        self._running = None

    def drain(self) -> list[T]:
        """Empties the line of waiting requests."""
        items = [item for item, _ in self._waiting.values()]
        self._waiting.clear()
        self.waiting_prompt_tokens = 0
        return items
