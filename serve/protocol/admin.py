"""Bodies and answers of the routes under /admin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from serve.protocol.validation import RequestBody, problem


def _check_path(path: str) -> str:
    if "\x00" in path:
        raise problem("must not have null characters")
    return path


class WeightsRequest(RequestBody):
    """Serve the weights of another model directory."""

    path: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_path)]
    model: str | None = Field(None, max_length=512, description="served model; left out: the default one")
    running: Literal["drain", "keep"] = Field(
        "drain",
        description="drain: running requests end with the old weights first; keep: they go on with the new ones",
    )


class WeightsBody(TypedDict):
    weights_version: str


class PrefixCacheBody(TypedDict):
    blocks_freed: int
