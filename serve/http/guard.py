"""The outermost layer: request ids, API keys, body size, the last resort for bugs, the access log.

Plain ASGI instead of Starlette's ``BaseHTTPMiddleware``, which wraps ``receive`` and so hides disconnects.
"""

from __future__ import annotations

import logging
import time
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.access_log import log_access, printable
from serve.http.keys import Gate
from serve.http.settings import ServerSettings
from serve.protocol.errors import SERVER_ERROR, ApiError, to_json

ERROR_LOG = logging.getLogger("moeyard.serve.errors")
REQUEST_ID_HEADER = "x-request-id"


def request_id_of(scope: Scope) -> str:
    """The id that this layer gave the request."""
    return str(scope["state"]["request_id"])


def _choose_request_id(headers: Headers) -> str:
    """The client's own id where it is short and printable, so that it is safe in headers and logs; else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    if 0 < len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"


class RequestGuard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._gate = Gate(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _choose_request_id(headers)
        # A copy per request: servers may share the lifespan's state object.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        started = time.perf_counter()
        status: int | None = None

        async def stamped_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await send_error(stamped_send, refusal)
            else:
                await self._app(scope, self._limited(receive), stamped_send)
        except Exception:
            ERROR_LOG.exception("request %s %s %s failed", request_id, scope["method"], printable(scope["path"]))
            if status is not None:  # too late for another answer: let the server cut the connection
                raise
            await send_error(stamped_send, internal_error(request_id))
        finally:
            log_access(scope, status, time.perf_counter() - started, self._settings.access_log_format)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        refusal = self._gate.refuses(scope, headers.get("authorization"))
        if refusal is not None:
            return refusal
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            # Python refuses to read numbers of thousands of digits.
            digits = declared.lstrip("0")
            if len(digits) > 18 or int(digits or "0") > self._settings.max_body_bytes:
                return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """Counts a body that came without a length (chunked)."""
        seen = 0

        async def limited_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._settings.max_body_bytes:
                # FastAPI lets only its own exception through while it reads the body.
                raise HTTPException(413, self._too_large().message)
            return message

        return limited_receive


def internal_error(request_id: str) -> ApiError:
    """A bug's public face: the details are in the log under the request id."""
    return ApiError(
        500,
        f"The server had an error while processing your request. Its request id is {request_id}.",
        type=SERVER_ERROR,
        code="internal_error",
    )


async def send_error(send: Send, error: ApiError) -> None:
    body = to_json(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
