"""Ray's ``user_config``: what running replicas are told by deploying again, without a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moe.errors import UserError
from serve.engine.settings import EngineSettings

LIMITS = ("max_queue", "max_queue_tokens", "max_step_tokens")


class UserConfig(BaseModel):
    """Values of one deployment with an engine. What is left out is as the application's arguments say.

    Attributes:
        weights: a model directory to serve from now on.
        running: what becomes of running requests then; see :meth:`serve.client.EngineClient.swap_weights`.
        max_queue, max_queue_tokens, max_step_tokens: see :class:`serve.engine.settings.EngineSettings`. Other sizes
            decide how much memory there is and how many requests Ray sends, so they need a new replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str | None = None
    running: Literal["drain", "keep"] = "drain"
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    max_step_tokens: int | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> UserConfig:
        """From what Ray hands over.

        Raises:
            UserError: an unknown name, or a value of another type; all of them in one line.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError("user_config: " + "; ".join(map(_problem, error.errors()))) from error

    def limits(self, settings: EngineSettings) -> EngineSettings:
        """The settings with this config's limits.

        Raises:
            UserError: a limit out of range.
        """
        given = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        try:
            return replace(settings, **given)
        except UserError as error:
            raise UserError(f"user_config: {error}") from error


def _problem(error: Mapping[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown {name}, known are {', '.join(UserConfig.model_fields)}"
    return f"{name}: {error['msg']}, got {error['input']!r}"
