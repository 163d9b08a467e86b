"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.client import EngineClient, EngineError, EngineRequest, ModelInfo, TokenStream
from serve.http.access_log import note
from serve.http.deadline import Deadline
from serve.http.errors import any_error, json_response
from serve.http.guard import request_id_of
from serve.http.json_route import JsonRoute
from serve.http.metrics import ServerMetrics
from serve.http.request_timer import RequestTimer
from serve.http.served_models import ChatTemplates, find_model
from serve.http.settings import ServerSettings
from serve.http.statuses import EVENTS, QUEUED
from serve.http.streaming import CLIENT_CLOSED_REQUEST, EventStream, unless_disconnected
from serve.protocol import sse
from serve.protocol.chat import ChatRequest
from serve.protocol.chat_writer import ChatWriter
from serve.protocol.completion_writer import CompletionWriter
from serve.protocol.completions import CompletionRequest
from serve.protocol.errors import ApiError, from_engine
from serve.protocol.fields import GenerationFields
from serve.protocol.responses import ChatCompletion, Completion
from serve.protocol.writers import ResponseHeader, ResponseWriter

ERROR_LOG = logging.getLogger("moeyard.serve.errors")


class GenerationRoutes:
    """Handlers of both routes. Holds nothing about single requests."""

    def __init__(
        self, client: EngineClient, settings: ServerSettings, metrics: ServerMetrics, templates: ChatTemplates
    ) -> None:
        self._client, self._settings, self._metrics, self._templates = client, settings, metrics, templates

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", responses=QUEUED, tags=["generation"], route_class=JsonRoute)
        for path, handler, answer in (
            ("/completions", self.completions, Completion),
            ("/chat/completions", self.chat, ChatCompletion),
        ):
            ok: dict[str, Any] = {"model": answer, "content": EVENTS}
            router.add_api_route(path, handler, methods=["POST"], responses={200: ok})
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue text, or token ids."""
        model = await find_model(self._client, body.model)
        engine_request = body.to_engine(f"cmpl-{uuid.uuid4().hex}", model)
        header = self._header(body, engine_request, model, logprobs=body.logprobs is not None)
        return await self._answer(request, body, engine_request, CompletionWriter(header))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = await find_model(self._client, body.model)
        engine_request = body.to_engine(f"chatcmpl-{uuid.uuid4().hex}", model, self._templates.of(model))
        header = self._header(
            body,
            engine_request,
            model,
            logprobs=bool(body.logprobs),
            tools=body.offers_tools,
            parallel_tools=body.parallel_tool_calls is not False,
        )
        return await self._answer(request, body, engine_request, ChatWriter(header))

    def _header(
        self, body: GenerationFields, request: EngineRequest, model: ModelInfo, **asked_for: bool
    ) -> ResponseHeader:
        return ResponseHeader(
            response_id=request.request_id,
            created=int(time.time()),
            model=body.model or model.model_id,
            fingerprint=f"fp_{model.weights_version[:12]}",
            choices=len(request.prompts) * request.sampling.n,
            token_ids=bool(body.return_token_ids),
            routing=bool(body.return_routing),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            **asked_for,
        )

    async def _answer(
        self, request: Request, body: GenerationFields, engine_request: EngineRequest, writer: ResponseWriter
    ) -> Response:
        timer = RequestTimer(self._metrics, engine_request.model)
        deadline = Deadline(self._settings.request_timeout_s)
        # Raises before the first byte, so that a refused request gets a proper status.
        try:
            tokens = await deadline.bound(self._client.generate(engine_request))
        except ApiError as error:
            timer.failed(error)
            raise
        except EngineError as error:
            raise from_engine(error, body.names) from error
        note(request.scope, timer.answered)

        async def release() -> None:
            await tokens.aclose()
            timer.released()

        request_id = request_id_of(request.scope)
        if body.stream:
            frames = self._frames(tokens, writer, timer, deadline, request_id)
            return EventStream(frames, release, keep_alive_s=self._settings.keep_alive_s)
        try:
            answer = await unless_disconnected(request.receive, _collect(tokens, writer, timer, deadline))
        except Exception as error:
            timer.failed(any_error(error, request_id))
            raise
        finally:
            await release()
        return Response(status_code=CLIENT_CLOSED_REQUEST) if answer is None else json_response(answer)

    async def _frames(
        self, tokens: TokenStream, writer: ResponseWriter, timer: RequestTimer, deadline: Deadline, request_id: str
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error after the first byte is an event too, and then nothing more follows."""
        try:
            for event in writer.opening():
                yield sse.event(event)
            async for chunk in deadline.chunks(tokens):
                timer.chunk(chunk)
                frame = b"".join(map(sse.event, writer.events(chunk)))
                if frame:
                    yield frame
            timer.finished()
            yield b"".join([*map(sse.event, writer.closing()), sse.DONE])
        except Exception as error:
            public = any_error(error, request_id)
            timer.failed(public)
            if public.status == 500:
                ERROR_LOG.exception("request %s failed while streaming", request_id)
            yield sse.error_event(public)


async def _collect(tokens: TokenStream, writer: ResponseWriter, timer: RequestTimer, deadline: Deadline) -> object:
    async for chunk in deadline.chunks(tokens):
        timer.chunk(chunk)
        writer.add(chunk)
    timer.finished()
    return writer.body()
