"""Routes whose bodies are read by :func:`serve.protocol.json_body.parse_body` instead of the framework."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from serve.http.streaming import CLIENT_CLOSED_REQUEST
from serve.protocol.json_body import parse_body


def is_json(content_type: str) -> bool:
    media = content_type.partition(";")[0].strip().lower()
    return media.startswith("application/") and media.endswith(("/json", "+json"))


class _JsonRequest(Request):
    _parsed: tuple[object] | None = None

    async def json(self) -> Any:
        if self._parsed is None:
            self._parsed = (parse_body(await self.body()),)
        return self._parsed[0]


class JsonRoute(APIRoute):
    """Give it to a router as its ``route_class``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def read_first(request: Request) -> Response:
            own = _JsonRequest(request.scope, request.receive)
            try:
                # Here our own error keeps its words; the framework would replace it by one of its own.
                if await own.body() and is_json(own.headers.get("content-type", "")):
                    await own.json()
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return await handler(own)

        return read_first
