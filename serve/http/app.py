"""The whole HTTP application over one engine client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response

from serve.client import EngineClient
from serve.http.admin import admin_router
from serve.http.errors import install_error_handlers, json_response
from serve.http.generation import GenerationRoutes
from serve.http.guard import RequestGuard
from serve.http.metrics import ServerMetrics
from serve.http.served_models import ChatTemplates
from serve.http.settings import ServerSettings
from serve.http.statuses import error_schemas
from serve.http.system import system_router
from serve.http.tokenization import tokenization_router
from serve.http.vectors import embeddings_router


def build_app(client: EngineClient, settings: ServerSettings | None = None) -> FastAPI:
    """An application that answers as OpenAI's API does, with ``client`` doing the work.

    It starts the engine when it starts and, unless the settings say otherwise, stops it when it stops. All state is
    in the application and the client: two applications in one process do not know each other.
    """
    settings = settings or ServerSettings()
    metrics, templates = ServerMetrics(), ChatTemplates()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await client.start()
        try:
            yield
        finally:
            if settings.stop_engine:
                await client.stop(drain_s=settings.drain_s)

    app = FastAPI(
        title="moeyard",
        summary="Mixture-of-experts language models over OpenAI's interface",
        lifespan=lifespan,
        # FastAPI's documentation pages load scripts from elsewhere; the document itself is served below.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    app.include_router(system_router(client, settings, metrics))
    app.include_router(GenerationRoutes(client, settings, metrics, templates).router())
    app.include_router(embeddings_router(client, settings, metrics))
    app.include_router(tokenization_router(client, templates))
    app.include_router(admin_router(client))
    app.add_middleware(RequestGuard, settings=settings)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(document_of(app))

    return app


def document_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI lists for every body: here that is a 400."""
    document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError", "Structure"):  # nothing refers to these any more
        schemas.pop(name, None)
    schemas.update(error_schemas())
    return document
