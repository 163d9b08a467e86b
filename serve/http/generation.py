"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.client import EngineClient, EngineRequest, ModelInfo, TokenStream, UnknownModelError
from serve.http.errors import any_error, json_response
from serve.http.guard import request_id_of
from serve.http.metrics import RequestTimer, ServerMetrics
from serve.http.settings import ServerSettings
from serve.http.streaming import CLIENT_CLOSED_REQUEST, EventStream, unless_disconnected
from serve.protocol import sse
from serve.protocol.chat import ChatRequest
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.completions import CompletionRequest
from serve.protocol.errors import ErrorBody
from serve.protocol.fields import GenerationFields
from serve.protocol.responses import ChatCompletion, Completion
from serve.protocol.writers import ChatWriter, CompletionWriter, ResponseHeader, ResponseWriter

ERROR_LOG = logging.getLogger("moeyard.serve.errors")
ERROR_STATUSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 413, 415, 429, 500, 503)
}


async def find_model(client: EngineClient, name: str | None) -> ModelInfo:
    """The named model, or the default one.

    Raises:
        UnknownModelError: when nothing is served under that name.
    """
    models = await client.models()
    for model in models:
        if name is None or model.model_id == name:
            return model
    raise UnknownModelError(name or "")


class GenerationRoutes:
    """Handlers of both routes. Holds nothing about single requests."""

    def __init__(self, client: EngineClient, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._client, self._settings, self._metrics = client, settings, metrics
        self._plain_template = ChatTemplate.plain()
        self._templates: dict[str, ChatTemplate] = {}

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", responses=ERROR_STATUSES, tags=["generation"])
        router.add_api_route("/completions", self.completions, methods=["POST"], responses={200: {"model": Completion}})
        router.add_api_route(
            "/chat/completions", self.chat, methods=["POST"], responses={200: {"model": ChatCompletion}}
        )
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue text, or token ids."""
        model = await find_model(self._client, body.model)
        engine_request = body.to_engine(f"cmpl-{uuid.uuid4().hex}", model)
        header = self._header(body, engine_request, model, logprobs=body.logprobs is not None)
        return await self._answer(request, engine_request, CompletionWriter(header), stream=bool(body.stream))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = await find_model(self._client, body.model)
        engine_request = body.to_engine(f"chatcmpl-{uuid.uuid4().hex}", model, self._template(model))
        header = self._header(body, engine_request, model, logprobs=bool(body.logprobs))
        return await self._answer(request, engine_request, ChatWriter(header), stream=bool(body.stream))

    def _template(self, model: ModelInfo) -> ChatTemplate:
        if model.chat_template is None:
            return self._plain_template
        if model.chat_template not in self._templates:
            self._templates[model.chat_template] = ChatTemplate(model.chat_template, model.special_tokens)
        return self._templates[model.chat_template]

    def _header(
        self, body: GenerationFields, request: EngineRequest, model: ModelInfo, *, logprobs: bool
    ) -> ResponseHeader:
        return ResponseHeader(
            response_id=request.request_id,
            created=int(time.time()),
            model=body.model or model.model_id,
            fingerprint=f"fp_{model.weights_version[:12]}",
            choices=len(request.prompts) * request.sampling.n,
            logprobs=logprobs,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
        )

    async def _answer(
        self, request: Request, engine_request: EngineRequest, writer: ResponseWriter, *, stream: bool
    ) -> Response:
        timer = self._metrics.timer(engine_request.model)
        # Raises before the first byte, so that a refused request gets a proper status.
        tokens = await self._client.generate(engine_request)
        if stream:
            frames = self._frames(tokens, writer, timer, request_id_of(request.scope))
            return EventStream(frames, tokens.aclose, keep_alive_s=self._settings.keep_alive_s)
        try:
            body = await unless_disconnected(request.receive, _collect(tokens, writer, timer))
        finally:
            await tokens.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST) if body is None else json_response(body)

    async def _frames(
        self, tokens: TokenStream, writer: ResponseWriter, timer: RequestTimer, request_id: str
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error after the first byte is an event too, and then nothing more follows."""
        try:
            for event in writer.opening():
                yield sse.event(event)
            async for chunk in tokens:
                timer.chunk(chunk)
                frame = b"".join(map(sse.event, writer.events(chunk)))
                if frame:
                    yield frame
            timer.finished()
            yield b"".join([*map(sse.event, writer.closing()), sse.DONE])
        except Exception as error:
            public = any_error(error, request_id)
            if public.status == 500:
                ERROR_LOG.exception("request %s failed while streaming", request_id)
            yield sse.error_event(public)


async def _collect(tokens: TokenStream, writer: ResponseWriter, timer: RequestTimer) -> object:
    async for chunk in tokens:
        timer.chunk(chunk)
        writer.add(chunk)
    timer.finished()
    return writer.body()
