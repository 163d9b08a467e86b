"""Server-sent events as OpenAI's clients read them.

Every event is one ``data:`` line of JSON; ``data: [DONE]`` ends a complete stream. A stream that fails ends with an
error event and no ``[DONE]``, so that nobody takes a cut answer for a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve.protocol.errors import ApiError, to_json

CONTENT_TYPE = "text/event-stream; charset=utf-8"
# nginx and some gateways hold back a response until it is complete unless told otherwise.
HEADERS: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(value: object) -> bytes:
    """One event; JSON has no raw newline, so one ``data:`` line is enough."""
    return b"data: " + to_json(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error.body())
