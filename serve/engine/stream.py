"""The bridge from the engine's thread to the event loop of the reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.client import EngineError, TokenChunk


class ChunkStream:
    """A :class:`serve.client.TokenStream` that another thread fills.

    Made inside the reader's event loop. A slow or stuck reader never blocks the engine: what it has not read is
    bounded by the tokens of its own request.

    Args:
        on_abandon: called once, from either side, when the reader is gone before the end.
    """

    def __init__(self, on_abandon: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[TokenChunk | EngineError | None] = asyncio.Queue()
        self._on_abandon = on_abandon
        self._over = False

    # The reader's side.

    def __aiter__(self) -> ChunkStream:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, TokenChunk):
            return item
        self._over = True
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._on_abandon()

    # The engine's side, any thread.

    def put(self, chunk: TokenChunk) -> None:
        self._post(chunk)

    def end(self, error: EngineError | None = None) -> None:
        """The last thing that the reader gets."""
        self._post(error)

    def _post(self, item: TokenChunk | EngineError | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            # The loop is closed, and the reader with it.
            self._on_abandon()
