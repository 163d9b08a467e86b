"""Which statuses routes answer with, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, TypeAlias

from fastapi.openapi.constants import REF_TEMPLATE
from pydantic import TypeAdapter

from serve.protocol.errors import ErrorBody

Responses: TypeAlias = dict[int | str, dict[str, Any]]

_MEANING = {
    400: "The request is not valid; `param` names the field.",
    401: "No key, or a wrong one.",
    403: "Only for the admin key, and the server may have none.",
    404: "No such model.",
    408: "The answer took longer than the server's limit.",
    413: "The body is larger than the server's limit.",
    415: "The body is not sent as JSON.",
    429: "Too many requests are waiting; `Retry-After` says for how long.",
    500: "A bug in the server; the log has it under the request id.",
    503: "The engine is starting, draining, stopped or dead.",
}


def errors(*statuses: int) -> Responses:
    """These, and what the guard before all routes may answer."""
    # A reference, because the framework would compile a model for every status of every route.
    body = {"application/json": {"schema": {"$ref": REF_TEMPLATE.format(model=ErrorBody.__name__)}}}
    return {status: {"description": _MEANING[status], "content": body} for status in sorted({*statuses, 413, 500})}


def error_schemas() -> dict[str, Any]:
    """The components that :func:`errors` refers to, by name."""
    schema = TypeAdapter(ErrorBody).json_schema(ref_template=REF_TEMPLATE)
    return {**schema.pop("$defs", {}), ErrorBody.__name__: schema}


OPEN = errors()
KEYED = errors(401)
# Of routes that take a body and ask the engine something.
ENGINE = errors(400, 401, 404, 415, 503)
QUEUED = errors(400, 401, 404, 408, 415, 429, 503)
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
