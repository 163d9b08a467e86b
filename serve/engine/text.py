"""Tokens to text as a reader may see it: whole characters only, and nothing that may be part of a stop string.

Two things hold text back. A character can take several tokens (UTF-8), so its first tokens show nothing. And the
beginning of a stop string must not be shown before it is clear that the rest does not follow. A token leaves together
with the last of its text, so that token ids and log-probabilities stay aligned with what the reader has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class IncrementalDecoder(Protocol):
    """Token ids in, complete characters out."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """Something about a token, and where its text starts in the generated text, in characters."""

    item: T
    start: int


@dataclass(frozen=True, slots=True)
class Release(Generic[T]):
    """Text that became certain, the tokens it came from, and the stop string that ended the sequence, if one did."""

    text: str
    tokens: tuple[Placed[T], ...]
    stop: str | None = None


class TextAssembler(Generic[T]):
    """Follows one sequence. Call :meth:`push` per token until it reports a stop, then or at the end :meth:`finish`.

    Args:
        decoder: fresh incremental decoder.
        stop: stop strings; the one that begins first in the text wins, the longer one of two that begin together.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(sorted(set(stop), key=lambda text: (-len(text), text)))
        self._held = ""  # decoded, not released
        self._released = 0  # characters released so far
        self._incomplete: list[T] = []  # tokens since the last complete character
        self._pending: deque[tuple[int, int, T]] = deque()  # start, end, token: decoded, not released

    def push(self, token_id: int, item: T, *, may_stop: bool = True) -> Release[T]:
        """One token more. With ``may_stop`` false, stop strings that it completes do not count."""
        self._incomplete.append(item)
        self._append(self._decoder.push(token_id))
        if not may_stop:
            return self._release(len(self._held))
        return self._stopped() or self._release(len(self._held) - self._ambiguous_tail())

    def finish(self) -> Release[T]:
        """Everything still held, after the last token. An incomplete character becomes U+FFFD."""
        self._append(self._decoder.flush())
        stopped = self._stopped()
        if stopped is not None:
            return stopped
        end = self._released + len(self._held)
        self._pending.extend((end, end, item) for item in self._incomplete)
        self._incomplete.clear()
        return self._release(len(self._held))

    def _append(self, text: str) -> None:
        if not text:
            return
        start = self._released + len(self._held)
        self._held += text
        end = start + len(text)
        self._pending.extend((start, end, item) for item in self._incomplete)
        self._incomplete.clear()

    def _stopped(self) -> Release[T] | None:
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda match: match[0])
        cut = self._released + at
        tokens = tuple(Placed(item, start) for start, _, item in self._pending if start < cut)
        text = self._held[:at]
        self._held = ""
        self._released = cut
        self._pending.clear()
        self._incomplete.clear()
        return Release(text, tokens, stop)

    def _ambiguous_tail(self) -> int:
        """Length of the longest end of the held text that a stop string could begin with."""
        for length in range(min(len(self._held), max(map(len, self._stop), default=0)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int) -> Release[T]:
        text, self._held = self._held[:length], self._held[length:]
        self._released += length
        tokens = []
        while self._pending and self._pending[0][1] <= self._released:
            start, _, item = self._pending.popleft()
            tokens.append(Placed(item, start))
        return Release(text, tuple(tokens))
