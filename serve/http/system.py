"""Routes about the server itself: health, models, metrics, the front page."""

from __future__ import annotations

import html
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.client import EngineClient, EngineHealth, ModelInfo
from serve.http.errors import json_response
from serve.http.generation import find_model
from serve.http.metrics import CONTENT_TYPE, ServerMetrics
from serve.http.settings import ServerSettings
from serve.protocol.errors import SERVER_ERROR, ApiError, ErrorBody
from serve.protocol.responses import ModelBody, ModelList

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{model}: moeyard</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem}}
pre{{overflow:auto;padding:1rem;border:1px solid #8886;border-radius:6px}}
@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}}}</style></head><body>
<h1>{model}</h1>
<p>A mixture-of-experts language model served by moeyard: {params:,} parameters, {active:,} active per token,
{layers} MoE layers of {experts} experts, context of {context:,} tokens.</p>
<pre>curl {base}v1/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "prompt": "Once", "max_tokens": 32}}'</pre>
<p>OpenAI's interface: <code>/v1/completions</code>, <code>/v1/chat/completions</code>, <code>/v1/models</code>.
Operations: <code>/health</code>, <code>/ready</code>, <code>/metrics</code>, <code>/openapi.json</code>.</p>
</body></html>
"""


def model_body(model: ModelInfo) -> ModelBody:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "moeyard",
        "max_model_len": model.context_length,
    }


def ill_health(health: EngineHealth, limit_s: float) -> str | None:
    """What is wrong, or None. A dead, stopped or wedged engine is ill; a starting or draining one is not."""
    if health.status in ("dead", "stopped"):
        return f"The engine is {health.status}." + (f" {health.detail}" if health.detail else "")
    if health.heartbeat_age_s > limit_s:
        return f"The engine has not passed its loop for {health.heartbeat_age_s:.0f} s."
    return None


def _health_response(health: EngineHealth, trouble: str | None, code: str) -> Response:
    state = {"status": health.status, "heartbeat_age_s": round(health.heartbeat_age_s, 3)}
    if trouble is None:
        return json_response(state)
    error = ApiError(503, trouble, type=SERVER_ERROR, code=code)
    return json_response({**state, **error.body()}, 503)


def system_router(client: EngineClient, settings: ServerSettings, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["system"])
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": ErrorBody}}

    @router.get("/health", responses=unwell)
    async def health() -> Response:
        """Liveness: is the engine's loop turning. Restart the process when this fails."""
        state = await client.health()
        return _health_response(state, ill_health(state, settings.heartbeat_limit_s), "unhealthy")

    @router.get("/ready", responses=unwell)
    async def ready() -> Response:
        """Readiness: would a request be taken now. Send no traffic while this fails."""
        state = await client.health()
        trouble = ill_health(state, settings.heartbeat_limit_s)
        if trouble is None and state.status != "ready":
            trouble = f"The engine is {state.status}."
        return _health_response(state, trouble, "not_ready")

    @router.get("/v1/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        served: ModelList = {"object": "list", "data": [model_body(model) for model in await client.models()]}
        return json_response(served)

    # A path parameter that may hold slashes, as names in the style of organisation/model do.
    @router.get("/v1/models/{model:path}", responses={200: {"model": ModelBody}, 404: {"model": ErrorBody}})
    async def one_model(model: str) -> Response:
        return json_response(model_body(await find_model(client, model)))

    @router.get("/metrics")
    async def prometheus() -> Response:
        text = metrics.render(await client.models(), await client.stats(), await client.health())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @router.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        model = await find_model(client, None)
        text = PAGE.format(
            model=html.escape(model.model_id),
            base=html.escape(str(request.base_url)),
            params=model.num_params,
            active=model.active_params,
            layers=len(model.moe_layers),
            experts=model.num_experts,
            context=model.context_length,
        )
        return Response(text, media_type="text/html")

    return router
