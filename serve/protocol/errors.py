"""Errors in the shape that OpenAI's clients parse: ``{"error": {message, type, param, code}}``.

``code`` is always a string or null, because the official client types it so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from typing_extensions import TypedDict

from serve.client import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    UnknownModelError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorObject


class ApiError(Exception):
    """An error that goes to the client as it stands.

    Attributes:
        status: HTTP status, for answers that have not begun.
        headers: extra response headers (``Retry-After``, ``WWW-Authenticate``, ...).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> ErrorBody:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def from_engine(error: EngineError, names: Mapping[str, str] | None = None) -> ApiError:
    """What a client is told about an engine's error, and whether a retry can help (status and ``Retry-After``).

    Args:
        names: what the client calls a field that the engine knows by another name.
    """
    public = _public(error)
    if public.param is not None and names is not None:
        public.param = names.get(public.param, public.param)
    return public


def _public(error: EngineError) -> ApiError:
    message = str(error)
    match error:
        case UnknownModelError():
            return ApiError(404, message, param="model", code="model_not_found")
        case InvalidRequestError():
            return ApiError(400, message, param=error.param, code="invalid_value")
        case ContextLengthError():
            param = "prompt" if error.max_tokens is None else "max_tokens"
            return ApiError(400, message, param=param, code="context_length_exceeded")
        case QueueFullError():
            retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(429, message, type="rate_limit_error", code=f"queue_full_{error.reason}", headers=retry)
        case EngineUnavailableError():
            return ApiError(503, message, type=SERVER_ERROR, code="unavailable", headers={"Retry-After": "1"})
        case RequestAbortedError():
            return ApiError(503, message, type=SERVER_ERROR, code="aborted")
        case EngineDeadError():
            return ApiError(503, message, type=SERVER_ERROR, code="engine_dead")
        case _:
            return ApiError(500, message, type=SERVER_ERROR)


def field_path(location: Sequence[int | str]) -> str | None:
    """``("body", "messages", 0, "content")`` as ``messages[0].content``; None for the body as a whole."""
    path = ""
    # The first part is where the value was sent; a field may have such a name too.
    for part in location[1:] if location and location[0] in ("body", "query", "path", "header") else location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path or None


def from_validation(errors: Sequence[Mapping[str, object]]) -> ApiError:
    """The first of pydantic's errors as a 400. The offending input is not echoed.

    A custom error may name the parameter in ``ctx["param"]``; its type becomes the code.
    """
    if not errors:
        return ApiError(400, "The request body is not valid.")
    first = errors[0]
    kind = str(first.get("type", ""))
    context = first.get("ctx")
    context = context if isinstance(context, Mapping) else {}
    location = first.get("loc")
    location = location if isinstance(location, tuple) else ()
    if kind == "json_invalid":
        return ApiError(400, f"The request body is not valid JSON: {context.get('error', '')}.", code="invalid_json")
    named = context.get("param")
    param = named if isinstance(named, str) else field_path(location)
    message = str(first.get("msg", "invalid value"))
    if param is not None and not message.startswith(f"`{param}`"):
        message = f"`{param}`: {message}"
    code = {
        "missing": "missing_required_parameter",
        "unsupported_parameter": "unsupported_parameter",
    }.get(kind, "invalid_value")
    return ApiError(400, message, param=param, code=code)


def to_json(value: object) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape instead of an error."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")
