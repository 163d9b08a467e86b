"""The bridge from the engine's thread to the event loops of the readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from serve.client import EngineError

T = TypeVar("T")


class Sink(Protocol):
    """Where an engine puts a request's answers."""

    loop: asyncio.AbstractEventLoop

    def receive(self, item: Any, last: bool) -> None:
        """Called inside ``loop``."""
        ...

    def abandon(self) -> object:
        """The loop is closed, and the reader with it."""
        ...


class Delivery(NamedTuple):
    """A chunk, a result, or the error that ends a request; nothing follows the ``last`` one."""

    sink: Sink
    item: Any
    last: bool = False


def deliver(deliveries: Iterable[Delivery]) -> None:
    """Hand over everything that one pass gave, waking every event loop once. Called from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for delivery in deliveries:
        by_loop.setdefault(delivery.sink.loop, []).append(delivery)
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_receive_all, group)
        except RuntimeError:
            for sink in {id(d.sink): d.sink for d in group}.values():
                sink.abandon()


def _receive_all(group: list[Delivery]) -> None:
    for sink, item, last in group:
        sink.receive(item, last)


class AnswerStream(Generic[T]):
    """A :class:`serve.client.TokenStream` that another thread fills.

    Made inside the reader's event loop. A slow or stuck reader never blocks the engine: what it has not read is
    bounded by the tokens of its own request.

    Args:
        on_abandon: called once, from either side, when the reader is gone before the end.
    """

    def __init__(self, on_abandon: Callable[[], object]) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T | EngineError, bool]] = asyncio.Queue()
        self._on_abandon = on_abandon
        self._over = False

    # The reader's side.

    def __aiter__(self) -> AnswerStream[T]:
        return self

    async def __anext__(self) -> T:
        if self._over:
            raise StopAsyncIteration
        item, last = await self._items.get()
        self._over = last
        if isinstance(item, EngineError):
            raise item
        return item

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._on_abandon()

    # The engine's side.

    def receive(self, item: T | EngineError, last: bool) -> None:
        self._items.put_nowait((item, last))

    def abandon(self) -> object:
        return self._on_abandon()
