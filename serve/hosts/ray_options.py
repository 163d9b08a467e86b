"""What a deployment on Ray Serve is made of: plain values, checked once, the same for YAML, code and command line."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe.errors import UserError
from serve.engine.settings import EngineSettings
from serve.hosts.memory import HUGE_PAGES
from serve.http.settings import ServerSettings

# Requests that a replica takes on top of what its engine runs and queues: those that are to be refused with a proper
# 429, and probes. Ray's own answer to too many requests is plain text.
HEADROOM = 32
# What Ray grants on top of the drain, to write the last events and free the model.
GRACE_S = 10.0


class RayOptions(BaseModel):
    """Arguments of :func:`serve.hosts.ray_app.app`.

    Attributes:
        model: path of a run or an exported model, or names and paths of several. All nodes must see the paths.
        name: model name in requests when there is one path; None takes the run's or folder's name.
        layout: "A": every replica holds the engine and answers HTTP: one hop. "B": HTTP replicas in front of one
            engine deployment per model: several models, scale to zero, and a dead engine that clients are told of.
        num_replicas: engines of each model, unless ``max_replicas`` is set.
        min_replicas, max_replicas: scale the number of engines between these by load. 0 (only in B) frees everything
            while nobody asks, and makes the first request wait for the model to load.
        target_ongoing_requests: requests per engine that scaling aims at; None: as many as are computed at once.
        upscale_delay_s, downscale_delay_s: how long the load must have been higher, or lower, before scaling.
        ingress_replicas: HTTP replicas of layout B.
        max_ongoing_requests: requests that Ray sends to one engine at a time; None: what it runs and queues, and some
            more, so that the engine refuses with an OpenAI error before Ray does with plain text.
        cpus_per_replica: CPUs that Ray reserves for an engine; None: its threads. Bookkeeping, not a limit.
        gpus_per_replica: GPUs that Ray reserves for an engine; set ``device`` with it.
        threads: compute threads of each engine, also as OMP_NUM_THREADS.
        max_sequences ... device: see :class:`serve.engine.settings.EngineSettings`.
        api_keys: accepted bearer tokens; none: those of MOEYARD_API_KEYS where the application is built, else no key
            is asked for.
        admin_key: opens /admin; None: that of MOEYARD_ADMIN_KEY where the application is built, else it is closed.
        max_body_bytes ... heartbeat_limit_s: see :class:`serve.http.settings.ServerSettings`.
        drain_s: seconds that running requests get when a replica is stopped.
        health_check_period_s, health_check_timeout_s: how often Ray asks, and how long it waits. It replaces a
            replica that has died at the next question, and one that answers badly, or not, after three.
        rolling_update_percentage: share of the replicas that an update replaces at a time, from above 0 to 1.
        max_surge_percent: replicas that an update may start on top, in percent; old ones then serve until new ones
            are ready, which needs the CPUs and memory for both. 0: an update of a single replica is an outage.
        start_attempts: how often Ray tries to start a replica.
        batch_ms, batch_tokens: tokens after a request's first travel together, for so long or up to so many.
        admission_timeout_s: in B, how long a request may wait for an engine replica that takes it.
        access_log: one line per request in the replicas' logs.

    Raises:
        UserError: values that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | dict[str, str]
    name: str | None = None
    layout: Literal["A", "B"] = "A"

    num_replicas: int = Field(1, ge=1)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0)
    ingress_replicas: int = Field(1, ge=1)
    max_ongoing_requests: int | None = Field(None, ge=1)

    cpus_per_replica: float | None = Field(None, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)

    max_sequences: int = EngineSettings.max_sequences
    max_step_tokens: int = EngineSettings.max_step_tokens
    max_queue: int = EngineSettings.max_queue
    max_queue_tokens: int = EngineSettings.max_queue_tokens
    block_size: int = EngineSettings.block_size
    kv_cache_gib: float | None = EngineSettings.kv_cache_gib
    prefix_cache: bool = EngineSettings.prefix_cache
    batch_invariant: bool = EngineSettings.batch_invariant
    native: bool | None = EngineSettings.native
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = EngineSettings.device

    api_keys: tuple[str, ...] = Field((), repr=False)
    admin_key: str | None = Field(None, repr=False)
    max_body_bytes: int = Field(ServerSettings.max_body_bytes, ge=1)
    request_timeout_s: float | None = None
    keep_alive_s: float = Field(ServerSettings.keep_alive_s, gt=0)
    access_log_format: Literal["text", "json"] = "text"
    heartbeat_limit_s: float = Field(ServerSettings.heartbeat_limit_s, gt=0)
    drain_s: float = Field(30.0, ge=0)

    health_check_period_s: float = Field(2.0, gt=0)
    health_check_timeout_s: float = Field(30.0, gt=0)
    rolling_update_percentage: float = Field(0.2, gt=0, le=1)
    max_surge_percent: int = Field(0, ge=0, le=100)
    start_attempts: int = Field(3, ge=1)

    batch_ms: float = Field(25.0, ge=0)
    batch_tokens: int = Field(16, ge=1)
    admission_timeout_s: float = Field(300.0, gt=0)
    access_log: bool = False

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """``serve run`` knows only strings: keys separated by spaces, as in the environment variable."""
        return tuple(value.split()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> RayOptions:
        if isinstance(self.model, dict):
            if not self.model:
                raise UserError("model: no model is named")
            if self.name is not None and len(self.model) != 1:
                raise UserError("name is for a single model; with several, model: {name: path, ...} names them")
            if len(self.model) > 1 and self.layout == "A":
                raise UserError(f"layout A serves one model, got {', '.join(self.model)}; several need layout: B")
        if self.max_replicas is not None:
            if self.min_replicas > self.max_replicas:
                raise UserError(f"min_replicas ({self.min_replicas}) exceeds max_replicas ({self.max_replicas})")
            if self.min_replicas == 0 and self.layout == "A":
                raise UserError("only layout B scales to zero: in A nobody would be left to answer /health")
        self.engine_settings()
        self.server_settings()
        return self

    def paths(self) -> dict[str, Path]:
        """Model directories by the names that requests use.

        Raises:
            CheckpointError: no exported model at a path.
        """
        # Not at the top: this module is also loaded to serve a model that another process has.
        from serve.engine.model_files import find_model_dir, model_name

        given = self.model if isinstance(self.model, dict) else {self.name or "": self.model}
        found = {}
        for name, path in given.items():
            directory = find_model_dir(Path(path).absolute())
            found[self.name or name or model_name(directory)] = directory
        return found

    def with_environment(self) -> RayOptions:
        """With the keys of MOEYARD_API_KEYS and MOEYARD_ADMIN_KEY where it has none of its own."""
        keys = self.api_keys or tuple(os.environ.get("MOEYARD_API_KEYS", "").split())
        admin_key = self.admin_key or os.environ.get("MOEYARD_ADMIN_KEY") or None
        return self.model_copy(update={"api_keys": keys, "admin_key": admin_key})

    def engine_settings(self) -> EngineSettings:
        return EngineSettings(**{field.name: getattr(self, field.name) for field in fields(EngineSettings)})

    def server_settings(self) -> ServerSettings:
        known = type(self).model_fields
        return ServerSettings(**{f.name: getattr(self, f.name) for f in fields(ServerSettings) if f.name in known})

    @property
    def fixed_single(self) -> bool:
        """There is never more than one engine replica of a model, but for the moments of an update."""
        return self.max_replicas is None and self.num_replicas == 1

    @property
    def cpus(self) -> float:
        """CPUs that Ray reserves for one engine replica."""
        return float(self.threads) if self.cpus_per_replica is None else self.cpus_per_replica

    @property
    def engine_requests(self) -> int:
        """Most requests that Ray has at one engine replica at a time."""
        return self.max_ongoing_requests or self.max_sequences + self.max_queue + HEADROOM

    def engine_deployment(self, model_dir: Path) -> dict[str, Any]:
        """Ray's options of a deployment that holds an engine."""
        replicas: dict[str, Any] = {"num_replicas": self.num_replicas}
        if self.max_replicas is not None:
            replicas = {
                "autoscaling_config": {
                    "min_replicas": self.min_replicas,
                    "initial_replicas": max(1, self.min_replicas),
                    "max_replicas": self.max_replicas,
                    "target_ongoing_requests": self.target_ongoing_requests or self.max_sequences,
                    "upscale_delay_s": self.upscale_delay_s,
                    "downscale_delay_s": self.downscale_delay_s,
                }
            }
        resources: dict[str, Any] = {"num_cpus": self.cpus}
        if self.gpus_per_replica:
            resources["num_gpus"] = self.gpus_per_replica
        return replicas | self._common(self.engine_requests, resources) | {"user_config": {"weights": str(model_dir)}}

    def ingress_deployment(self) -> dict[str, Any]:
        """Ray's options of layout B's HTTP deployment. It waits more than it computes, so no CPU is reserved."""
        engines = (self.max_replicas or self.num_replicas) * (len(self.model) if isinstance(self.model, dict) else 1)
        common = self._common(self.engine_requests * engines, {"num_cpus": 0})
        return {"num_replicas": self.ingress_replicas} | common

    def _common(self, requests: int, resources: dict[str, Any]) -> dict[str, Any]:
        threads = str(self.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **HUGE_PAGES}
        return {
            "max_ongoing_requests": requests,
            # Only while there is no replica to send to, as in an update: beyond that, engines refuse by themselves.
            "max_queued_requests": 2 * requests,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            "ray_actor_options": resources | {"runtime_env": {"env_vars": environment}},
            "graceful_shutdown_timeout_s": self.drain_s + GRACE_S,
            "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "max_constructor_retry_count": self.start_attempts,
            "rolling_update_percentage": self.rolling_update_percentage,
            "max_surge_percent": self.max_surge_percent,
        }

    @staticmethod
    def engine_name(model: str) -> str:
        """Name of layout B's engine deployment for a model, as YAML refers to it."""
        return "Engine-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model)
