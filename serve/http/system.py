"""Routes about the server itself: health, models, metrics, the front page."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from serve.client import EngineClient, EngineHealth, ModelInfo
from serve.http.errors import json_response
from serve.http.metrics import CONTENT_TYPE, ServerMetrics
from serve.http.page import page_response
from serve.http.served_models import find_model
from serve.http.settings import ServerSettings
from serve.http.statuses import KEYED, OPEN, errors
from serve.protocol.errors import SERVER_ERROR, ApiError
from serve.protocol.experts import ExpertLoads, expert_loads
from serve.protocol.responses import ModelBody, ModelList, VersionBody


def installed_version() -> str:
    """Of the package; a clone that is not installed has none."""
    try:
        return metadata.version("moeyard")
    except metadata.PackageNotFoundError:
        return "unknown"


def model_body(model: ModelInfo) -> ModelBody:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "moeyard",
        "max_model_len": model.context_length,
    }


def _health_response(health: EngineHealth, trouble: str | None, code: str) -> Response:
    state = {"status": health.status, "heartbeat_age_s": round(health.heartbeat_age_s, 3)}
    if trouble is None:
        return json_response(state)
    error = ApiError(503, trouble, type=SERVER_ERROR, code=code)
    return json_response({**state, **error.body()}, 503)


def system_router(client: EngineClient, settings: ServerSettings, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["system"])
    unwell = OPEN | errors(503)

    @router.get("/health", responses=unwell)
    async def health() -> Response:
        """Liveness: is the engine's loop turning. Restart the process when this fails."""
        state = await client.health()
        return _health_response(state, state.trouble(settings.heartbeat_limit_s), "unhealthy")

    @router.get("/ready", responses=unwell)
    async def ready() -> Response:
        """Readiness: would a request be taken now. Send no traffic while this fails."""
        state = await client.health()
        trouble = state.trouble(settings.heartbeat_limit_s)
        if trouble is None and state.status != "ready":
            trouble = f"The engine is {state.status}."
        return _health_response(state, trouble, "not_ready")

    @router.get("/version", responses={200: {"model": VersionBody}, **KEYED})
    async def version() -> Response:
        return json_response(VersionBody(version=installed_version()))

    @router.get("/experts/load", responses={200: {"model": ExpertLoads}, **errors(401, 404, 503)})
    async def experts(model: str | None = None) -> Response:
        """How many tokens each expert of a model, or of the default one, took since start, and how busy it is."""
        info = await find_model(client, model)
        return json_response(expert_loads(info, await client.stats(info.model_id)))

    @router.get("/v1/models", responses={200: {"model": ModelList}, **errors(401, 503)})
    async def models() -> Response:
        served: ModelList = {"object": "list", "data": [model_body(model) for model in await client.models()]}
        return json_response(served)

    # A path parameter that may hold slashes, as names in the style of organisation/model do.
    @router.get("/v1/models/{model:path}", responses={200: {"model": ModelBody}, **errors(401, 404, 503)})
    async def one_model(model: str) -> Response:
        return json_response(model_body(await find_model(client, model)))

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors(401, 503))
    async def prometheus() -> Response:
        """Prometheus' text format."""
        models = [(model, await client.stats(model.model_id)) for model in await client.models()]
        text = metrics.render(models, await client.health())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()

    return router
