"""The bound on what waits: pure bookkeeping, no threads, no clock.

An unbounded queue turns overload into time-outs for everybody; a bounded one answers the overflow at once. Both
limits are checked before a request costs anything: requests bound the wait in turns, prompt tokens bound the work that
stands before the first token. Admission is all or nothing, and an idle engine takes any request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QueueLimits:
    """``max_requests`` may wait besides those that are computed, with ``max_prompt_tokens`` in all."""

    max_requests: int = 64
    max_prompt_tokens: int = 262_144

    def __post_init__(self) -> None:
        if self.max_requests < 0 or self.max_prompt_tokens < 1:
            raise ValueError(f"queue limits must be positive, got {self}")


@dataclass(slots=True)
class _Entry:
    """A request in flight: its sequences that are not over, and its prompt tokens until the first of them starts."""

    sequences: int
    prompt_tokens: int
    started: bool = False


class Admission:
    """Requests in flight.

    Args:
        limits: bounds of what may wait.
        max_running: sequences that the engine computes at once.
    """

    def __init__(self, limits: QueueLimits, max_running: int) -> None:
        self.limits, self._max_running = limits, max_running
        self._entries: dict[str, _Entry] = {}
        self._started_sequences = 0
        self.num_waiting = 0
        self.waiting_prompt_tokens = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._entries)

    def refusal(self, prompt_tokens: int) -> Literal["requests", "prompt_tokens"] | None:
        """The limit that one more request with so many prompt tokens would break, or None."""
        if not self._entries:
            return None
        # What waits while there is room to compute it is about to start, so it does not count against the queue.
        room = max(0, self._max_running - self._started_sequences)
        if self.num_waiting >= room + self.limits.max_requests:
            return "requests"
        if self.num_waiting and self.waiting_prompt_tokens + prompt_tokens > self.limits.max_prompt_tokens:
            return "prompt_tokens"
        return None

    def add(self, request_id: str, sequences: int, prompt_tokens: int) -> None:
        """A request enters; ValueError if one of that id is in flight."""
        if request_id in self._entries:
            raise ValueError(f"request id {request_id!r} is already in flight")
        self._entries[request_id] = _Entry(sequences, prompt_tokens)
        self.num_waiting += 1
        self.waiting_prompt_tokens += prompt_tokens

    def started(self, request_id: str) -> None:
        """Its first sequence is being computed. Nothing happens if it is not in flight, or started before."""
        entry = self._entries.get(request_id)
        if entry is not None and not entry.started:
            entry.started = True
            self.num_waiting -= 1
            self.waiting_prompt_tokens -= entry.prompt_tokens
            self._started_sequences += entry.sequences

    def sequence_over(self, request_id: str) -> None:
        """One of its sequences has ended; the last one takes the request with it. Nothing if it is not in flight."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        self.started(request_id)
        entry.sequences -= 1
        self._started_sequences -= 1
        if not entry.sequences:
            del self._entries[request_id]

    def remove(self, request_id: str) -> None:
        """The request is over as a whole; nothing happens when it is not in flight."""
        self.started(request_id)
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._started_sequences -= entry.sequences

    def clear(self) -> None:
        """Every request is over."""
        for request_id in list(self._entries):
            self.remove(request_id)
