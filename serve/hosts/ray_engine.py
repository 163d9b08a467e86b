"""One engine inside a Ray replica: loading, health, and updates in place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from moe.errors import UserError
from serve.client import EngineClient, EngineError, EngineRequest
from serve.engine.admission import QueueLimits
from serve.engine.settings import EngineSettings
from serve.hosts.ray_batches import batches
from serve.hosts.ray_merge import ReplicaReport
from serve.hosts.ray_options import RayOptions
from serve.hosts.ray_user_config import LIMITS, UserConfig

LOG = logging.getLogger("moeyard.serve.ray")
# First item of a remote stream: the engine has taken the request.
ADMITTED: Final = "admitted"
# Marks the reason of a failed start in what Ray makes of it, several tracebacks deep.
REASON = "moeyard cannot serve:"
# How often an engine looks whether those who read its streams are still there.
CALLER_CHECK_S = 5.0
CONTROLS = frozenset(
    {
        "abort",
        "detokenize",
        "embed",
        "expert_record",
        "record_experts",
        "reset_prefix_cache",
        "stop",
        "swap_weights",
        "tokenize",
    }
)


class ReplicaStartError(RuntimeError):
    """Why a replica does not start, in one line that survives Ray's wrapping."""

    def __init__(self, reason: BaseException | str) -> None:
        super().__init__(f"{REASON} {' '.join(str(reason).split())}")


class ReplicaEngine(EngineClient, Protocol):
    """An engine whose limits can be changed while it runs."""

    async def limit(self, queue: QueueLimits, max_step_tokens: int) -> None:
        """See :meth:`serve.engine.engine.AsyncEngine.limit`."""
        ...


def load_replica_engine(model_dir: Path, model_id: str, options: RayOptions) -> ReplicaEngine:
    """The only place that knows which engine runs in replicas."""
    from serve.engine.load import load_engine  # torch: only where there is an engine

    return load_engine(model_dir, model_id=model_id, settings=options.engine_settings())


class EngineHost:
    """The engine of one replica.

    Args:
        model_id: name in requests. model_dir: the model to start with.
        replica_id: in reports.
        caller_lives: whether a process that reads streams is still there; None: nobody looks.
    """

    def __init__(
        self,
        model_id: str,
        model_dir: Path,
        options: RayOptions,
        *,
        replica_id: str = "",
        caller_lives: Callable[[str], bool] | None = None,
    ) -> None:
        self._model_id, self._model_dir, self._options = model_id, model_dir, options
        self._replica_id, self._caller_lives = replica_id, caller_lives
        self._client: ReplicaEngine | None = None
        self._weights, self._settings = str(model_dir), options.engine_settings()
        self._configured = self._stopping = False
        self._callers: dict[str, str] = {}
        self._watch: asyncio.Task[None] | None = None

    @property
    def client(self) -> ReplicaEngine:
        assert self._client is not None
        return self._client

    async def start(self) -> None:
        """Load and warm up.

        Raises:
            ReplicaStartError: a model that cannot be loaded or does not run.
        """
        try:
            self._client = await asyncio.to_thread(load_replica_engine, self._model_dir, self._model_id, self._options)
            await self._client.start()
        except UserError as error:
            raise ReplicaStartError(error) from error
        except EngineError as error:
            raise ReplicaStartError(
                f"{self._model_dir}: loaded, but does not run: {error.__cause__ or error}"
            ) from error
        if self._caller_lives is not None:
            self._watch = asyncio.ensure_future(self._abort_orphans(self._caller_lives))

    async def stop(self) -> None:
        """Free the engine. Ray has waited for the requests by now."""
        if self._watch is not None:
            self._watch.cancel()
        if self._client is not None:
            await self._client.stop()

    async def check_health(self) -> None:
        """Raises when the engine is dead, stopped or wedged; a busy one keeps its heartbeat.

        One that was told to stop is well: Ray would put another in its place.
        """
        if self._stopping:
            return
        trouble = (await self.client.health()).trouble(self._options.heartbeat_limit_s)
        if trouble is not None:
            raise RuntimeError(trouble)

    async def report(self) -> ReplicaReport:
        (model,) = await self.client.models()
        stats, health = await self.client.stats(), await self.client.health()
        return ReplicaReport(self._replica_id, os.getpid(), model, stats, health)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Ray's ``user_config`` (see :class:`serve.hosts.ray_user_config.UserConfig`): limits at once, then weights.

        What is not valid, and weights that cannot be served, keep a new replica from starting, but leave a running one
        as it is: Ray replaces replicas whose update fails by new ones, which would fail as well, and soon nobody would
        answer.
        """
        starting, self._configured = not self._configured, True
        try:
            wanted = UserConfig.read(config)
            await self._limit(wanted.limits(self._options.engine_settings()))
            weights = wanted.weights or str(self._model_dir)
            if weights != self._weights:
                version = await self.client.swap_weights(self._model_id, weights, running=wanted.running)
                self._weights = weights
                LOG.info("%s serves the weights %s of %s", self._model_id, version, weights)
        except (UserError, EngineError) as error:
            if starting:
                raise ReplicaStartError(error) from error
            LOG.error("%s goes on as it was, with the weights of %s: %s", self._model_id, self._weights, error)

    async def _limit(self, settings: EngineSettings) -> None:
        if settings == self._settings:
            return
        await self.client.limit(QueueLimits(settings.max_queue, settings.max_queue_tokens), settings.max_step_tokens)
        self._settings = settings
        values = ", ".join(f"{name} {getattr(settings, name)}" for name in LIMITS)
        LOG.info("%s has other limits: %s", self._model_id, values)
        if settings.max_sequences + settings.max_queue >= self._options.engine_requests:
            LOG.warning(
                "max_queue %d is never reached: Ray sends %d requests at a time, unless max_ongoing_requests stands"
                " beside user_config",
                settings.max_queue,
                self._options.engine_requests,
            )

    async def generate(self, request: EngineRequest, caller: str = "") -> AsyncGenerator[object, None]:
        """ADMITTED, then lists of chunks; an :class:`EngineError` instead of either is the end.

        Errors are items because Ray would wrap and log what is raised. Closing or cancelling aborts the request.
        """
        try:
            stream = await self.client.generate(request)
        except EngineError as error:
            yield error
            return
        if caller:
            self._callers[request.request_id] = caller
        try:
            yield ADMITTED
            every_s, max_tokens = self._options.batch_ms / 1000, self._options.batch_tokens
            async with contextlib.aclosing(batches(stream, every_s, max_tokens)) as lists:
                async for batch in lists:
                    yield batch
        except EngineError as error:
            yield error
        finally:
            self._callers.pop(request.request_id, None)
            await stream.aclose()

    async def control(self, method: str, *args: Any, **kwargs: Any) -> object:
        """The result of a method of the engine client, or the :class:`EngineError` that it raised."""
        if method not in CONTROLS:
            raise ValueError(f"not a method to call from outside: {method}")
        self._stopping = self._stopping or method == "stop"
        call: Callable[..., Awaitable[object]] = getattr(self.client, method)
        try:
            return await call(*args, **kwargs)
        except EngineError as error:
            return error

    async def _abort_orphans(self, caller_lives: Callable[[str], bool]) -> None:
        """Ends requests whose reader's process has died: nobody is left to cancel them."""
        while True:
            await asyncio.sleep(CALLER_CHECK_S)
            for caller in set(self._callers.values()):
                if await asyncio.to_thread(caller_lives, caller):
                    continue
                for request_id in [key for key, value in self._callers.items() if value == caller]:
                    LOG.warning("aborting %s: its reader %s is gone", request_id, caller)
                    await self.client.abort(request_id)
