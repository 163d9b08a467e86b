"""Limits and keys of one server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import UserError


@dataclass(frozen=True)
class ServerSettings:
    """Values that :func:`serve.http.app.build_app` works with.

    Attributes:
        api_keys: accepted bearer tokens; empty: everybody is let in.
        admin_key: the bearer token for everything under /admin, and for nothing else; None: /admin is closed.
        max_body_bytes: larger request bodies get 413.
        request_timeout_s: an answer that is not complete after so long is ended with an error; None: no limit.
        heartbeat_limit_s: /health fails when the engine has not passed its loop for so long.
        keep_alive_s: a stream silent for so long gets an SSE comment, so that proxies keep the connection.
        access_log_format: lines of the log "moeyard.serve.access": text, or one JSON object each.
        stop_engine: stop the engine when the application shuts down.
        drain_s: seconds that running requests get at that point.

    Raises:
        UserError: a key is empty, or the time limit is not positive.
    """

    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float | None = None
    heartbeat_limit_s: float = 60.0
    keep_alive_s: float = 15.0
    access_log_format: Literal["text", "json"] = "text"
    stop_engine: bool = True
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys):
            raise UserError("an API key must not be empty: it would let everybody in")
        if self.admin_key is not None and not self.admin_key.strip():
            raise UserError("the admin key must not be empty: leave it out to close /admin")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise UserError(f"request_timeout_s must be positive, got {self.request_timeout_s}")
        if self.access_log_format not in ("text", "json"):
            raise UserError(f"access_log_format must be text or json, got {self.access_log_format!r}")
