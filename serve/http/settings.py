"""Limits and keys of one server."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import UserError


@dataclass(frozen=True)
class ServerSettings:
    """Values that :func:`serve.http.app.build_app` works with.

    Attributes:
        api_keys: accepted bearer tokens; empty: everybody is let in.
        max_body_bytes: larger request bodies get 413.
        heartbeat_limit_s: /health fails when the engine has not passed its loop for so long.
        keep_alive_s: a stream silent for so long gets an SSE comment, so that proxies keep the connection.
        stop_engine: stop the engine when the application shuts down.
        drain_s: seconds that running requests get at that point.

    Raises:
        UserError: an API key is empty.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    heartbeat_limit_s: float = 60.0
    keep_alive_s: float = 15.0
    stop_engine: bool = True
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys):
            raise UserError("an API key must not be empty: it would let everybody in")
