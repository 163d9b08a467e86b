"""The outermost layer: request ids, API keys, body size, the last resort for bugs, the access log.

Plain ASGI instead of Starlette's ``BaseHTTPMiddleware``, which wraps ``receive`` and so hides disconnects.
"""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from hashlib import sha256

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.settings import ServerSettings
from serve.protocol.errors import SERVER_ERROR, ApiError, to_json

ACCESS_LOG = logging.getLogger("moeyard.serve.access")
ERROR_LOG = logging.getLogger("moeyard.serve.errors")
REQUEST_ID_HEADER = "x-request-id"
# Everything else needs a key when keys are set, unknown paths included.
OPEN_PATHS = frozenset({"/health", "/ready"})


class KeyRing:
    """Compares bearer tokens in time that depends neither on the keys nor on which one matches."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def refuses(self, authorization: str | None) -> ApiError | None:
        """Why this header does not let its sender in; None when it does."""
        if not self._digests:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return _unauthorized("You didn't provide an API key: send `Authorization: Bearer YOUR_KEY`.")
        # ASGI headers are bytes read as latin-1; this gives the bytes back.
        digest = sha256(token.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return None if any(matches) else _unauthorized("Incorrect API key provided.")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def request_id_of(scope: Scope) -> str:
    """The id that this layer gave the request."""
    return str(scope["state"]["request_id"])


def _choose_request_id(headers: Headers) -> str:
    """The client's own id where it is short and printable, so that it is safe in headers and logs; else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    if 0 < len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"


def printable(path: str) -> str:
    """A decoded path may hold line breaks, with which a client could forge log lines."""
    return path.encode("unicode_escape").decode("ascii")


class RequestGuard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = KeyRing(settings.api_keys)

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
            ACCESS_LOG.info(
                "%s %s %s %s %.1f ms",
                request_id,
                scope["method"],
                printable(scope["path"]),
                status or "-",
                1000 * (time.perf_counter() - started),
            )

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["path"] not in OPEN_PATHS:
            refusal = self._keys.refuses(headers.get("authorization"))
            if refusal is not None:
                return refusal
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._settings.max_body_bytes:
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
