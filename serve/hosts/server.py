"""uvicorn with a drain that the engine takes part in, and signals that become exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serve.client import EngineClient

# Connections that clients keep in a pool should outlive the pauses between their requests.
KEEP_ALIVE_S = 75
# What the web server grants on top of the engine's deadline, to write the last error events.
GRACE_S = 5


class EmbeddedServer(uvicorn.Server):
    """Serves until a signal, then drains: no new connections, running answers finish, the rest is told.

    Args:
        client: its engine is drained beside the connections, so that requests past the deadline end with an error
            that their clients understand instead of a cut connection.
        on_ready: called when requests are accepted.
        on_drain: called with the number of unfinished requests when the drain begins.
    """

    def __init__(
        self,
        app: FastAPI,
        client: EngineClient,
        *,
        drain_s: float,
        on_ready: Callable[[], None],
        on_drain: Callable[[int], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(drain_s) + GRACE_S,
        )
        super().__init__(config)
        self._client, self._drain_s = client, drain_s
        self._on_ready, self._on_drain = on_ready, on_drain
        self._hurry = False

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, which is how services are told to stop."""
        return 130 if signal.SIGINT in self._captured_signals else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stats = await self._client.stats()
        self._on_drain(stats.num_running + stats.num_waiting)
        drain = asyncio.ensure_future(self._client.stop(drain_s=self._drain_s))
        impatience = asyncio.ensure_future(self._stop_when_hurried())
        await super().shutdown(sockets)
        if self.force_exit:
            drain.cancel()
        impatience.cancel()
        await asyncio.gather(drain, impatience, return_exceptions=True)

    async def _stop_when_hurried(self) -> None:
        """Ends running requests with an error event, after which their connections close by themselves."""
        while not self._hurry:
            await asyncio.sleep(0.05)
        await self._client.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Ctrl-C again: end what runs. And again: leave everything where it is."""
        self._captured_signals.append(sig)
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = self._hurry
            self._hurry = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but does not raise the signals again: the exit code says it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
