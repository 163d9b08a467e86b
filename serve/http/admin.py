"""``/admin``: what changes a running server. Only for the admin key; see :mod:`serve.http.keys`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from serve.client import EngineClient, ExpertRecord, ModelInfo
from serve.http.errors import json_response
from serve.http.json_route import JsonRoute
from serve.http.keys import require_admin
from serve.http.served_models import find_model
from serve.http.statuses import errors
from serve.protocol.admin import PrefixCacheBody, WeightsBody, WeightsRequest
from serve.protocol.experts import ExpertRecordBody, expert_record

ModelName = Annotated[str | None, Query(max_length=512, description="served model; left out: the default one")]


async def _only_admin(request: Request) -> None:
    require_admin(request.scope)


def admin_router(client: EngineClient) -> APIRouter:
    router = APIRouter(
        prefix="/admin",
        responses=errors(400, 401, 403, 404, 503),
        tags=["admin"],
        route_class=JsonRoute,
        dependencies=[Depends(_only_admin)],
    )

    @router.post("/weights", responses={200: {"model": WeightsBody}, **errors(415)})
    async def weights(body: WeightsRequest) -> Response:
        """Serve the weights of another directory from now on, or change nothing and say why."""
        model = await find_model(client, body.model)
        version: WeightsBody = {
            "weights_version": await client.swap_weights(model.model_id, body.path, running=body.running)
        }
        return json_response(version)

    @router.post("/experts/start", responses={200: {"model": ExpertRecordBody}})
    async def start(model: ModelName = None) -> Response:
        """Count expert loads from zero."""
        served = await find_model(client, model)
        await client.record_experts(served.model_id, start=True)  # returns what a recording before this one has
        return _record(served, await client.expert_record(served.model_id))

    @router.post("/experts/stop", responses={200: {"model": ExpertRecordBody}})
    async def stop(model: ModelName = None) -> Response:
        """Stop counting; what was counted stays until the next start."""
        served = await find_model(client, model)
        return _record(served, await client.record_experts(served.model_id, start=False))

    @router.get("/experts", responses={200: {"model": ExpertRecordBody}})
    async def experts(model: ModelName = None) -> Response:
        """What has been counted."""
        served = await find_model(client, model)
        return _record(served, await client.expert_record(served.model_id))

    @router.post("/prefix_cache/reset", responses={200: {"model": PrefixCacheBody}})
    async def reset(model: ModelName = None) -> Response:
        """Forget all cached prompts."""
        served = await find_model(client, model)
        freed: PrefixCacheBody = {"blocks_freed": await client.reset_prefix_cache(served.model_id)}
        return json_response(freed)

    return router


def _record(model: ModelInfo, record: ExpertRecord) -> Response:
    return json_response(expert_record(model, record))
