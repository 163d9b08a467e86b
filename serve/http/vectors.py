"""``/v1/embeddings``."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request, Response

from serve.client import EngineClient, EngineError, RequestAbortedError
from serve.http.access_log import Answered, note
from serve.http.deadline import Deadline
from serve.http.errors import json_response
from serve.http.json_route import JsonRoute
from serve.http.metrics import AbortReason, ServerMetrics
from serve.http.served_models import find_model
from serve.http.settings import ServerSettings
from serve.http.statuses import QUEUED
from serve.http.streaming import CLIENT_CLOSED_REQUEST, unless_disconnected
from serve.protocol.embeddings import EmbeddingsBody
from serve.protocol.errors import ApiError, from_engine
from serve.protocol.responses import EmbeddingList


def embeddings_router(client: EngineClient, settings: ServerSettings, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=QUEUED, tags=["embeddings"], route_class=JsonRoute)

    @router.post("/embeddings", responses={200: {"model": EmbeddingList}})
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """One vector of unit length for each input."""
        model = await find_model(client, body.model)
        engine_request = body.to_engine(f"embd-{uuid.uuid4().hex}", model)
        answered = Answered(model.model_id)
        note(request.scope, answered)

        def end_early(reason: AbortReason) -> None:
            answered.finish = reason
            metrics.aborted(model.model_id, reason)

        deadline = Deadline(settings.request_timeout_s)
        try:
            # Cancelling the call is what ends the request when the client leaves.
            result = await unless_disconnected(request.receive, deadline.bound(client.embed(engine_request)))
        except ApiError:
            end_early("timeout")
            raise
        except EngineError as error:
            if isinstance(error, RequestAbortedError):
                end_early("abort")
            raise from_engine(error, {"prompt": "input"}) from error
        if result is None:
            end_early("disconnect")
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        answered.prompt_tokens, answered.finish = result.prompt_tokens, "stop"
        return json_response(body.answer(result, body.model or model.model_id))

    return router
