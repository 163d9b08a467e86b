"""Answers that end when their reader does: both kinds race the work against the client's disconnect.

Starlette's own responses learn of a disconnect in different ways under different ASGI versions, and only while they
stream. Here it is one way for streamed and whole answers: ``receive`` after the body waits for ``http.disconnect``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from serve.protocol import sse

T = TypeVar("T")
# nginx's status for a client that left; nobody sees it but the access log.
CLIENT_CLOSED_REQUEST = 499


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks and waits until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_done(*tasks: asyncio.Task[Any], timeout: float | None = None) -> bool:
    """Waits until one of the tasks has ended; False when none has in ``timeout`` seconds."""
    done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None when the client left first; then ``work`` has been cancelled and has ended."""
    worker = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await first_done(worker, listener)
        return worker.result() if worker.done() else None
    finally:
        await end_tasks(worker, listener)


class EventStream(Response):
    """Sends server-sent events until they end or the client leaves, whichever is first.

    Args:
        frames: encoded events.
        release: awaited once at the end, however it came. A generator that never ran could not clean up by itself.
        keep_alive_s: silence after which an SSE comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[bytes, None], release: Callable[[], Awaitable[None]], *, keep_alive_s: float
    ) -> None:
        super().__init__(headers=dict(sse.HEADERS))
        self._frames = frames
        self._release = release
        self._keep_alive_s = keep_alive_s
        self._sending = asyncio.Lock()
        self._last_sent = 0.0
        # The base class measured an empty body; this one's length is not known.
        del self.headers["content-length"]
        self.headers["content-type"] = sse.CONTENT_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_frames(send))
        listener = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            while not (await first_done(sender, listener, timeout=self._keep_alive_s)):
                await self._keep_alive(send)
            if sender.done():
                sender.result()
        finally:
            await end_tasks(sender, listener)
            await self._frames.aclose()
            await self._release()

    async def _send_frames(self, send: Send) -> None:
        async with self._sending:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._frames) as frames:
            async for frame in frames:
                async with self._sending:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                    self._last_sent = time.monotonic()
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        # A send that is under way means that the client is slow, not that the stream is silent.
        if self._sending.locked() or time.monotonic() - self._last_sent < self._keep_alive_s:
            return
        async with self._sending:
            await send({"type": "http.response.body", "body": sse.KEEP_ALIVE, "more_body": True})
