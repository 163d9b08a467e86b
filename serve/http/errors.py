"""Every error, the framework's own included, in OpenAI's shape."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve.client import EngineError
from serve.http.guard import internal_error, request_id_of
from serve.http.json_route import is_json
from serve.protocol.errors import INVALID_REQUEST, SERVER_ERROR, ApiError, from_engine, from_validation, to_json


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def any_error(error: Exception, request_id: str) -> ApiError:
    """The public form of whatever went wrong while answering."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    return internal_error(request_id)


def install_error_handlers(app: FastAPI) -> None:
    """Replaces FastAPI's and Starlette's answers to errors."""

    @app.exception_handler(ApiError)
    @app.exception_handler(EngineError)
    async def on_known(request: Request, error: Exception) -> Response:
        return error_response(any_error(error, request_id_of(request.scope)))

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> Response:
        content_type = request.headers.get("content-type", "")
        if isinstance(error.body, bytes) and not is_json(content_type):
            # A browser may post text/plain to any origin unasked; only JSON makes it ask first.
            message = f"The request body must be sent as `Content-Type: application/json`, got `{content_type[:80]}`."
            return error_response(ApiError(415, message, code="unsupported_media_type"))
        return error_response(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}"
        code, message = None, str(error.detail)
        if error.status_code == 404:
            code, message = "not_found", f"Unknown request URL: {path}."
        elif error.status_code == 405:
            code, message = "method_not_allowed", f"Method not allowed: {path}."
        elif error.status_code == 413:
            code = "request_too_large"
        elif error.status_code == 400:
            code, message = "invalid_json", "The request body could not be parsed as JSON in UTF-8."
        kind = INVALID_REQUEST if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR else SERVER_ERROR
        return error_response(
            ApiError(error.status_code, message, type=kind, code=code, headers=dict(error.headers or {}))
        )
